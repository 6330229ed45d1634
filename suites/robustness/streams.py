"""Servers under load: ``python -m suites.robustness.streams [SECONDS [STREAMS]]`` holds 1,000 streams (or so many) for
600 seconds with one client of kvsuite's against a server that answers in every way it should not (`rude`), in a process
of its own. Every answer carries its number: mixed, lost and doubled ones are counted, and so is what ends otherwise
than its kind does. The client's memory is sampled; what it grows by in a minute is that of the second half."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from kvsuite import disk
from kvsuite.engines.openai import Client
from kvsuite.engines.request import Ask, Reply
from suites.robustness.rude import KINDS, PACE, descriptors, whole

SECONDS, STREAMS = 600.0, 1000
PATIENCE = {"connect": 60.0, "first": 60.0, "between": 60.0, "total": 240.0}
"""Of the client, seconds."""
RARE = {"gigantic-event": 0.02, "endless": 0.02, "one-chunk": 0.2}
"""How often a kind is asked for that costs the client 16 MiB, or one; the others 1."""
OTHERS = 64
"""Descriptors beside the streams'."""
OWN, SHORT = "late itself", "short of time"
"""Where a right answer was cut off because this process had no time to read it, which happens where others need the
cores."""
SHARE = 0.01
"""Of the answers that may be."""
GROWTH = 0.1
"""Of the memory, in the second half, that is still flat."""


@dataclass
class Held:
    """What came of all the asks."""

    asked: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    busy: set[int] = field(default_factory=set)
    """Numbers that may be asked twice."""
    said: dict[str, str] = field(default_factory=dict)
    """Kind → one error."""
    wrong: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    memory: list[tuple[float, float, int, int]] = field(default_factory=list)
    """Seconds, MB, streams and open files."""

    def add(self, kind: str, number: int, reply: Reply) -> None:
        """Judge one reply."""
        self.kinds[kind] += 1
        self.said[kind] = reply.error or "right"
        if found := judged(kind, number, reply):
            self.wrong[found] += 1
            if len(self.examples) < 10:
                self.examples.append(f"{kind} {number}: {found}: {reply.error or 'no error'}; {reply.text[-60:]!r}")


def judged(kind: str, number: int, reply: Reply) -> str:
    """What is wrong with a reply; empty where nothing is."""
    right, error = whole(number), KINDS[kind][0]
    if kind != "endless":
        words = reply.text.split()
        if not {*words} <= {*right.split()}:
            return "mixed"
        if len(words) != len({*words}):
            return "doubled"
        if not right.startswith(reply.text) or (not reply.error and reply.text != right):
            return "lost"
    if OWN in reply.error and not error:
        return SHORT
    if reply.error.startswith(error) and bool(reply.error) == bool(error) and reply.id == str(number):
        return ""
    return "another end"


@contextlib.contextmanager
def server(pace: float = PACE) -> Iterator[str]:
    """The rude one's URL."""
    command = [sys.executable, "-m", "suites.robustness.rude", str(pace)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


async def hold(url: str, kinds: Iterator[str], streams: int, patience: dict[str, float] = PATIENCE) -> Held:
    """So many streams at once, until there are no more kinds."""
    held, numbers, begun = Held(), itertools.count(), time.monotonic()
    open_now = 0

    async def stream(client: Client) -> None:
        nonlocal open_now
        for kind in kinds:
            number, held.asked = next(numbers), held.asked + 1
            open_now += 1
            held.busy |= {number} if kind == "busy" else set()
            reply = await client.ask(Ask(str(number), ({"role": "user", "content": f"{kind} {number}"},)))
            open_now -= 1
            held.add(kind, number, reply)

    async def watch() -> None:
        me = psutil.Process()
        while True:
            sample = (time.monotonic() - begun, me.memory_info().rss / 1e6, open_now, me.num_fds())
            held.memory.append(sample)
            await asyncio.sleep(1)

    async with Client(url, "rude", **patience) as client:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(stream(client) for _ in range(streams)))
        watching.cancel()
        seen = disk.parsed((await client.get("/asked"))[1])
    again = sum(times > 1 + (int(number) in held.busy) for number, times in seen.items())
    held.wrong.update({"asked twice": again, "not answered": held.asked - held.kinds.total()})
    return held


def drawn(seconds: float) -> Iterator[str]:
    """Kinds by chance, for so long."""
    dice, end = random.Random(0), time.monotonic() + seconds
    names, weights = [*KINDS], [RARE.get(name, 1.0) for name in KINDS]
    while time.monotonic() < end:
        yield dice.choices(names, weights)[0]


def main(argv: Sequence[str]) -> int:
    """Hold them; 1 where an answer was wrong or the memory grew."""
    seconds = float(argv[0]) if argv else SECONDS
    streams = int(argv[1]) if argv[1:] else STREAMS
    if descriptors() < streams + OTHERS:
        raise SystemExit(f"{streams} streams need {streams + OTHERS} open files: raise `ulimit -Hn`")
    with server() as url:
        held = asyncio.run(hold(url, drawn(seconds), streams))
    for kind, count in held.kinds.most_common():
        print(f"{count:7,} {kind}: {held.said[kind][:90]}")
    for example in held.examples:
        print("WRONG", example)
    at, memory, in_flight, files = np.array([row for row in held.memory if row[0] <= seconds]).T
    later = at >= seconds / 2
    slope = float(60 * np.polyfit(at[later], memory[later], 1)[0])
    grown = slope / 60 * seconds / 2
    print(f"{held.asked:,} asked, {int(np.median(in_flight))} at once (at least {int(in_flight[1:].min())})")
    print(", ".join(f"{count} {name}" for name, count in held.wrong.items() if count) or "none mixed, lost or doubled")
    print(f"{time.process_time():.0f} s of one core used by the client")
    print(
        f"memory: {memory[0]:.0f} MB at first, {memory[-1]:.0f} MB at last, {memory.max():.0f} MB at most, "
        f"{slope:+.2f} MB a minute; {int(files.max())} files open at most"
    )
    short = held.wrong.pop(SHORT, 0) > SHARE * held.asked
    return int(any(held.wrong.values()) or short or grown > GROWTH * float(np.median(memory)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
