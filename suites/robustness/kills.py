"""Kills: ``python -m suites.robustness.kills [KILLS]`` ends small runs by SIGKILL at 50 moments (or so many): of every
run one before the first record, one between two, and one while workers' records are joined, while it reports, or after
its report. It goes on with each by ``--kv-resume``, and compares what is recorded in the end with a run that nobody
killed, times aside. Killed are all processes of a run, its controller alone, or a worker: pytest-xdist's and Ray's."""

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
from typing import Literal

import psutil

from kvsuite.records import Agreement, Job, Record
from suites.checks import forked, tiny
from suites.checks.test_resume import results

KILLS = 50
FIRST, ANSWERING, JOINING, REPORTING, AFTER = PHASES = (
    "before the first record", "while answering", "while joining", "while reporting", "after the report",
)  # fmt: skip
LEFT = 60.0
"""Seconds after a run in which what was left of its killed ones has to end."""
MARKER = "samples or length"


@dataclass(frozen=True)
class Way:
    """How a run answers, who of it is killed, and when, for one run after the other: a run goes on after the kill of a
    worker, so that it has one."""

    options: Sequence[str]
    whom: Literal["all", "controller", "worker"]
    kills: Sequence[Sequence[str]]


XDIST, RAY = ("-n", "2"), ("--kv-executor", "ray")
ENDS = [(FIRST, ANSWERING, REPORTING), (FIRST, ANSWERING, AFTER)]
JOINED = [(FIRST, ANSWERING, JOINING), ENDS[1], (FIRST, ANSWERING, JOINING), ENDS[0]]
ALONE = [(FIRST,), (ANSWERING,)]
WAYS = {
    "one process": Way((), "all", ENDS),
    "xdist, all": Way(XDIST, "all", JOINED),
    "xdist, the controller": Way(XDIST, "controller", JOINED),
    "xdist, a worker": Way(XDIST, "worker", ALONE),
    "Ray, the controller": Way(RAY, "controller", ENDS),
    "Ray, a worker": Way(RAY, "worker", ALONE),
}


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed: how many records it has, and its seconds to the first one and from the last one."""

    records: int
    start: float
    end: float


def main(argv: Sequence[str]) -> int:
    """Kill; 1 where something was lost or done twice, a process was left behind, or 50 kills met not every phase."""
    kills, wrong, seen = int(argv[0]) if argv else KILLS, 0, Counter[tuple[str, str]]()
    with tempfile.TemporaryDirectory() as place:
        world, folder = tiny.made(_folder(Path(place) / "world")), Path(place) / "run"
        undisturbed, wanted = _undisturbed(world, _folder(folder))
        print(f"undisturbed: {undisturbed}", flush=True)
        dice = random.Random(0)
        for turn, name in zip(itertools.count(), itertools.cycle(WAYS)):
            if seen.total() >= kills:
                break
            shutil.rmtree(folder)
            _folder(folder)
            way, below = WAYS[name], list[psutil.Process]()
            for kind in way.kills[turn // len(WAYS) % len(way.kills)][: kills - seen.total()]:
                if phase := _kill(world, folder, way, undisturbed, kind, dice, below):
                    seen[phase, name] += 1
            _end(_go_on(world, folder, way.options))
            found, left = results(folder / "left"), sorted(file.name for file in (folder / "left").iterdir())
            _, alive = psutil.wait_procs(below, LEFT)
            if way.options == RAY:  # on which no other cache is put beside the baseline's
                found |= {job: record for job, record in wanted.items() if isinstance(record, Agreement)}
            right = found == wanted and left == ["records.jsonl", "report.html", "report.md", "run.json"] and not alive
            wrong += not right
            said = "the same records" if right else f"WRONG, {len(found)} records, {left}, alive: {alive}"
            print(f"{name}: {said}", flush=True)
            for process in alive:
                process.kill()
    for (phase, name), count in sorted(seen.items()):
        print(f"{count} {phase} ({name})")
    missed = [phase for phase in PHASES if not any(phase == met for met, _ in seen)]
    print(f"{seen.total()} kills; {wrong} runs wrong; phases not met: {', '.join(missed) or 'none'}")
    return int(wrong > 0 or (bool(missed) and kills >= KILLS))


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


def _kill(
    world: Path, folder: Path, way: Way, whole: Whole, kind: str, dice: random.Random, below: list[psutil.Process]
) -> str:
    """Start, or go on, and kill at a random moment of a kind; adds the processes it had started to ``below``. Returns
    what was being done then; nothing where it had ended."""
    left = folder / "left"
    before, joined = _lines(left), _size(left)
    process, begin = _go_on(world, folder, way.options), time.monotonic()
    after = dice.uniform(0, {FIRST: whole.start, ANSWERING: 0.05, REPORTING: whole.end}.get(kind, 0))
    lines = dice.randint(min(before + 1, whole.records), whole.records) if kind == ANSWERING else whole.records

    def come() -> bool:
        if kind == JOINING:
            return _size(left) > joined and _parts(left)
        if kind == AFTER:
            return (left / "report.html").is_file()
        return kind == FIRST or _lines(left) >= lines

    while process.is_alive() and not come():
        time.sleep(0 if kind == JOINING else 0.002)
    begin = begin if kind == FIRST else time.monotonic()
    while process.is_alive() and time.monotonic() - begin < after:
        time.sleep(0.002)
    if not process.is_alive():
        return ""
    if way.whom == "worker":
        while not (workers := [one for one in _below(process.pid) if _is_worker(one)]) and process.is_alive():
            time.sleep(0.002)
        phase = _phase(left, whole.records, joined)
        for worker in workers[:1]:
            worker.kill()
        process.join()
        return phase if workers else ""
    below += _below(process.pid)
    try:
        (os.killpg if way.whom == "all" else os.kill)(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group of its own yet, nor children
        process.kill()
    process.join()
    return _phase(left, whole.records, joined)


def _below(process: int) -> list[psutil.Process]:
    try:
        return psutil.Process(process).children(recursive=True)
    except psutil.Error:
        return []


def _is_worker(process: psutil.Process) -> bool:
    """Of Ray: who holds a model. Of pytest-xdist: any but multiprocessing's own."""
    try:
        command = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return command.startswith("ray::Worker") or "sys.stdin.readline" in command


def _size(left: Path) -> int:
    """Bytes of what is joined."""
    file = left / "records.jsonl"
    return file.stat().st_size if file.is_file() else 0


def _parts(left: Path) -> bool:
    return any(left.glob("records-*"))


def _lines(left: Path) -> int:
    """How many there are, each once."""
    files = left.glob("records*.jsonl") if left.is_dir() else ()
    return len({line for file in files for line in _bytes(file).splitlines(keepends=True) if line.endswith(b"\n")})


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:  # joined meanwhile
        return b""


def _phase(left: Path, records: int, joined: int) -> str:
    """``joined``: bytes of ``records.jsonl`` when the run went on."""
    lines = _lines(left)
    if not lines:
        return FIRST
    if _parts(left) and _size(left) > joined:
        return JOINING
    if lines < records:
        return ANSWERING
    return AFTER if (left / "report.html").is_file() else REPORTING


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
