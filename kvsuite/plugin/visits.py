"""The servers of a comparison: each arm's is started, visited in turn, and stopped."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kvsuite import tasks
from kvsuite.analysis.serving import as_load
from kvsuite.analysis.speed import goodput
from kvsuite.engines import load, probe
from kvsuite.engines.request import Ask, Reply
from kvsuite.engines.server import Server
from kvsuite.errors import UsageError
from kvsuite.plugin import schedule
from kvsuite.plugin.schedule import Period
from kvsuite.plugin.scoring import Scoring
from kvsuite.plugin.servers import AGAIN, BASELINE
from kvsuite.records import Probe, Served
from kvsuite.tasks import Sample
from kvsuite.workloads import Arrivals

if TYPE_CHECKING:
    from kvsuite.plugin.serving import Serving


class Visits:
    """Which server an arm has, and whether it starts. What is asked and what came back is the session's."""

    def __init__(self, session: Serving) -> None:
        self.session, asked = session, session.asked
        self.failures: dict[str, list[str]] = {}
        """What starts of an arm ended in."""
        self.token = secrets.token_hex(4)
        """Keeps this run's salts from those of the one before, which a running server may have in its cache."""
        self.scoring = Scoring()
        self.restarted: dict[str, int] = {}
        """How often an arm's server was started again because it had ended by itself."""
        self.servers: dict[str, Server] = {}
        for arm, spec in asked.specs.items():
            if arm == AGAIN and (asked.together or spec.kind == "url"):
                self.servers[arm] = self.servers[BASELINE]
                continue
            log = session.folder / f"{arm.replace(' ', '-')}.log"
            known = asked.profile, asked.startup, session.options.timeout, session.tokenizer
            self.servers[arm] = Server(arm, spec, log, session.model, *known)

    async def all(self) -> None:
        """Every leg, one after the other; whatever happens, what was started is stopped."""
        session = self.session
        session.folder.mkdir(parents=True, exist_ok=True)
        timed, answers = bool(session.loads), bool(session.chosen)
        periods = schedule.visits(list(self.servers), session.options.rounds, timed, answers)
        try:
            for arm in self.servers if session.asked.together else ():  # one by one: each measures its memory
                await self._start(arm)
            with session.progress.over("requests", sum(map(session.requests, periods))) as done:
                for number, period in enumerate(periods):
                    await self._visit(number, period, done)
            await self._score()
        finally:
            await asyncio.gather(*(s.stop() for s in self.servers.values()), return_exceptions=True)

    async def _score(self) -> None:
        """Let the baseline say how likely the answers are, where token ids were returned."""
        if self.scoring.asked:
            await self._alone(BASELINE)
            await self._start(BASELINE)
            await self.scoring.score(self.servers[BASELINE], self.session.record)

    async def _visit(self, number: int, period: Period, done: Callable[[int], None]) -> None:
        server = self.servers[period.arm]
        await self._alone(period.arm, afresh=period.timed)
        await self._start(period.arm)
        self.session.describe()  # before the first request, since that takes a moment
        await Leg(number, period, server, self, done).run()

    async def _alone(self, arm: str, afresh: bool = False) -> None:
        """Stop all others, where one is up at a time; ``afresh``: its own as well, as a timed leg has a new one."""
        for other in () if self.session.asked.together else self.servers.values():
            if other.spec.kind != "url" and (afresh or other is not self.servers[arm]):
                await other.stop()

    def given_up(self, arm: str) -> str:
        """Why an arm is not started again: it did not start at first, or twice later. Empty where it may be."""
        failures = self.failures.get(arm, [])
        return failures[-1] if failures and (not self.servers[arm].served or len(failures) > 1) else ""

    async def _start(self, arm: str) -> None:
        """Start an arm that is down, and warm it up."""
        server, session = self.servers[arm], self.session
        if self.given_up(arm) or (server.up and (server.spec.kind == "url" or await server.answers())):
            return  # what has just died may seem to be up for a moment
        self.restarted[arm] = self.restarted.get(arm, 0) + (server.up or server.ended)
        try:
            await server.start()
        except (UsageError, OSError, RuntimeError) as error:
            self.failures.setdefault(arm, []).append(str(error).removeprefix(f"{server.name}: "))
            if not session.found and (arm == BASELINE or all(map(self.given_up, session.asked.variants))):
                told = [f"{name}: {self.given_up(name)}" for name in self.failures]
                raise UsageError("nothing can be compared. " + "\n".join(told)) from error
            return
        for cell in session.loads[-1:]:
            asks = schedule.warm_up(cell, session.options, session.count_tokens)
            width = Arrivals("closed", concurrency=cell.arrivals.concurrency)
            await load.drive(server, asks, width, done=lambda reply: None)


@dataclass
class Leg:
    """One turn of one arm: its server asked, looked at, written down. ``done`` is told the tokens of every answer."""

    number: int
    period: Period
    server: Server
    visits: Visits
    done: Callable[[int], None]
    loads: int = 0
    """Made so far."""
    notes: dict[str, float] = field(default_factory=lambda: {"perhaps_warm": 0.0})
    """For its probe: loads whose prompts nothing kept from the prefix cache; how late a request was, seconds."""

    async def run(self) -> None:
        """All that the period has."""
        session, period, server = self.visits.session, self.period, self.server
        self.notes["restarted"] = float(self.visits.restarted.pop(period.arm, 0))
        before = await self._counted()
        for name in session.chosen if period.answers else ():
            samples = session.samples(tasks.task(name))
            asks = schedule.task_asks(tasks.task(name), samples, session.options, period.arm)
            if server.profile.ids and self.visits.servers[BASELINE].profile.scores:
                asks = [replace(a, extra={**a.extra, server.profile.ids: True}) for a in asks]
            width = Arrivals("closed", concurrency=schedule.width(session.options, period.arm))
            await self._drive(asks, width, task=name, samples={s.id: s for s in samples})
        counted: dict[str, float] = {}
        if pressed := period.timed and session.asked.ours == "pressure":
            counted = await self._counted()
        for cell in session.loads if period.timed else ():
            asks = session.asks(cell, period.arm, period.block)
            if session.asked.warm:
                await load.drive(server, await self._salted(asks, True), cell.arrivals, done=lambda reply: None)
            driven = await self._drive(asks, cell.arrivals, cell=cell.name)
            self.notes["late"] = max([self.notes.get("late", 0.0), *driven.late])
            if pressed:
                last, counted = counted, await self._counted()
                here = probe.since(last, counted).get("preemptions")
                self.notes |= {f"preemptions, {cell.name}": here} if here is not None else {}
        if period.timed and period.block == period.half == 0 and session.asked.goodput:
            await self._goodput(*session.asked.goodput)
        await self._probe(before)

    async def _goodput(self, ttft: float, itl: float) -> None:
        """Load tests at rates around those that the closed loops of this leg reached, until the edge is known."""
        session = self.visits.session
        mine = [a for a in session.found if a.leg == self.number and a.cell and a.status == "ok"]
        if not mine:
            return
        last = [a for a in mine if a.cell == mine[-1].cell]
        reached = len(last) / (max(a.start + a.e2e for a in last) - min(a.start for a in last))
        tests = itertools.count()

        async def holds(rate: float) -> bool:
            arrivals, name = Arrivals("poisson", rate), f"poisson:{rate:.3g} goodput"
            cell = replace(session.loads[-1], name="goodput", arrivals=arrivals)
            before, test = len(session.found), next(tests)
            # other prompts in every test, the same in the arms' first, second …
            asks = session.asks(cell, self.period.arm, session.options.rounds + test)
            await self._drive(asks, arrivals, cell=name, test=test, evaluation="goodput")
            return goodput([(rate, as_load(session.found[before:], name))], ttft, itl).rate is not None

        await load.bisect(holds, reached / 8, 8 * reached)

    async def _counted(self) -> dict[str, float]:
        """What the server has counted by now."""
        found, again = await self.server.counters() if self.server.up else ({}, False)
        self.notes["restarted"] += again
        return found

    async def _probe(self, before: Mapping[str, float]) -> None:
        arm, server = self.period.arm, self.server
        common: dict[str, Any] = {
            "leg": self.number, "block": self.period.block, "profile": server.profile.name, "command": server.command,
        }  # fmt: skip
        if not server.up or not await server.answers():
            said = self.visits.failures.get(arm, [f"the server died during the leg: {server.where}"])[-1]
            self.visits.session.record(Probe(arm, status="failed", error=said, **common))
            return
        facts = await server.facts()
        facts["compressed"] = server.profile.compressed(facts)
        facts["features"] = {"model": server.served, **facts.get("features", {})}
        counted = await self._counted()
        counters = {**probe.since(before, counted), **self.notes}
        self.visits.session.record(Probe(arm, facts=facts, counters=counters, **common))

    async def _salted(self, asks: Sequence[Ask], warm: bool) -> list[Ask]:
        """The requests, kept from finding prefixes of other loads in the server's cache, where it has a way. Warm loads
        share what they find."""
        server, together = self.server, self.visits.session.asked.together
        self.loads += 1
        if server.profile.salt:
            salt = f"kvsuite {self.visits.token} {'warm' if warm else f'{self.number}.{self.loads}'}"
            return [replace(a, extra={**a.extra, server.profile.salt: salt}) for a in asks]
        afresh = not together and server.spec.kind != "url"
        if server.up and not warm and not await server.forget() and not afresh:
            self.notes["perhaps_warm"] += 1
        return list(asks)

    async def _drive(
        self, asks: Sequence[Ask], arrivals: Arrivals, task: str = "", samples: Mapping[str, Sample] | None = None,
        cell: str = "", test: int = 0, **more: Any,
    ) -> load.Driven:  # fmt: skip
        """Ask a task's samples, or the load of a cell, and write every answer down at once."""
        session, arm, by_id = self.visits.session, self.period.arm, {a.id: a for a in asks}
        kind = tasks.task(task or schedule.DIGEST)
        more = {"evaluation": kind.evaluation, "test": test, **more}

        def done(reply: Reply) -> None:
            reply.error = (reply.error and self.visits.given_up(arm)) or reply.error
            sample, score = (samples or {}).get(reply.id), None
            if sample and not reply.error:
                score, reply.error = tasks.scored(kind, sample, reply.text)
            session.record(
                _served(
                    reply, by_id[reply.id], method=arm, leg=self.number, block=self.period.block, type=kind.type,
                    score=score,
                    prompt=sample.prompt_end if sample else "", prompt_hash=sample.prompt_hash if sample else "",
                    chance=sample.chance if sample else 0.0, task=task, cell=cell,
                    width=arrivals.concurrency, **more,
                )
            )  # fmt: skip
            self.visits.scoring.hear(arm, task, reply)
            self.done(reply.tokens)

        salted = await self._salted(asks, bool(cell and session.asked.warm))
        return await load.drive(self.server, salted, arrivals, seed=self.period.block + test, done=done)


def _served(reply: Reply, ask: Ask, **where: Any) -> Served:
    """A reply as a record, and where it belongs."""
    print_of = hashlib.sha256(json.dumps(list(ask.messages)).encode()).hexdigest()[:12]
    return Served(
        status="failed" if reply.error else "ok", error=reply.error, sample=reply.id, cluster=ask.cluster or print_of,
        text=reply.text, finish=reply.finish, reasoning=reply.reasoning, calls=reply.tool_calls, retries=reply.retries,
        cap=ask.max_tokens or 0, prompt_tokens=reply.prompt_tokens or 0, cached_tokens=reply.cached_tokens,
        count=reply.tokens, counted=reply.counted, usage_tokens=reply.usage_tokens, start=reply.start,
        ttft=reply.ttft, e2e=reply.seconds, gaps=[round(gap, 6) for gap in reply.gaps],
        prefill_seconds=reply.ttft, decode_seconds=max(reply.seconds - reply.ttft, 0.0), **where,
    )  # fmt: skip
