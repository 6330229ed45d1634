"""Kills while the default model is fetched and converted: ``python -m suites.robustness.fetching [KILLS]`` empties a
cache folder, has a process fill it, ends that by SIGKILL while it fetches or, in turn, converts, 10 times (or so many),
and has another one fill it. What is there in the end must be what an undisturbed process leaves, byte for byte."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kvsuite.models import sums

KILLS = 10
FILL = (sys.executable, "-c", "from kvsuite import models; models.default_model()")
PHASES = ("starting", "fetching", "converting", "done")
WITHIN = 4.0
"""Seconds of a phase in which it is ended."""


def main(argv: Sequence[str]) -> int:
    """Kill; 1 where the cache folder ended otherwise than undisturbed, or one of the two was not met."""
    kills, wrong, seen, dice = int(argv[0]) if argv else KILLS, 0, Counter[str](), random.Random(0)
    with tempfile.TemporaryDirectory() as place:
        cache = Path(place) / "cache"
        _end(_start(cache))
        wanted = sums(cache)
        print(f"undisturbed: {len(wanted)} files", flush=True)
        for at in range(kills):
            shutil.rmtree(cache)
            process = _start(cache)
            while _phase(cache) not in (PHASES[1 + at % 2], "done"):
                time.sleep(0.01)
            time.sleep(dice.uniform(0, WITHIN))
            phase = _phase(cache)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            _end(_start(cache))
            right = sums(cache) == wanted
            seen[phase], wrong = seen[phase] + 1, wrong + (not right)
            print(f"killed while {phase}: {'the same files' if right else f'WRONG: {sorted(sums(cache))}'}", flush=True)
    missed = [phase for phase in PHASES[1:3] if not seen[phase]]
    print(f"{kills} kills ({', '.join(f'{seen[phase]} {phase}' for phase in PHASES)}); {wrong} wrong")
    return int(wrong > 0 or bool(missed and kills >= KILLS))


def _start(cache: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "KVSUITE_CACHE": str(cache)}
    return subprocess.Popen(FILL, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise SystemExit(f"the cache folder was not filled: exit code {process.returncode}")


def _phase(cache: Path) -> str:
    """By what there is: a package's files lie in ``source``, what is made of them in ``made``."""
    if any(cache.glob("smollm2-*")):
        return "done"
    if any(cache.glob(".making-*/made")):
        return "converting"
    return "fetching" if any(cache.glob(".making-*")) else "starting"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
