"""Ray's workers: ``python -m suites.robustness.workers [MINUTES] [SECONDS]`` answers samples with a tiny model on Ray,
again and again for 60 minutes (or so many), kills one of its workers by SIGKILL every 60 seconds (or so many), and
compares each run's records with those of one process that nobody killed, times aside."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import Process
from pathlib import Path

import psutil

from suites.checks import forked, tiny
from suites.checks.test_resume import results

MINUTES, SECONDS = 60.0, 60.0
SAMPLES = 500
"""Of the task; a run lasts for several kills."""


def main(argv: Sequence[str]) -> int:
    """Kill; 1 where a record differs, is missing or is there twice, or a run fails."""
    minutes, pause = (float(given) for given in (*argv, *(MINUTES, SECONDS)[len(argv) :]))
    runs, kills, wrong, dice = 0, 0, 0, random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "world").mkdir()
        world = tiny.made(folder / "world")
        alone = _start(world, folder, "alone")
        alone.join()
        wanted, begin = results(folder / "alone"), time.monotonic()
        print(f"one process: {len(wanted)} records, exit code {alone.exitcode}", flush=True)
        due = begin + pause
        while time.monotonic() - begin < 60 * minutes:
            process, before = _start(world, folder, "left", "--kv-executor", "ray"), kills
            while process.is_alive():
                if time.monotonic() >= due:
                    kills += _kill(process, dice)
                    due += pause
                time.sleep(0.1)
            process.join()
            right = process.exitcode == 0 and results(folder / "left") == wanted
            runs, wrong = runs + 1, wrong + (not right)
            said = "the same records" if right else f"WRONG, exit code {process.exitcode}"
            print(f"{(time.monotonic() - begin) / 60:.1f} min, {kills - before} kills: {said}", flush=True)
            shutil.rmtree(folder / "left")
    print(f"{kills} workers killed in {runs} runs; {wrong} wrong")
    return int(wrong > 0 or not kills)


def _start(world: Path, folder: Path, run: str, *executor: str) -> Process:
    sizes = ["--kv-tasks", "needle", "--kv-samples", str(SAMPLES), "-k", "test_answers"]
    return forked.start(
        tiny.command(world, "samples", *sizes, *executor, "--kv-run", run), folder, **tiny.variables(world, folder)
    )


def _kill(process: Process, dice: random.Random) -> int:
    """Kill one of the workers that hold a model; how many were killed."""
    try:
        below = psutil.Process(process.pid).children(recursive=True)
        workers = [one for one in below if one.cmdline()[:1] and one.cmdline()[0].startswith("ray::Worker")]
        if workers:
            dice.choice(workers).kill()
    except psutil.Error:  # it ended meanwhile
        return 0
    return min(len(workers), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
