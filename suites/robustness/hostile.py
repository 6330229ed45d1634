"""Hostile input: ``python -m suites.robustness.hostile [INPUTS [PLACE …]]`` tries 100,000 inputs (or so many) at all
places where kvsuite takes in what others wrote. Each ends well or in one of our own errors, whose text no terminal can
take for a command, within `SECONDS` of one core and `MEMORY` of address space."""

from __future__ import annotations

import math
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings

from suites.robustness.targets import OURS, Target, targets

INPUTS = 100_000
SECONDS = 5.0
MEMORY = 16 << 30


class Tried:
    """What became of a target's inputs."""

    def __init__(self) -> None:
        self.inputs = self.refused = 0
        self.longest = 0.0


def attempt(target: Target, inputs: int) -> Tried:
    """So many inputs, always the same. Raises what was raised by an input, with the input."""
    found = Tried()
    with tempfile.TemporaryDirectory() as name:
        trial(target, inputs, Path(name), found)()
    return found


def trial(target: Target, inputs: int, folder: Path, found: Tried) -> Any:
    """Hypothesis' test of so many inputs, which leaves files in a folder and notes what became of each."""

    @settings(
        max_examples=inputs, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False,
    )  # fmt: skip
    @given(target.inputs)
    def one(given: Any) -> None:
        begin = time.process_time()
        try:
            target.read(given, folder)
        except OURS as error:
            found.refused += 1
            if not str(error).isprintable():
                raise AssertionError(f"not one printable line: {error!r}") from error
        found.inputs += 1
        found.longest = max(found.longest, time.process_time() - begin)

    return one


def shares(argv: Sequence[str]) -> list[tuple[Target, int]]:
    """The places that were asked for, and how many of all inputs each gets."""
    chosen = [target for target in targets() if not argv[1:] or target.name in argv[1:]]
    each = math.ceil((int(argv[0]) if argv else INPUTS) / sum(1 / target.dear for target in chosen))
    return [(target, math.ceil(each / target.dear)) for target in chosen]


def main(argv: Sequence[str]) -> int:
    """Try all targets; 1 where one let something else through, or took too long."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    chosen, total, wrong = shares(argv), 0, 0
    for target, inputs in chosen:
        try:
            found = attempt(target, inputs)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            wrong += 1
            print(f"{target.name}: let through {type(error).__name__}: {str(error)[:300]}", flush=True)
            print("   ", str(getattr(error, "__notes__", ""))[:600])
            continue
        total += found.inputs
        wrong += found.longest > SECONDS
        said = f"{found.inputs} inputs, {found.refused} refused, longest {found.longest:.2f} s of one core"
        print(f"{target.name}: {said}", flush=True)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{total} inputs at {len(chosen)} places, {wrong} places wrong; at most {most:.2f} GiB were held")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
