"""What a layer's cache must know of its model, and the two things a method gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvsuite.cache.rope import Rope
from kvsuite.kernels.paged import PAGE as PAGE
from kvsuite.kernels.paged import Format

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerContext:
    """One attention layer of a model."""

    index: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    """The compute dtype: of queries, and of K and V as they leave the model and as attention reads them."""
    kv_dtype: torch.dtype
    """The dtype in which uncompressed K and V are stored: the checkpoint's."""
    device: torch.device
    rope: Rope | None = None
    window: int | None = None
    """The model's sliding window, where it has one."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's uncompressed K and V."""
        return 2 * self.kv_heads * self.head_dim * self.kv_dtype.itemsize


class SideCodec(Protocol):
    """How one side (K or V) of a layer is stored. Encodes ``block`` tokens at a time into units of a page.

    The newest ``residual`` tokens stay in the K/V dtype: all of them until the residual is full, when it is encoded
    as a whole (``rolling`` false; KIVI's K), or always, the oldest leaving one by one (``rolling``; KIVI's V).
    """

    @property
    def block(self) -> int:
        """Tokens encoded together; divides a page."""

    @property
    def residual(self) -> int:
        """Tokens that stay in the K/V dtype at most; 0 for none."""

    @property
    def rolling(self) -> bool:
        """Whether the residual is always full once it was."""

    @property
    def format(self) -> Format:
        """How a page is written, for the kernels that read and write it."""

    def fields(self, head_dim: int, dtype: torch.dtype) -> Sequence[tuple[Shape, torch.dtype]]:
        """Shape and dtype of what one unit stores, field by field; ``dtype`` is the K/V dtype."""

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """(heads, units, block, head_dim) -> the fields, each (heads, units, *shape)."""

    def decode(self, fields: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """The fields -> (heads, units, block, head_dim) in ``dtype``; a view where nothing was encoded."""


def stored_dtype(codec: SideCodec, layer: LayerContext) -> torch.dtype:
    """The dtype of the numbers a codec is given: its own where it stores them as they are, else the K/V dtype."""
    if codec.format.kind == "plain":
        return codec.fields(layer.head_dim, layer.kv_dtype)[0][1]
    return layer.kv_dtype


class Evictor(Protocol):
    """What a selector does to one sequence while it is decoded: after every step one token per head beyond the budget
    is given up."""

    @property
    def mass(self) -> bool:
        """Whether it wants each step's attention mass added up per key."""

    @property
    def shift(self) -> int:
        """How many first tokens are re-rotated at every step to their place in the cache; 0 for most selectors."""

    @property
    def budget(self) -> int:
        """Tokens per head that may stay."""

    def victim(self, positions: Tensor, scores: Tensor | None, seen: int | Tensor) -> Tensor:
        """The slot to give up, int64 (..., heads, 1). ``positions`` (..., heads, n) int32, -1 for an empty slot;
        ``scores`` (..., heads, n) float32 is the mass so far; ``seen`` tokens have passed. Where many rows act at once,
        ``seen`` and its own whole-numbered fields are tensors that broadcast to (..., heads, 1)."""
