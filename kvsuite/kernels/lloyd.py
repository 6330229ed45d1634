"""The Lloyd-Max quantizer of normally distributed numbers: the levels with the smallest mean squared error."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor


@cache
def levels(bits: int) -> tuple[float, ...]:
    """The 2^bits levels for N(0, 1), ascending and symmetric about 0. Lloyd's iteration: edges midway between levels,
    each level the mean of the normal distribution between its edges, (φ(a) - φ(b)) / (Φ(b) - Φ(a)), until none moves
    by 1e-12. Lloyd 1982, Max 1960."""
    count = 1 << bits
    found = [6 * (i + 0.5) / count - 3 for i in range(count)]
    while True:
        edges = [-math.inf, *((a + b) / 2 for a, b in pairwise(found)), math.inf]
        moved = [_mean(a, b) for a, b in pairwise(edges)]
        moved = [(a - b) / 2 for a, b in zip(moved, reversed(moved), strict=True)]
        if max(abs(a - b) for a, b in zip(moved, found, strict=True)) < 1e-12:
            return tuple(moved)
        found = moved


def nearest(x: Tensor, bits: int) -> Tensor:
    """The code of the level nearest to each number, uint8 of x's shape; midway between two the higher one."""
    edges = torch.tensor([(a + b) / 2 for a, b in pairwise(levels(bits))], device=x.device)
    return torch.bucketize(x, edges, right=True).to(torch.uint8)


def numbers(codes: Tensor, bits: int) -> Tensor:
    """The levels of the codes, float32 of their shape."""
    return torch.tensor(levels(bits), device=codes.device)[codes.int()]


def _mean(a: float, b: float) -> float:
    """Of N(0, 1) between a and b."""
    below, above = (math.erf(x / math.sqrt(2)) for x in (a, b))
    return math.sqrt(2 / math.pi) * (math.exp(-a * a / 2) - math.exp(-b * b / 2)) / (above - below)
