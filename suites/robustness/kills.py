"""Kills: ``python -m suites.robustness.kills [KILLS]`` ends small runs by SIGKILL at 50 random moments (or so many),
goes on with each by ``--kv-resume``, and compares what is recorded in the end with a run that nobody killed, times
aside. A quarter of the moments is before the first record, half between two, a quarter behind the last one."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import Process
from pathlib import Path

import psutil

from kvsuite.records import Job, Record
from suites.checks import forked, tiny
from suites.checks.test_resume import results

KILLS, CHAIN = 50, 5
"""Kills, and how many one run gets at most before it may come to its end."""
WAYS = {"one process": [], "xdist, all": ["-n", "2"], "xdist, a worker": ["-n", "2"]}
MARKER = "samples or length"


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed: how many records it has, and its seconds to the first one and from the last one."""

    records: int
    start: float
    end: float


def main(argv: Sequence[str]) -> int:
    """Kill; 1 where something was lost, or done twice."""
    kills, wrong, seen = int(argv[0]) if argv else KILLS, 0, Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        world, folder = tiny.made(_folder(Path(name) / "world")), Path(name) / "run"
        undisturbed, wanted = _undisturbed(world, _folder(folder))
        print(f"undisturbed: {undisturbed}", flush=True)
        dice = random.Random(0)
        for way in itertools.cycle(WAYS):
            if seen.total() >= kills:
                break
            shutil.rmtree(folder)
            _folder(folder)
            for _ in range(min(CHAIN, kills - seen.total())):
                if phase := _kill(world, folder, way, undisturbed, dice):
                    seen[f"{phase} ({way})"] += 1
                if _lines(folder / "left") >= undisturbed.records:  # what follows is all alike
                    break
            _end(_go_on(world, folder, WAYS[way]))
            found = results(folder / "left")
            left = sorted(file.name for file in (folder / "left").iterdir())
            right = found == wanted and left == ["records.jsonl", "report.html", "report.md", "run.json"]
            wrong += not right
            print(f"{way}: {'the same records' if right else f'WRONG, {len(found)} records, {left}'}", flush=True)
    print(*(f"{count} {phase}" for phase, count in sorted(seen.items())), sep="\n")
    print(f"{seen.total()} kills; {wrong} runs wrong")
    return min(wrong, 1)


def _undisturbed(world: Path, folder: Path) -> tuple[Whole, dict[Job, Record]]:
    """The second of two runs: the first one starts the server that forks."""
    _end(_go_on(world, folder, []))
    shutil.rmtree(folder / "left")
    process, begin = _go_on(world, folder, []), time.monotonic()
    wanted, first, last = 0, 0.0, 0.0
    while process.is_alive():
        if (count := _lines(folder / "left")) > wanted:
            wanted, last = count, time.monotonic()
            first = first or last
        time.sleep(0.005)
    _end(process)
    return Whole(wanted, first - begin, time.monotonic() - last), results(folder / "left")


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


def _start(world: Path, folder: Path, parallel: Sequence[str], how: str) -> Process:
    command = tiny.command(world, MARKER, *parallel, how, "left")
    return forked.start(command, folder, **tiny.variables(world, folder))


def _go_on(world: Path, folder: Path, parallel: Sequence[str]) -> Process:
    there = (folder / "left/run.json").is_file()
    return _start(world, folder, parallel, "--kv-resume" if there else "--kv-run")


def _end(process: Process) -> None:
    process.join()
    if process.exitcode:
        raise SystemExit(f"a run ended with exit code {process.exitcode}")


def _kill(world: Path, folder: Path, way: str, whole: Whole, dice: random.Random) -> str:
    """Start, or go on, and kill at a random moment. Returns what was being done then; nothing where it had ended."""
    process, begin = _go_on(world, folder, WAYS[way]), time.monotonic()
    left, kind = folder / "left", dice.random()
    lines, after = 0, dice.uniform(0, whole.start)
    if kind >= 1 / 4:
        last = kind >= 3 / 4
        lines = whole.records if last else dice.randint(min(_lines(left) + 1, whole.records), whole.records)
        after = dice.uniform(0, whole.end if last else 0.05)
    while process.is_alive() and _lines(left) < lines:
        time.sleep(0.002)
    begin = time.monotonic() if lines else begin
    while process.is_alive() and time.monotonic() - begin < after:
        time.sleep(0.002)
    phase = _phase(left, whole.records)
    if way == "xdist, a worker" and process.is_alive():
        workers = psutil.Process(process.pid).children()
        for worker in workers[:1]:
            worker.kill()
        process.join()
        return phase if workers else ""
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet, nor children
            process.kill()
        process.join()
        return phase
    process.join()
    return ""


def _lines(left: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in left.glob("records*.jsonl")) if left.is_dir() else 0


def _phase(left: Path, records: int) -> str:
    lines = _lines(left)
    if not lines:
        return "before the first record"
    if lines < records:
        return "while answering"
    if (left / "report.html").is_file():
        return "after the report"
    return "while joining" if (left / "records.jsonl").is_file() and [*left.glob("records-*")] else "while reporting"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
