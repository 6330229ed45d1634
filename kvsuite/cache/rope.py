"""Finding out whether a layer's keys can be moved by `Rope.rotate`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvsuite.kernels.rope import Rope

NEAR = {torch.float32: 1e-3}
"""By how much of the largest channel a moved key may be off: by dtype, else `ROUGH`."""
ROUGH = 0.03
"""16 bits round the angles' cosines and the products to 2⁻⁹ each."""


def rotations(model: Any) -> Iterator[Rope]:
    """Every rotary embedding that a model has: a buffer ``inv_freq``, or ``full_attention_inv_freq`` and the like."""
    for module in model.modules():
        for name, frequency in module.named_buffers(recurse=False):
            kind = name.removesuffix("inv_freq")
            if kind != name and "original" not in kind and frequency.dim() == 1:
                scaling = getattr(module, f"{kind}attention_scaling", 1.0)
                yield Rope(frequency.detach().float(), float(scaling))


def find_rope(ropes: list[Rope], at: Tensor, moved: Tensor, by: int) -> Rope | None:
    """The rotary embedding that carries a layer's keys ``at`` one position to those that it gave the same hidden state
    ``by`` positions on, both (kv_heads, head_dim). None where there is none, and where the keys stay as they are.

    Nothing is believed of names or configurations: interleaved channels, a norm after the rotation and a layer without
    one are told by the keys.
    """
    near = NEAR.get(moved.dtype, ROUGH) * float(moved.abs().max())
    if torch.allclose(at.float(), moved.float(), rtol=0, atol=near):
        return None
    for rope in ropes:
        fits = 2 * len(rope.inverse_frequency) <= at.shape[-1]
        if fits and torch.allclose(rope.rotate(at.float(), by), moved.float(), rtol=0, atol=near):
            return rope
    return None
