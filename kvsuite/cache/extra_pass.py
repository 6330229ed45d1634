"""Feeding a model its context once more, to see which tokens it looks back at (KVzip)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvsuite.cache.attending import AttendingLayer
from kvsuite.cache.observations import ExtraPass
from kvsuite.cache.prefill import PrefilledLayer
from kvsuite.errors import UsageError
from kvsuite.kernels.reference.attention import attention, causal_mask, pack_sinks, probabilities

BLOCK = 64
"""Queries whose weights are held at a time."""
REQUEST = "\n\nRepeat the previous context exactly."
CONTINUED = "\n\nRepeat the part of the previous context exactly, starting with"
QUOTED = 8
"""Tokens before a chunk that end the request to go on."""


def repetitions(
    context: Sequence[int], chunk: int, tokens: Callable[[str], list[int]], turn: str
) -> Iterator[tuple[range, list[int]]]:
    """What the model is fed: for each chunk of the context its places, and the token ids of the request to repeat it,
    of what the chat template has before an answer (``turn``), and of the chunk."""
    for first in range(0, len(context), chunk):
        own = range(first, min(first + chunk, len(context)))
        asked = [*tokens(CONTINUED), *context[max(0, first - QUOTED) : first]] if first else tokens(REQUEST)
        yield own, [*asked, *tokens(turn), *context[own.start : own.stop]]


class _ExtraLayer(AttendingLayer):
    """Attends over a prefilled layer and what is fed after it, which is forgotten when the next chunk comes."""

    def __init__(self, seen: PrefilledLayer, what: ExtraPass) -> None:
        super().__init__()
        self.seen, self.what = seen, what
        self.wants_hidden = what.normalized
        self.chunk = range(0)
        """The places of the tokens that are repeated."""
        self.most = torch.zeros(seen.k.shape[:2], device=seen.k.device)
        """float32 (kv_heads, T): what `ExtraPass` says."""
        self._kv: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._kv = key_states[0], value_states[0]
        return self, value_states

    def attend(self, q: Tensor, scale: float, window: int | None, softcap: float | None, aux: Tensor | None) -> Tensor:
        assert self._kv is not None
        (fed, v), self._kv = self._kv, None
        k, v = torch.cat([self.seen.k, fed], dim=1), torch.cat([self.seen.v, v], dim=1)
        (heads, count, dim), (kv_heads, total) = q.shape[1:], k.shape[:2]
        group, places, out = heads // kv_heads, torch.arange(total, device=k.device), torch.empty_like(q[0])
        first, last = self.chunk.start, self.chunk.stop
        sinks = min(self.what.sinks, first)
        compared = torch.cat([k[:, :sinks], k[:, first:last], fed], dim=1)
        weighed = self._weights(group) if self.what.normalized else None
        for begin in range(0, count, BLOCK):
            end = min(begin + BLOCK, count)
            rows = q[0, :, begin:end].reshape(kv_heads, -1, dim)
            logits = None if aux is None else pack_sinks(aux, kv_heads, end - begin)
            own = places[total - count + begin : total - count + end]
            out[:, begin:end] = attention(
                rows, k, v, scale, causal_mask(own, places, window).repeat(group, 1), softcap, logits
            ).view(heads, end - begin, dim)
            mask = causal_mask(own, places[total - count :]).repeat(group, 1)
            p = probabilities(rows, compared, scale, mask, softcap, logits)[..., sinks : sinks + last - first]
            if weighed is not None:
                p = p.reshape(kv_heads, group, end - begin, -1) / weighed[0][begin:end, None] * weighed[1][:, :, None]
                p = p.flatten(1, 2)
            self.most[:, first:last] = torch.maximum(self.most[:, first:last], p.amax(1))
        return out[None]

    def _weights(self, group: int) -> tuple[Tensor, Tensor]:
        """The norms of what is fed, float32 (n,), and of what each query head's values of the chunk write, float32
        (kv_heads, group, chunk)."""
        assert self.hidden is not None
        projection = getattr(self.module, "o_proj", None) or getattr(self.module, "dense", None)  # Phi's name
        if projection is None:
            raise UsageError(f"{type(self.module).__name__} has no output projection that kvzip-plus knows")
        values = self.seen.v[:, self.chunk.start : self.chunk.stop].float().repeat_interleave(group, 0)
        by_head = (
            projection.weight.float().view(-1, len(values), values.shape[2]).unbind(1)
        )  # (hidden size, head_dim) each
        written = torch.stack([(x @ w.T).norm(dim=-1) for x, w in zip(values, by_head, strict=True)])
        return self.hidden[0].float().norm(dim=-1), written.view(-1, group, written.shape[1])

    def get_seq_length(self) -> int:
        return self.seen.k.shape[1]


class ExtraPassCache(Cache):
    """A prefilled context as a transformers cache that notes what is looked at. Give the model ``position_ids`` from T
    on, and say with `repeats` which chunk is fed."""

    def __init__(self, context: Sequence[PrefilledLayer], what: ExtraPass) -> None:
        super().__init__(layers=[_ExtraLayer(seen, what) for seen in context])

    def repeats(self, chunk: range) -> None:
        """The tokens at these places are fed next."""
        for layer in self.layers:
            layer.chunk = chunk
