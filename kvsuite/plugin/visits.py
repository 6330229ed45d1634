"""Every visit to every server of a comparison: started, asked, looked at, stopped."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from kvsuite import tasks
from kvsuite.analysis.serving import as_load
from kvsuite.analysis.speed import goodput
from kvsuite.engines import load, probe
from kvsuite.engines.request import Ask, Reply
from kvsuite.engines.server import Server
from kvsuite.errors import UsageError
from kvsuite.plugin import schedule
from kvsuite.plugin.schedule import Cell, Period
from kvsuite.plugin.servers import AGAIN, BASELINE
from kvsuite.records import Probe, Served
from kvsuite.tasks import Sample, Task
from kvsuite.workloads import Arrivals

if TYPE_CHECKING:
    from kvsuite.plugin.serving import Serving


class Visits:
    """All legs of a run, one after the other."""

    def __init__(self, session: Serving, names: Sequence[str], timed: bool) -> None:
        self.session, self.options, self.asked = session, session.options, session.asked
        self.tasks = [tasks.task(name) for name in names]
        self.cells = session.cells if timed else []
        self.visits = schedule.visits(list(self.asked.specs), self.options.rounds, timed, bool(names))
        self.found: list[Served] = []
        self.gone: dict[str, str] = {}
        self.why: dict[str, list[str]] = {}
        """What starts of an arm ended in."""
        self.loads, self.own = 0, secrets.token_hex(4)
        """``own`` keeps this run's salts from those of the one before, which a running server may have in its cache."""
        self.perhaps_warm = 0
        """Loads of this leg whose prompts nothing kept from the prefix cache."""
        self.servers: dict[str, Server] = {}
        for arm, spec in self.asked.specs.items():
            shared = arm == AGAIN and (self.asked.together or spec.kind == "url")
            log = session.folder / f"{arm.replace(' ', '-')}.log"
            self.servers[arm] = self.servers[BASELINE] if shared else self._server(arm, log)

    def _server(self, arm: str, log: Path) -> Server:
        a = self.asked
        known = (a.profile, a.startup, self.options.timeout, self.session.tokenizer)
        return Server(arm, a.specs[arm], log, self.session.model, *known)

    async def all(self) -> None:
        """Every visit; whatever happens, what was started is stopped."""
        self.session.folder.mkdir(parents=True, exist_ok=True)
        total = sum(self._requests(v) for v in self.visits)
        try:
            for arm in self.servers if self.asked.together else ():  # one after the other: each measures its memory
                await self._up(arm)
            with self.session.progress.over("requests", total) as done:
                self.done = done
                for leg, visit in enumerate(self.visits):
                    await self._visit(leg, visit)
        finally:
            await asyncio.gather(*(s.stop() for s in self.servers.values()), return_exceptions=True)

    def _requests(self, visit: Period) -> int:
        own = sum(len(self._load(cell, visit.arm, visit.block)) for cell in self.cells) if visit.timed else 0
        return own + (sum(len(self.session.samples(t)) for t in self.tasks) if visit.answers else 0)

    def _load(self, cell: Cell, arm: str, draw: int) -> list[Ask]:
        return schedule.load_asks(cell, self.options, self.asked, draw, arm, self.session.count_tokens)

    async def _up(self, arm: str) -> None:
        """Start an arm that is down, and warm it up. One that did not start at first, or twice later, is given up."""
        server = self.servers[arm]
        if server.up or arm in self.gone:
            return
        try:
            await server.start()
        except (UsageError, OSError, RuntimeError) as error:
            self.why[arm] = [*self.why.get(arm, []), str(error).removeprefix(f"{server.name}: ")]
            if not server.served or len(self.why[arm]) > 1:
                self.gone[arm] = self.why[arm][-1]
            if arm == BASELINE and not self.found:  # nothing can be compared
                raise UsageError(str(error)) from error
            return
        for cell in self.cells[-1:]:
            asks = schedule.warm_up(cell, self.options, self.session.count_tokens)
            width = Arrivals("closed", concurrency=cell.arrivals.concurrency)
            await load.drive(server, asks, width, done=lambda reply: None)

    async def _visit(self, leg: int, visit: Period) -> None:
        server = self.servers[visit.arm]
        if not self.asked.together:
            for other in self.servers.values():
                if other.spec.kind != "url" and (other is not server or visit.timed):  # every timed leg starts afresh
                    await other.stop()
        await self._up(visit.arm)
        self.session.ready()
        before = await server.counters() if server.up else {}
        notes: dict[str, float] = {}
        self.perhaps_warm = 0
        for task in self.tasks if visit.answers else ():
            samples = {s.id: s for s in self.session.samples(task)}
            asks = schedule.task_asks(task, list(samples.values()), self.options, visit.arm)
            arrivals = Arrivals("closed", concurrency=schedule.width(self.options, visit.arm))
            await self._drive(leg, visit, server, asks, arrivals, task, samples, "")
        for cell in self.cells if visit.timed else ():
            asks, none = self._load(cell, visit.arm, visit.block), tasks.task(schedule.DIGEST)
            if self.asked.warm:
                await load.drive(server, await self._fresh(asks, server, True), cell.arrivals, done=lambda reply: None)
            found = await self._drive(leg, visit, server, asks, cell.arrivals, none, {}, cell.name)
            notes["late"] = max([notes.get("late", 0.0), *found.late])
        if visit.timed and visit.block == visit.half == 0 and self.asked.goodput:
            await self._goodput(leg, visit, server)
        notes["perhaps_warm"] = self.perhaps_warm
        await self._probe(leg, visit, server, before, notes)

    async def _goodput(self, leg: int, visit: Period, server: Server) -> None:
        """Load tests at rates around those that the closed loops of this visit reached, until the edge is known."""
        mine = [a for a in self.found if a.leg == leg and a.cell and a.status == "ok"]
        if not mine or (targets := self.asked.goodput) is None:
            return
        last = [a for a in mine if a.cell == mine[-1].cell]
        took = max(a.start + a.e2e for a in last) - min(a.start for a in last)
        reached, cell = len(last) / took, self.cells[-1]
        tests = itertools.count()

        async def holds(rate: float) -> bool:
            at = replace(cell, name="goodput", arrivals=Arrivals("poisson", rate))
            before, own, test = len(self.found), tasks.task(schedule.DIGEST), next(tests)
            draw = self.options.rounds + test  # other prompts in every test, the same in the arms' first, second …
            asks, name = self._load(at, visit.arm, draw), f"poisson:{rate:.3g} goodput"
            await self._drive(
                leg, visit, server, asks, at.arrivals, own, {}, name, {"evaluation": "goodput", "test": test}
            )
            return goodput([(rate, as_load(self.found[before:], name))], *targets).rate is not None

        await load.bisect(holds, reached / 8, 8 * reached)

    async def _probe(
        self, leg: int, visit: Period, server: Server, before: Mapping[str, float], notes: Mapping[str, float]
    ) -> None:
        common: dict[str, Any] = {
            "leg": leg,
            "block": visit.block,
            "profile": server.profile.name,
            "command": server.command,
        }
        if not server.up or not await server.answers():
            said = self.why.get(visit.arm, [f"the server died during the leg: see {server.log}"])[-1]
            self.session.record(Probe(visit.arm, status="failed", error=said, **common))
            return
        facts = await server.facts()
        facts["compressed"] = server.profile.compressed(facts)
        facts["features"] = {"model": server.served, **facts.get("features", {})}
        counted = probe.since(before, await server.counters())
        self.session.record(Probe(visit.arm, facts=facts, counters={**counted, **notes}, **common))

    async def _fresh(self, asks: Sequence[Ask], server: Server, warm: bool = False) -> list[Ask]:
        """The requests, kept from finding prefixes of other loads in the server's cache, where it has a way. Warm loads
        share what they find."""
        self.loads += 1
        if not server.profile.salt:
            afresh = not self.asked.together and server.spec.kind != "url"
            if server.up and not warm and not await server.forget() and not afresh:
                self.perhaps_warm += 1
            return list(asks)
        salt = f"kvsuite {self.own} {0 if warm else self.loads}"
        return [replace(a, extra={**a.extra, server.profile.salt: salt}) for a in asks]

    async def _drive(
        self, leg: int, visit: Period, server: Server, asks: Sequence[Ask], arrivals: Arrivals, task: Task,
        samples: Mapping[str, Sample], cell: str, more: Mapping[str, Any] = MappingProxyType({}),
    ) -> load.Driven:  # fmt: skip
        """Ask and write down."""
        caps = {a.id: a.max_tokens or 0 for a in asks}
        about = {a.id: a.cluster or _print(a) for a in asks}
        own = await self._fresh(asks, server, bool(cell and self.asked.warm))

        def done(reply: Reply) -> None:
            if reply.error and visit.arm in self.gone:
                reply.error = self.gone[visit.arm]
            answer = _served(reply, visit.arm, task, samples.get(reply.id), caps[reply.id], about[reply.id])
            where: dict[str, Any] = {"cell": cell, "block": visit.block, "leg": leg, "width": arrivals.concurrency}
            where |= {"task": "" if cell else task.name, "evaluation": task.evaluation}
            answer = replace(answer, **{**where, **more})
            self.session.record(answer)
            self.found.append(answer)
            self.done(answer.count)

        return await load.drive(server, own, arrivals, seed=visit.block + int(more.get("test", 0)), done=done)


def _print(ask: Ask) -> str:
    return hashlib.sha256(json.dumps(list(ask.messages)).encode()).hexdigest()[:12]


def _served(r: Reply, arm: str, task: Task, sample: Sample | None, cap: int, about: str) -> Served:
    """A reply as a record: what both have in common, and where it belongs."""
    broken = bool(r.error)
    return Served(
        arm,
        status="failed" if broken else "ok",
        error=r.error,
        evaluation=task.evaluation,
        type=task.type,
        sample=r.id,
        cluster=about,
        prompt=sample.prompt_end if sample else "",
        score=task.score(sample, r.text) if sample and not broken else None,
        text=r.text,
        finish=r.finish,
        cap=cap,
        prompt_tokens=r.prompt_tokens or 0,
        prefill_seconds=r.ttft,
        decode_seconds=max(r.seconds - r.ttft, 0.0),
        reasoning=r.reasoning,
        calls=r.tool_calls,
        count=r.tokens,
        counted=r.counted,
        cached_tokens=r.cached_tokens,
        start=r.start,
        ttft=r.ttft,
        gaps=[round(gap, 6) for gap in r.gaps],
        e2e=r.seconds,
        retries=r.retries,
    )
