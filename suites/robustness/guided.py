"""Hostile input that looks for new code: ``python -m suites.robustness.guided [INPUTS [PLACE …]]`` has atheris choose
100,000 of the inputs of `hostile` (or so many), by which lines of kvsuite they reach. Each place has a process of its
own. It needs atheris, which installs on Linux."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import atheris

WASTE = 20
"""How many times as many are tried at most, since some bytes make no input."""
PLACE = "--place"
BOUNDS = ["-timeout=60", "-max_len=8192", "-rss_limit_mb=16384", "-verbosity=0", "-seed=1"]
"""Of libFuzzer: seconds of an input, bytes that it is made from, memory."""


def main(argv: Sequence[str]) -> int:
    """Try all places; 1 where one let something through."""
    from suites.robustness.hostile import shares

    chosen, total, wrong = shares(argv), 0, 0
    for target, inputs in chosen:
        command = [sys.executable, "-m", "suites.robustness.guided", PLACE, target.name, str(inputs)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        said = done.stdout.strip().rpartition("\n")[2]
        if done.returncode:
            wrong += 1
            said = f"let through: {done.stdout[-800:]}{done.stderr[-800:]}"
        else:
            total += int(said.partition(" ")[0])
        print(f"{target.name}: {said}", flush=True)
    print(f"{total} inputs at {len(chosen)} places, {wrong} places wrong")
    return min(wrong, 1)


def place(name: str, inputs: int) -> None:
    """Try one place and end this process."""
    with atheris.instrument_imports(include=["kvsuite"]):
        from suites.robustness.hostile import SECONDS, Tried, trial
        from suites.robustness.targets import targets

    warnings.simplefilter("ignore")
    [target] = [target for target in targets() if target.name == name]
    found, calls = Tried(), 0
    with tempfile.TemporaryDirectory() as folder:
        test = trial(target, inputs, Path(folder), found).hypothesis.fuzz_one_input

        def one(data: bytes) -> None:
            nonlocal calls
            test(data)
            calls += 1
            if found.inputs == inputs or calls == WASTE * inputs:  # libFuzzer would end this process without a word
                said = f"{found.refused} refused, longest {found.longest:.2f} s of one core"
                print(f"{found.inputs} inputs, {said}", flush=True)
                os._exit(int(found.longest > SECONDS))

        atheris.Setup([sys.argv[0], *BOUNDS, f"-artifact_prefix={folder}/"], one)
        atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1:2] == [PLACE]:
        place(sys.argv[2], int(sys.argv[3]))
    sys.exit(main(sys.argv[1:]))
