"""The orthonormal Hadamard rotation, which spreads an outlier over all channels."""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """x (..., head_dim) turned by a Hadamard matrix over √n, its own inverse, float32: in blocks of n channels, the
    largest power of two that divides head_dim. By additions, whose rounding does not depend on the rest of a batch."""
    n, width, turned = x.shape[-1] & -x.shape[-1], 1, x.float()
    while width < n:
        a, b = turned.reshape(*x.shape[:-1], -1, 2, width).unbind(-2)
        turned, width = torch.stack([a + b, a - b], -2).flatten(-3), 2 * width
    turned *= n**-0.5
    return turned
