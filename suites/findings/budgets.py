"""Selectors at a half, a quarter and an eighth of the tokens, codecs at their own bytes, on the default model:
``python suites/findings/budgets.py [OPTION …]``.

Runs ``pytest -m samples`` with all of them, `random` beside them, and these options of pytest and kvsuite. The report
has the table, with intervals, and both figures of quality against bytes. Left out: `kvzap` and `headwise`, which need
files that nobody has made for this model; `tools` and timings, since some of these have no kernels.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from kvsuite.methods import Selector, catalogue

SHARES = (0.5, 0.25, 0.125)
CODECS = (
    "int8", "int8:rotate=hadamard", "int4", "int4:rotate=hadamard", "fp8", "fp8:per=token", "kivi:bits=4",
    "kivi:bits=2", "nvfp4", "nvfp4:rotate=hadamard", "nvfp4:scale=4over6", "mxfp4", "mxfp4:rotate=hadamard", "q8_0",
    "q8_0:rotate=hadamard", "q4_0", "q4_0:rotate=hadamard", "turboquant:bits=k8v4",
    "turboquant:bits=k4v4", "turboquant:bits=k3v4", "turboquant:bits=k3v3", "turboquant:bits=k4v2", "kvarn:bits=k4v4",
    "kvarn:bits=k4v2", "gear:bits=4", "gear-l:bits=4", "gear:bits=2", "gear-l:bits=2", "think",
)  # fmt: skip
SHARED = (
    "snapkv:budget={}+ada", "snapkv:budget={},window=8+pyramid", "snapkv:budget={}+layers", "snapkv:budget={}+dms",
)  # fmt: skip
"""Budgets, which share out what a selector may keep."""
READ = ("quest:budget={},dense=0", "snapkv:budget=0.5+rocketkv:budget={}")
"""Readers, whose share is what a step reads."""
TASKS = "document,needle,multi-needle,json,qa,summarize,code-line,few-shot"
SIZES = ("--kv-tasks", TASKS, "--kv-length", "1024", "--kv-samples", "24,document=24,needle=48", "--kv-cap", "96")


def methods() -> list[str]:
    """All of them as texts."""
    own = [x.name for x in catalogue() if issubclass(x, Selector) and x.name not in ("random", "kvzap")]
    budgeted = [*(f"{name}:budget={{}}" for name in ("random", *own)), *SHARED, *READ]
    return ["full", "jitter", *(x.format(share) for x in budgeted for share in SHARES), *CODECS]


def main() -> None:
    """Run, with what was asked for over the sizes here."""
    samples = Path(__file__).parents[1] / "samples"
    command = [sys.executable, "-m", "pytest", "-q", str(samples), "-m", "samples", "-k", "test_answers"]
    ran = subprocess.run([*command, "--kv-methods", ",".join(methods()), *SIZES, *sys.argv[1:]], check=False)
    sys.exit(ran.returncode)


if __name__ == "__main__":
    main()
