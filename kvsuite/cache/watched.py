"""Seeing what a model's layers do: how many heads they have, over which window they attend, what they do to keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache

from kvsuite.cache.attending import AttendingLayer


@dataclass(frozen=True)
class AttentionLayer:
    """What one layer of a model was seen to do."""

    module: Any
    """Its attention module."""
    heads: int
    window: int | None
    k: Tensor
    """(2, kv_heads, head_dim): the keys of one hidden state at two positions."""


class _WatchedLayer(AttendingLayer):
    """Takes two sequences of one token. Each reads its own value alone, and the second one is given what the first one
    reads, so that the same hidden states come out for both."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: AttentionLayer | None = None
        self._kv: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.seen is not None:
            raise ValueError("a layer hands over its keys twice")
        self._kv = key_states, value_states
        return self, value_states

    def attend(self, q: Tensor, scale: float, window: int | None, softcap: float | None, aux: Tensor | None) -> Tensor:
        if self._kv is None:
            raise ValueError("a layer attends " + ("to another one's keys" if self.seen is None else "twice"))
        (k, v), self._kv = self._kv, None
        heads, kv_heads, dim = q.shape[1], k.shape[1], k.shape[3]
        if k.shape != v.shape or q.shape[3] != dim or heads % kv_heads:
            sizes = " × ".join(map(str, k.shape[1::2])), " × ".join(map(str, v.shape[1::2]))
            raise ValueError(f"a layer's keys are {sizes[0]} (heads × channels), its values {sizes[1]}")
        self.seen = AttentionLayer(self.module, heads, window, k[:, :, 0])
        return v[:1].repeat_interleave(heads // kv_heads, 1).expand_as(q)

    def get_seq_length(self) -> int:
        return 0


class WatchedCache(Cache):
    """A cache that takes one pass over two sequences of one token."""

    layer = _WatchedLayer

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=self.layer)

    @property
    def seen(self) -> list[AttentionLayer | None]:
        """Layer by layer, after the pass; None for one that has handed over no keys or attended over none."""
        return [layer.seen if isinstance(layer, _WatchedLayer) else None for layer in self.layers]
