"""How many sequences fit into memory: what a method's cache holds, as a fixed part and bytes per token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvsuite.analysis.speed import scaled
from kvsuite.records import Timing

STRAIGHT = 0.02
"""What is held may be this part of itself away from the line at most; else the shortest length is left out."""


ROUNDING = 1e-6
"""Sequences: by how much rounding of a line through bytes may carry what just fits below a whole number."""


@dataclass(frozen=True)
class SequenceBytes:
    """Bytes that one sequence holds over its tokens, a line through what was measured."""

    fixed: float
    token: float
    lengths: tuple[int, ...]
    """Those that the line goes through; shorter ones, at which an eviction has nothing to evict yet, are left out."""

    def sequences(self, nbytes: float, length: int) -> int:
        """How many sequences of ``length`` tokens fit into ``nbytes``."""
        return int(nbytes / (self.fixed + self.token * length) + ROUNDING)


def sequence_bytes(timings: Sequence[Timing]) -> dict[str, SequenceBytes]:
    """By method, where decoding was timed at two lengths or more. On models with windows the fixed part is what
    windowed layers hold, and the slope that of the others."""
    points: dict[str, dict[int, float]] = {}
    for t in map(scaled, timings):
        if t.phase == "decode" and t.status == "ok" and t.nbytes:
            points.setdefault(t.method, {})[t.length] = t.nbytes / t.width
    return {method: _line(sorted(known.items())) for method, known in points.items() if len(known) > 1}


def _line(points: Sequence[tuple[int, float]]) -> SequenceBytes:
    lengths, nbytes = np.array(points, dtype=float).T
    token, fixed = np.polyfit(lengths, nbytes, 1)
    away = np.abs(fixed + token * lengths - nbytes) / nbytes
    if len(points) > 2 and away.max() > STRAIGHT:
        return _line(points[1:])
    return SequenceBytes(float(max(fixed, 0.0)), float(max(token, 0.0)), tuple(length for length, _ in points))
