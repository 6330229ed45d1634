"""How much faster or slower fp8 K and V make attention on a GPU that was left out: from other GPUs with the same
kernel, and from the GPU's own bf16 times.

Bytes over bandwidth say twice as fast. That holds where both kernels are bound by the memory. How far bf16 is from that
bound, the share of the bandwidth that it achieves, is known from its own time on the GPU; so are batch, length, heads,
and what of K and V the L2 holds. From these, gradient boosting learns log(fp8's speed / bf16's) on the other GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvsuite.analysis.crossover import L2_MIB
from kvsuite.analysis.resample import Floats
from kvsuite.errors import UsageError
from kvsuite.predict import learner
from kvsuite.readers.aiconfigurator import Formats, formats

BYTES = 2.0
"""What bytes over bandwidth say of fp8's speed: it reads half."""
CLEAR = 0.05
"""How far a ratio is from 1 where its side is asked."""
MOST = 30_000
"""Cells that are learned from, drawn of all."""
LEVELS = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Left:
    """One GPU left out. Errors are medians of |predicted / measured - 1| of fp8's speed over bf16's."""

    gpu: str
    kernels: str
    n: int
    learned_from: tuple[str, ...]
    """Other GPUs."""
    extrapolated: bool
    """Whether none of them has these kernels."""
    error: float
    sign: float | None
    """The share of cells told to be faster or slower as they are, where that is by more than ``CLEAR``; None: none."""
    coverage: float
    """Of the 90 % interval."""
    bytes_error: float
    nearest: str
    """The GPU of these with the nearest bandwidth, and its ratio in the same cell, where it has one."""
    nearest_n: int
    nearest_error: float | None


def left_out(systems: Path, engine: str, extrapolate: bool = False) -> tuple[list[Left], list[str]]:
    """Every GPU that has fp8 times, left out in turn, and why some are refused. Learned from are the GPUs with the same
    kernels; of these, those of the same generation, where there is one. Raises UsageError for an engine that is
    not there."""
    known, found, refused = formats(systems, engine), [], []
    for one in known:
        others = [x for x in known if x.gpu != one.gpu]
        same = [x for x in others if x.kernels == one.kernels]
        if not same and not (extrapolate and others):
            refused.append(f"{one.gpu}: no other GPU was measured with {one.kernels}")
            continue
        near = [x for x in same if x.capability // 10 == one.capability // 10]
        found.append(_left(one, near or same or others, not same))
    if not found and not refused:
        raise UsageError(f"{engine} has no times with fp8 K and V")
    return found, refused


def _left(one: Formats, others: Sequence[Formats], extrapolated: bool) -> Left:
    true = one.plain / one.fp8
    low, middle, high = np.exp(predicted(others, one))
    clear = np.abs(true - 1) > CLEAR
    sign = (middle > 1) == (true > 1)
    nearest = min(others, key=lambda x: abs(np.log(x.bandwidth / one.bandwidth)))
    table = dict(zip(map(tuple, nearest.cells.tolist()), nearest.plain / nearest.fp8, strict=True))
    beside = np.array([table.get(tuple(cell), np.nan) for cell in one.cells.tolist()])
    there = ~np.isnan(beside)
    return Left(
        one.gpu, one.kernels, len(true), tuple(x.gpu for x in others), extrapolated,
        _error(middle, true), float(sign[clear].mean()) if clear.any() else None,
        float(((low <= true) & (true <= high)).mean()), _error(np.full(len(true), BYTES), true),
        nearest.gpu, int(there.sum()), _error(beside[there], true[there]) if there.any() else None,
    )  # fmt: skip


def _error(predicted: Floats, true: Floats) -> float:
    return float(np.median(np.abs(predicted / true - 1)))


def predicted(others: Sequence[Formats], one: Formats) -> Floats:
    """(3, n): quantiles of log(fp8's speed / bf16's), `LEVELS`, in the cells of ``one``, known by its bf16 times."""
    x, y = np.concatenate([features(o) for o in others]), np.concatenate([np.log(o.plain / o.fp8) for o in others])
    if len(y) > MOST:
        some = np.random.default_rng(0).choice(len(y), MOST, replace=False)
        x, y = x[some], y[some]
    asked = features(one)
    return np.sort([_learner(level).fit(x, y).predict(asked) for level in LEVELS], axis=0)


def _learner(level: float) -> Any:
    return learner("ensemble").HistGradientBoostingRegressor(loss="quantile", quantile=level, random_state=0)


def features(one: Formats) -> Floats:
    """(n, 7): logarithms of the share of the bandwidth that bf16 achieves, of the parts of its K and V that the L2
    would hold, and of batch, length, kv heads, query heads to each, and head dimension."""
    batch, length, heads, kv, dim = one.cells.T.astype(float)
    held = 4 * batch * length * kv * dim
    l2 = L2_MIB.get(one.gpu, 0) * 2**20
    share = held / (one.plain / 1000) / one.bandwidth
    return np.column_stack(
        [np.log(share), np.log((held + 1) / (l2 + 1)), *map(np.log, (batch, length, kv, heads / kv, dim))]
    )
