"""A layer's cache as kernels see it: device tensors and nothing else, so that a CUDA graph replays at other lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from torch import Tensor

PAGE = 32
"""Tokens in a page: one block of cache for one kv head."""


Count = TypeVar("Count", int, np.ndarray)


def settled(length: Count, residual: int, rolling: bool) -> Count:
    """How many of ``length`` slots belong into pages where the newest are kept in a residual of so many tokens, always
    (``rolling``) or until it is full."""
    if residual == 0:
        return length
    found: Count = length - (np.minimum(length, residual) if rolling else length % residual)
    return found


@dataclass(frozen=True)
class Format:
    """How one side's pages are written. Codes are packed in parts (`quantize.pack`); scale and zero are float16.

    ``plain``: fields (x,), x (…, head_dim) in the model's dtype.
    ``token``: fields (codes, scale, zero), each token by itself in groups of ``group`` channels: codes uint8
        (…, head_dim * bits / 8), scale and zero (…, head_dim / group, 1).
    ``channel``: ``group`` tokens together, a scale and a zero per channel: codes uint8 (…, group, head_dim * bits / 8),
        scale and zero (…, 1, head_dim).
    ``fp8``: e4m3 bytes, uint8 (…, head_dim), x ≈ value * ``scale``; if that is None there is a second field,
        float32 (…, 1): one per token.
    """

    kind: Literal["plain", "token", "channel", "fp8"]
    bits: int = 16
    group: int = 0
    scale: float | None = None


@dataclass(frozen=True)
class Side:
    """K or V of one layer, for all rows.

    ``fields``: pools, each (pages, units, …) as `Format` says, PAGE / units tokens to a unit.
    ``residual``: (rows, kv_heads, R, head_dim), slot s at s % R: the newest tokens, in the model's dtype; R may be 0.
    ``rolling``: the last R slots are always there; else those after the last multiple of R.
    """

    format: Format
    fields: tuple[Tensor, ...]
    residual: Tensor
    rolling: bool

    def settled(self, length: int) -> int:
        """How many of ``length`` slots are in pages."""
        return int(settled(length, self.residual.shape[2], self.rolling))


@dataclass(frozen=True)
class Paged:
    """One layer's cache. Slots 0, 1, 2 … of a (row, kv head) lie in its pages, the newest perhaps in the residual.

    ``table``: int32 (rows, kv_heads, pages): where in the pools a (row, head)'s pages are.
    ``used``: int32 (rows, kv_heads): slots in use, given-up ones included. ``live``: those that hold a token.
    ``seen``: int32 (rows, kv_heads): tokens that have passed, the same in every head (each owns its counters).
    ``freed``: int32 (rows, kv_heads): a slot the next token must take, -1 for none.
    ``positions``: int32 (rows, kv_heads, slots), -1 for a given-up slot; None where slot and position are the same.
    ``mass``: float32 (rows, kv_heads, slots): attention mass so far; None where nobody asked.
    """

    k: Side
    v: Side
    table: Tensor
    used: Tensor
    live: Tensor
    seen: Tensor
    freed: Tensor
    positions: Tensor | None = None
    mass: Tensor | None = None
