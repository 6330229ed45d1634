"""The orthonormal Hadamard rotation, which spreads an outlier over all channels."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """x (..., head_dim) turned by a Hadamard matrix over √n, its own inverse, float32: in blocks of n channels, the
    largest power of two that divides head_dim. By additions, whose rounding does not depend on the rest of a batch."""
    n, width, turned = x.shape[-1] & -x.shape[-1], 1, x.float()
    while width < n:
        a, b = turned.reshape(*x.shape[:-1], x.shape[-1] // (2 * width), 2, width).unbind(-2)
        turned, width = torch.stack([a + b, a - b], -2).flatten(-3), 2 * width
    turned *= n**-0.5
    return turned


@cache
def signs(dim: int, seed: int) -> Tensor:
    """1 or -1 for each of ``dim`` channels, float32, drawn by ``seed``: put on before `hadamard` they make it a random
    rotation, with the same signs after it undone."""
    return torch.randint(2, (dim,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
