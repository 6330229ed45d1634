"""Feeding a model its context once more, to see which tokens it looks back at (KVzip)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvsuite.cache.attending import AttendingLayer
from kvsuite.cache.prefill import PrefilledLayer
from kvsuite.kernels.reference.attention import causal_mask, pack_sinks, probabilities

BLOCK = 64
"""Queries whose weights are held at a time."""


class _ExtraLayer(AttendingLayer):
    """Attends over a prefilled layer and what is fed after it, which is forgotten when the next chunk comes."""

    def __init__(self, seen: PrefilledLayer) -> None:
        super().__init__()
        self.seen = seen
        self.most = torch.zeros(seen.k.shape[:2], device=seen.k.device)
        """float32 (kv_heads, T): the most attention each token got so far."""
        self._kv: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._kv = key_states[0], value_states[0]
        return self, value_states

    def attend(self, q: Tensor, scale: float, window: int | None, softcap: float | None, aux: Tensor | None) -> Tensor:
        assert self._kv is not None
        (k, v), self._kv = self._kv, None
        k, v = torch.cat([self.seen.k, k], dim=1), torch.cat([self.seen.v, v], dim=1)
        heads, count, dim = q.shape[1:]
        kv_heads, context, total = k.shape[0], self.seen.k.shape[1], k.shape[1]
        keys, out = torch.arange(total, device=k.device), torch.empty_like(q[0])
        for first in range(0, count, BLOCK):
            last = min(first + BLOCK, count)
            rows = q[0, :, first:last].reshape(kv_heads, -1, dim)
            mask = causal_mask(keys[context + first : context + last], keys, window).repeat(heads // kv_heads, 1)
            sinks = None if aux is None else pack_sinks(aux, kv_heads, last - first)
            p = probabilities(rows, k, scale, mask, softcap, sinks)
            self.most = torch.maximum(self.most, p[..., :context].amax(1))
            out[:, first:last] = (p @ v.float()).to(q.dtype).view(heads, last - first, dim)
        return out[None]

    def get_seq_length(self) -> int:
        return self.seen.k.shape[1]


class ExtraPassCache(Cache):
    """A prefilled context as a transformers cache that counts what is looked at. Give the model ``position_ids`` from
    T on."""

    def __init__(self, context: Sequence[PrefilledLayer]) -> None:
        super().__init__(layers=[_ExtraLayer(seen) for seen in context])
