"""Long runs. ``python -m suites.robustness.long report [SAMPLES]`` reports 100,000 samples of 10 methods (or so many),
with their baseline and control, in at most 60 s of one core and 4 GB. ``… run [SAMPLES]`` answers 10,000 samples (or so
many) with a tiny model and prints how the memory grows: by less than 1 MB for 1,000."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil

from kvsuite.records import Answer, encode
from suites.checks import forked, tiny
from suites.checks.test_scale import cost

ROOT = Path(__file__).parents[2]
SECONDS, GB = 60.0, 4.0
SLOPE = 1.0
"""MB for 1,000 samples."""


def main(argv: Sequence[str]) -> int:
    """One of the two; 1 where it took too much."""
    what, *given = argv
    with tempfile.TemporaryDirectory() as name:
        if what == "run":
            slope = grown(Path(name), int(given[0]) if given else 10_000)
            return int(slope >= SLOPE)
        samples = int(given[0]) if given else 100_000
        make(Path(name), samples)
        used = cost(["report", "--markdown", name])
        seconds, gb = used["seconds"], used["gib"] * 2**30 / 1e9
        print(f"{samples:,} samples × 10 methods: {seconds:.1f} s of one core, {gb:.2f} GB")
        return int(seconds > SECONDS or gb > GB)


def make(folder: Path, samples: int, methods: int = 10) -> None:
    """A run of answers to so many samples of the smoke run's tasks, scored by chance."""
    arms = ["full", "jitter", *(f"int8:m={at}" for at in range(methods))]
    facts = json.loads((ROOT / "reports/cpu/smoke/run.json").read_text())
    facts |= {"methods": arms, "expected": {"samples": {"needle": samples}}}
    (folder / "run.json").write_text(json.dumps(facts))
    rng = np.random.default_rng(0)
    level = rng.beta(0.6, 0.6, samples)
    with (folder / "records.jsonl").open("w") as file:
        for arm in arms:
            scores = np.clip(level + (rng.random(samples) < 0.5) * rng.normal(0, 0.2, samples), 0, 1)
            for at, score in enumerate(scores.tolist()):
                answer = Answer(
                    arm, task="needle", type="synthetic", sample=f"needle-{at}", cluster=f"c{at // 4}", score=score,
                    tokens=[504, 4911, 1230, at], text=f"The number is {at}.", finish="stop", cap=24,
                    prompt_tokens=512, context_tokens=512, nbytes=1 << 20, nbytes_end=1 << 20, dense_end=1 << 20,
                )  # fmt: skip
                file.write(encode(answer) + "\n")


def grown(folder: Path, samples: int) -> float:
    """MB of memory by which a run of one process grows for 1,000 samples, by the samples of its second half."""
    world = tiny.made(folder)
    arguments = ["--kv-samples", str(samples), "--kv-tasks", "needle", "--kv-methods", "full,int8"]
    process = forked.start(tiny.command(world, "samples", *arguments), folder, **tiny.variables(world, folder))
    seen: list[tuple[int, float]] = []
    one, file = psutil.Process(process.pid), folder / "left/records.jsonl"
    while process.is_alive():
        if file.is_file():
            done = file.read_bytes().count(b"\n") / 3  # jitter, too
            if done and (not seen or done >= seen[-1][0] + 10):
                seen.append((done, one.memory_info().rss / 1e6))
        time.sleep(0.2)
    process.join()
    later = np.array([pair for pair in seen if pair[0] >= samples / 2])
    slope = float(1000 * np.polyfit(*later.T, 1)[0])
    print(f"{samples:,} samples: {seen[0][1]:.0f} MB at first, {seen[-1][1]:.0f} MB at last; {slope:+.2f} MB per 1,000")
    return slope


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
