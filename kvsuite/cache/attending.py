"""A transformers cache layer that computes its own attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


class AttendingLayer(CacheLayerMixin):
    """A cache layer that also computes its attention. Positions stay right after eviction because `get_seq_length`
    says how many tokens were seen, not how many are held."""

    is_sliding = False
    wants_hidden = False
    """Whether `hidden` must be set before it attends."""
    hidden: Tensor | None = None
    """(batch, n, hidden size): what the layer's attention was given, before its projections."""
    module: Any = None
    """The attention module that reads it, noted as it does."""

    def attend(self, q: Tensor, scale: float, window: int | None, softcap: float | None, aux: Tensor | None) -> Tensor:
        """q (batch, heads, Q, head_dim) -> the same shape."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: storage is made before the model runs."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys and offset of a mask that is never built."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum of its own."""
        return -1
