"""What is stored of K or V: a page's layout, and the codes that a backend must write into it and read back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # codecs are listed without importing torch
    import numpy as np
    import torch
    from torch import Tensor

PAGE = 32
"""Tokens in a page: one block of cache for one kv head."""

Shape = tuple[int, ...]
Count = TypeVar("Count", int, "np.ndarray")


TURNED = ("token", "levels", "symmetric", "e2m1")
"""Layouts of which kernels know how to undo a rotation."""


class QuantSpec:
    """How K or V of one layer is stored. ``block`` tokens are encoded together, in units of a page.

    ``encode`` and ``decode`` define the codes; the reference backend calls them. A backend with kernels of its own
    knows a specification by ``layout`` and its numbers, and must write the same bits:

    ``plain``: fields (x,), x (…, head_dim) as it is.
    ``token``: fields (codes, scale, zero); each token by itself in groups of ``group`` channels: codes uint8
        (…, head_dim * bits / 8), scale and zero float16 (…, head_dim / group, 1).
    ``channel``: ``group`` tokens together, a scale and a zero per channel: codes uint8 (…, group, head_dim * bits / 8),
        scale and zero float16 (…, 1, head_dim).
    ``fp8``: e4m3 bytes, uint8 (…, head_dim), x ≈ value * ``scale``; where that is None a second field, float32 (…, 1),
        has one per token.
    ``levels``: fields (codes, scale); each token by itself, turned by ``rotation``: codes of the Lloyd-Max levels of
        N(0, 1), uint8 (…, head_dim * bits / 8), and scale, float16 (…, 1).
    ``symmetric``: fields (codes, scale); each token by itself in groups of ``group`` channels: codes int8 (…,
        head_dim), scale float16 (…, head_dim / group, 1), x ≈ code * scale.
    ``e2m1``: fields (codes, scale); each token by itself in groups of ``group`` channels: E2M1 codes, uint8 (…,
        head_dim / 2), and scale, e4m3 bytes (…, head_dim / group), x ≈ number * scale * the fixed ``scale``. A group's
        largest number is 6, or where ``chooses`` 4 or 6.
    ``""``: any other; read and written by the reference alone.
    """

    layout: str = ""
    bits: int = 16
    group: int = 0
    scale: float | None = None
    chooses: bool = False
    block: int = 1
    """Tokens encoded together; divides a page."""
    residual: int = 0
    """The newest tokens, at most so many, stay in the K/V dtype: until ``residual`` of them are encoded as a whole
    (KIVI's K), or always, the oldest leaving one by one (``rolling``; KIVI's V)."""
    rolling: bool = False
    late: bool = False
    """What is encoded as a whole is so only when the next token comes: who completes it still reads it in full."""
    last_queries: int = 0
    """The newest queries of a prompt that `fit` wants to see; its codec observes `LastQueries` of so many."""
    rotation: str = ""
    """An orthonormal rotation of head_dim that is applied before encoding and undone by ``decode``. A backend with a
    kernel for it may rotate q (for K) and the output (for V) instead, as those in C++ and Triton do."""

    def before(self, x: Tensor) -> Tensor:
        """Of ``encode`` of one token each: x (n, units, 1, head_dim) to what its codes are of, (n, units, head_dim)
        float32."""
        from kvsuite.kernels.hadamard import hadamard

        return hadamard(x[:, :, 0]) if self.rotation else x[:, :, 0].float()

    def after(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Of ``decode``: what codes say, (n, units, head_dim) float32, to (n, units, 1, head_dim) in ``dtype``."""
        from kvsuite.kernels.hadamard import hadamard

        return (hadamard(x) if self.rotation else x).to(dtype).unsqueeze(2)

    @property
    def verbatim(self) -> bool:
        """Whether the numbers that are stored are the very numbers that came."""
        return False

    def fields(self, head_dim: int, kv_dtype: torch.dtype) -> Sequence[tuple[Shape, torch.dtype]]:
        """Shape and dtype of what one unit stores, field by field."""
        raise NotImplementedError

    def fitted(self, head_dim: int, kv_dtype: torch.dtype) -> Sequence[tuple[Shape, torch.dtype]]:
        """Shape and dtype of what ``fit`` gives per kv head, field by field."""
        return ()

    def fit(self, x: Tensor, queries: Tensor | None) -> tuple[Tensor, ...]:
        """What encoding needs to know of one sequence: x (kv_heads, T, head_dim), a prompt's K or V before eviction,
        and its ``last_queries`` (heads, n, head_dim), where they are wanted, to tensors (kv_heads, *shape), which are
        stored beside the pages and given to ``encode`` and ``decode``."""
        return ()

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(n, units, block, head_dim) -> the fields, each (n, units, *shape); ``fitted`` is (n, *shape)."""
        raise NotImplementedError

    def decode(self, fields: tuple[Tensor, ...], dtype: torch.dtype, fitted: tuple[Tensor, ...]) -> Tensor:
        """The fields -> (n, units, block, head_dim) in ``dtype``; a view where nothing was encoded."""
        raise NotImplementedError

    def num_encoded(self, length: Count) -> Count:
        """How many of ``length`` slots are in pages; the rest is in the residual, slot s at s % residual."""
        if self.residual == 0:
            return length
        if self.rolling:
            kept: Count = (length > self.residual) * (length - self.residual)
        else:
            complete = length - (length > 0) if self.late else length
            kept = complete - complete % self.residual
        return kept

    def stored_dtype(self, head_dim: int, kv_dtype: torch.dtype) -> torch.dtype:
        """The dtype of the numbers that are encoded: its own where it stores them as they are, else the K/V dtype."""
        return self.fields(head_dim, kv_dtype)[0][1] if self.layout == "plain" else kv_dtype
