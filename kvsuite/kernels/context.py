"""What the operations on a cache are told: of the model's layer, of what a method keeps, of how it attends."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvsuite.kernels.quantspec import Shape
from kvsuite.kernels.rope import Rope


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
    hidden_size: int = 0
    """Channels of what goes into the layer; 0 where the model's configuration does not say."""
    layers: int = 1
    """Attention layers that the model has."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's uncompressed K and V."""
        return 2 * self.kv_heads * self.head_dim * self.kv_dtype.itemsize


@dataclass(frozen=True)
class Needs:
    """What a method keeps beside K and V."""

    positions: bool = False
    """Tokens may be left out, so each slot's position is kept."""
    evicts: bool = False
    """Tokens are evicted while decoding, too."""
    accumulated_attention: bool = False
    newest_attention: bool = False
    noted: bool = False
    """A number is kept of each token's hidden state."""
    rerotated_sinks: int = 0
    """The first tokens' keys that stand where the cache has them, not where the text has them."""
    recent_queries: int = 0
    """Queries of the newest tokens that are kept."""
    query_centres: int = 0
    """Numbers that are kept of the prompt's queries, per head."""
    parameters: int = 0
    """Whole numbers that each sequence has of its own."""
    summaries: tuple[tuple[Shape, torch.dtype], ...] = ()
    """Shape and dtype of what a reader keeps of each page, field by field."""
    reads_some: bool = False
    """Attention reads the pages that a reader chooses, not all."""


@dataclass(frozen=True)
class AttentionParams:
    """How a model wants its attention; ``sink_logits`` (heads,) join each query's softmax denominator."""

    scale: float
    window: int | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None


@dataclass(frozen=True)
class HeadView:
    """What one kv head holds, in order of position: k, v (n, head_dim) as attention reads them, positions and slots
    (n,)."""

    k: Tensor
    v: Tensor
    positions: Tensor
    slots: Tensor
    exact: bool = True
    """Whether attention reads these very numbers, not the stored codes with roundings of its own."""
    integers: bool = False
    """Attention multiplies codes by queries and weights that are rounded to 16-bit integers."""
    rotated: tuple[bool, bool] = (False, False)
    """Of K and of V: what is rounded was turned by `hadamard` before."""
    rounded: bool = False
    """Attention rounds its scores to the compute dtype."""
