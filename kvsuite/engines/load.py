"""Asks a backend many things at their times, and searches the rate up to which it keeps its targets."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvsuite.engines.request import Ask, Backend, Reply
from kvsuite.errors import UsageError
from kvsuite.workloads import Arrivals, conversations, schedule

LATE = 0.005
"""Seconds that an event loop may need to get to a request."""


@dataclass(frozen=True)
class Driven:
    """The replies to a workload, and whether the client kept up with it."""

    replies: list[Reply]
    """In the order of the asks; one that failed has an ``error``."""
    late: list[float]
    """Seconds by which each was sent after it could have been: after its time, the end of the request it waits for, or
    in a closed loop the end of the one whose place it takes. The replies' own seconds count from the sending."""

    @property
    def note(self) -> str:
        """The sentence about a client that was late; empty where it was not."""
        late = [seconds for seconds in self.late if seconds > LATE]
        if not late:
            return ""
        share = f"{len(late)} of {len(self.late)} requests more than {LATE * 1000:g} ms late"
        return f"the client, not the server, sent {share}, by {max(late):.2g} s at most; no time it reports holds that"


async def drive(
    backend: Backend, asks: Sequence[Ask], arrivals: Arrivals, *, seed: int = 0, done: Callable[[Reply], None]
) -> Driven:
    """Ask everything, in conversations that wait for themselves: in a closed loop ``concurrency`` conversations at any
    time, in an open one each at its time, whatever is still in flight.

    ``done`` gets every reply as it ends. What a backend raises is the error of that one reply; what ``done`` raises
    ends all, and so does a cancellation: requests in flight are cancelled and reach ``done`` no more. Raises UsageError
    before anything is sent where a trace's times are missing.
    """
    due, talks = schedule(asks, arrivals, seed), conversations(asks)
    replies: dict[int, Reply] = {}
    late = [0.0] * len(asks)
    clock = asyncio.get_running_loop().time
    begun = clock()

    async def until(moment: float) -> None:
        if (wait := moment - clock()) > 0:
            await asyncio.sleep(wait)

    async def work(mine: Iterable[list[int]]) -> None:
        free = begun
        for place in (place for talk in mine for place in talk):
            ready = max(begun + due[place], free)
            await until(ready)
            late[place] = max(clock() - ready, 0.0)
            replies[place] = await _ask(backend, asks[place])
            free = clock()
            done(replies[place])

    if arrivals.kind == "closed":
        shared = iter(talks)  # whoever is free takes the next
        workers = [(0.0, shared)] * min(arrivals.concurrency, len(talks))
    else:
        workers = [(due[talk[0]], iter([talk])) for talk in sorted(talks, key=lambda talk: due[talk[0]])]
    try:
        async with asyncio.TaskGroup() as group:
            for start, mine in workers:
                await until(begun + start)
                group.create_task(work(mine))
    except BaseExceptionGroup as failed:  # the caller knows what its ``done`` raises, not that there were tasks
        raise failed.exceptions[0] from None
    return Driven([replies[place] for place in range(len(asks))], late)


async def _ask(backend: Backend, ask: Ask) -> Reply:
    task, start = asyncio.current_task(), time.perf_counter()
    try:
        reply = await backend.ask(ask)
    except (Exception, asyncio.CancelledError) as error:  # a backend may cancel something of its own
        seconds = time.perf_counter() - start
        reply = Reply(ask.id, start=start, seconds=seconds, error=f"{type(error).__name__}: {error}")
    if task is not None and task.cancelling():
        raise asyncio.CancelledError  # whatever the backend made of it
    return reply


class Edge(NamedTuple):
    """How much a backend can be offered."""

    held: float | None
    """The highest rate that held, twice; None where the lowest did not."""
    missed: float | None
    """The lowest rate that missed, at least once; None where the highest held."""
    tries: list[tuple[float, bool]]
    """Every rate tried and whether it held, in order."""


STEP = 0.001
"""The smallest tolerance: no rate is known better."""


async def bisect(probe: Callable[[float], Awaitable[bool]], low: float, high: float, tolerance: float = 0.05) -> Edge:
    """The edge between the rates from ``low`` to ``high`` that hold and those that miss, to within ``tolerance`` (0.05
    is 5 %). Raises UsageError for bounds that are not rates.

    Rates double until one misses and are then halved on the log scale. Load tests are noisy, so the edge must not rest
    on one lucky test: below it a rate counts as held if it does so twice. One miss is a miss, as in ``goodput``.
    """
    if not 0 < low <= high < math.inf or not STEP <= tolerance < math.inf:
        raise UsageError(f"there is no rate to find from {low:g} to {high:g} a second to within {tolerance:g}")
    tries: list[tuple[float, bool]] = []

    async def holds(rate: float) -> bool:
        tries.append((rate, await probe(rate)))
        return tries[-1][1]

    missed: float | None = None
    once: list[float] = []
    while missed is None and (not once or once[-1] < high):
        rate = min(2 * once[-1], high) if once else low
        if await holds(rate):
            once.append(rate)
        else:
            missed = rate
    while once and not await holds(once[-1]):
        missed = once.pop()
    held = once[-1] if once else None
    while held is not None and missed is not None and missed > held * (1 + tolerance):
        middle = math.sqrt(held * missed)
        if await holds(middle) and await holds(middle):
            held = middle
        else:
            missed = middle
    return Edge(held, missed, tries)
