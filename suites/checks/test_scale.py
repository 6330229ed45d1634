"""100,000 scored samples and 10 methods, all intervals: at most 60 seconds of one core and 4 GB, growing linearly. By
day a tenth of them, in as little memory for each."""

import json
import subprocess
import sys

import numpy as np

from suites.checks.depth import only_nightly

COMMAND = """
import json, os, resource, sys
from kvsuite.cli import main
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
code = main(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": used.ru_utime + used.ru_stime, "gib": used.ru_maxrss / 2**20}), file=sys.stderr)
sys.exit(code)
"""


def cost(asked):
    """CPU seconds and GiB of a command of kvsuite's, and what it printed."""
    done = subprocess.run([sys.executable, "-c", COMMAND, *asked], capture_output=True, text=True, check=True)
    return json.loads(done.stderr.splitlines()[-1]) | {"printed": done.stdout}


def negatives(folder, samples, methods=10, datasets=14):
    """That of ``kvsuite negatives`` over so many samples."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = ["base", "control", *(f"m{i}" for i in range(methods))]
    for number in range(datasets):
        level = rng.beta(0.6, 0.6, samples // datasets)
        for name in names:
            moved = rng.random(len(level)) < 0.5
            scores = np.clip(level + moved * rng.normal(0, 0.2, len(level)), 0, 1)
            rows = [{"id": at, "score": score} for at, score in enumerate(scores.tolist())]
            (folder / f"{name}_d{number}_eval.json").write_text(json.dumps(rows))
    spec = f"artifact:{folder}/"
    candidates = [x for name in names[2:] for x in ("--candidate", f"{name}={spec}{name}_")]
    asked = ["negatives", "--baseline", f"{spec}base_", "--control", f"{spec}control_", *candidates, "--json"]
    used = cost(asked)
    assert len(json.loads(used.pop("printed"))["methods"]) == methods
    return used


def test_memory_grows_with_the_samples(tmp_path):
    small, large = negatives(tmp_path / "small", 1_000), negatives(tmp_path / "large", 10_000)
    assert large["gib"] - small["gib"] <= 4 * 9_000 / 100_000


@only_nightly
def test_a_hundred_thousand_samples_of_ten_methods(tmp_path):
    small, large = negatives(tmp_path / "small", 20_000), negatives(tmp_path / "large", 100_000)
    print(f"20,000 samples: {small}, 100,000: {large}")
    assert large["seconds"] <= 60
    assert large["gib"] <= 4
    assert large["seconds"] <= 5 * 1.3 * small["seconds"]
