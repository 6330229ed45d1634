"""Per cell: speed of a method as a ratio to the baseline's, out of paired rounds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from kvsuite.analysis.stats import Interval, log_ratio_interval
from kvsuite.errors import UsageError
from kvsuite.records import Timing

OURS = "kvsuite.cache."
"""Where the classes live whose answers are scored; a timing of another one is transformers' own, a row beside."""


@dataclass(frozen=True)
class SpeedRow:
    """One cell. ``speedup`` > 1 is faster than the baseline, which ran in turn with it."""

    method: str
    phase: str
    width: int
    length: int
    failed: bool
    error: str
    rate: float | None = None
    """Tokens per second, all sequences, median round."""
    seconds: float | None = None
    speedup: Interval | None = None
    rounds: int = 0
    nbytes: int = 0
    checked: float | None = None
    path: str = ""
    """Codec, and what stored and attended: ``kivi/unfused`` is PyTorch."""


def speed_rows(timings: Sequence[Timing]) -> list[SpeedRow]:
    """One row per timed cell, in order. Raises UsageError for a timing of our cache that was never checked."""
    rows = []
    for t in timings:
        cell = (t.method, t.phase, t.width, t.length, t.status == "failed", t.error)
        if t.status == "failed" or not t.seconds:
            rows.append(SpeedRow(*cell))
            continue
        if t.cache.startswith(OURS) and not (t.checked is not None and t.checked <= 1):
            raise UsageError(f"{t.method} was timed at width {t.width} without its output being checked")
        median = statistics.median(t.seconds)
        logs = [math.log(b / a) for a, b in zip(t.seconds, t.baseline_seconds, strict=True)]
        rows.append(
            SpeedRow(
                *cell,
                rate=t.tokens / median,
                seconds=median,
                speedup=log_ratio_interval(logs),
                rounds=len(logs),
                nbytes=t.nbytes,
                checked=t.checked,
                path=t.path,
            )
        )
    return rows
