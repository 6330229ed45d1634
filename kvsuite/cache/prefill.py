"""Prefilling a context once, in full precision, for all methods of a run: K, V and what the methods asked to see."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvsuite.cache.attending import AttendingLayer
from kvsuite.cache.observations import (
    AttentionMass,
    ChunkAttention,
    ExtraPass,
    HiddenStates,
    LastQueries,
    Observation,
    PreRopeMoments,
    QueryCentres,
)
from kvsuite.errors import UsageError
from kvsuite.kernels import dense
from kvsuite.kernels.backends import for_prefill
from kvsuite.kernels.context import AttentionParams, LayerContext
from kvsuite.kernels.reference.attention import causal_self_attention
from kvsuite.kernels.rope import Rope
from kvsuite.modes import PAGED


@dataclass(frozen=True)
class PrefilledLayer:
    """One layer of a prefilled context: k, v (kv_heads, T, head_dim) as the model made them, and what was asked for."""

    layer: int
    k: Tensor
    v: Tensor
    observed: dict[Observation, Any] = field(default_factory=dict)
    params: AttentionParams = field(default_factory=lambda: AttentionParams(1.0))
    """How the model attends in this layer."""
    rope: Rope | None = None
    """How it rotates queries and keys, where kvsuite can do the same."""

    @property
    def k_before_rope(self) -> Tensor:
        """k as it was before RoPE: float32 (kv_heads, T, head_dim). Raises UsageError where the rotation is not
        known."""
        if self.rope is None:
            raise UsageError(f"layer {self.layer} rotates its keys in a way that kvsuite cannot undo")
        back = -torch.arange(self.k.shape[1], device=self.k.device)[:, None]
        return self.rope.rotate(self.k.float(), back) / self.rope.scaling

    def __getitem__(self, observation: Observation) -> Any:
        """What was observed; see the observation's own docstring. Raises what the notes of hidden states raised."""
        found = self.observed[observation]
        if isinstance(found, Exception):
            raise found
        return found


class _PrefillLayer(AttendingLayer):
    def __init__(self, layer: LayerContext, asked: Sequence[Observation], backend: str, mode: str) -> None:
        super().__init__()
        self.layer, self.asked, self.backend, self.mode = layer, asked, backend, mode
        self._weights: Tensor | None = None
        """(heads, T, T), while it is being observed and where the mode tells them."""
        self.seen: PrefilledLayer | None = None
        self.wants_hidden = any(isinstance(what, HiddenStates) for what in asked)
        self.seconds = dict.fromkeys(asked, 0.0)
        """Spent on each observation."""
        self._kv: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.seen is not None or key_states.shape[0] != 1:
            raise ValueError("a context is prefilled once, as one sequence")
        self._kv = key_states[0], value_states[0]
        return self, value_states

    def attend(self, q: Tensor, scale: float, window: int | None, softcap: float | None, aux: Tensor | None) -> Tensor:
        assert self._kv is not None
        (k, v), self._kv = self._kv, None
        params, observed = AttentionParams(scale, window, softcap, aux), dict[Observation, Any]()
        if self.mode != PAGED:
            out, self._weights = dense.self_attention(self.mode, q[0], k, v, params)
        else:
            out = causal_self_attention(q[0], k, v, scale, window, softcap, aux)
        for observation in self.asked:
            if isinstance(observation, ExtraPass):
                continue  # comes after this pass
            _wait(out)  # what was queued before is not the observation's
            start = time.perf_counter()
            observed[observation] = self._observe(observation, q[0], k, params)
            _wait(out)
            self.seconds[observation] += time.perf_counter() - start
        self._weights = self.hidden = None  # of all layers at once they would take more than K and V
        self.seen = PrefilledLayer(self.layer.index, k, v, observed, params, self.layer.rope)
        return out[None]

    def get_seq_length(self) -> int:
        return 0 if self.seen is None else self.seen.k.shape[1]

    def _observe(self, what: Observation, q: Tensor, k: Tensor, params: AttentionParams) -> Any:
        """q (heads, T, head_dim), k (kv_heads, T, head_dim)."""
        if isinstance(what, AttentionMass):
            if self._weights is not None:
                return self._weights.sum(1, dtype=torch.float32).view(len(k), -1, k.shape[1]).mean(1)
            backend = for_prefill(q.device.type, self.backend)
            return backend.column_mass(q, k, params.scale, params.window, params.softcap, params.sink_logits)
        if isinstance(what, LastQueries):
            return q[:, -what.window :].clone()  # a view would keep all of them
        if isinstance(what, HiddenStates):
            assert self.hidden is not None
            try:
                return what.notes.note(self.hidden[0], self.layer.index).float()
            except Exception as error:  # of a method: it costs those that look, not all whose prompt this is
                return error
        if isinstance(what, PreRopeMoments):
            return pre_rope_moments(q, self.layer, what.skip)
        if isinstance(what, QueryCentres):
            return query_centres(q, self.layer)
        if isinstance(what, ChunkAttention):
            inner = slice(what.first, q.shape[1] - what.last)
            return chunk_attention(q[:, inner], k[:, inner], what.chunk)
        raise UsageError(f"nobody can observe {what}")


class PrefillCache(Cache):
    """Collects one context's K, V and observations while the model runs over it once."""

    def __init__(
        self,
        layers: Sequence[LayerContext],
        asked: Iterable[Observation] = (),
        backend: str = "auto",
        mode: str = PAGED,
    ) -> None:
        """``backend``: who observes, where more than one can. ``mode``: how the prompt attends, of
        `kvsuite.modes`."""
        self.asked = list(dict.fromkeys(asked))
        super().__init__(layers=[_PrefillLayer(layer, self.asked, backend, mode) for layer in layers])

    @property
    def prefilled(self) -> list[PrefilledLayer]:
        """Layer by layer, after the model has run."""
        return [layer.seen for layer in self.layers]

    @property
    def seconds(self) -> dict[Observation, float]:
        """What each observation cost, which only the methods that asked for it should pay."""
        costs = [layer.seconds for layer in self.layers]
        return {observation: sum(cost[observation] for cost in costs) for observation in costs[0]}

    def add(self, observation: Observation, values: Sequence[Any], seconds: float) -> None:
        """What was observed after the run, layer by layer, and the time it took."""
        for layer, value in zip(self.layers, values, strict=True):
            layer.seen.observed[observation] = value
            layer.seconds[observation] = seconds / len(values)


def pre_rope_moments(q: Tensor, layer: LayerContext, skip: int = 0) -> tuple[Tensor, Tensor]:
    """Mean (heads, head_dim) and covariance (heads, head_dim, head_dim), float32, of a prompt's queries before RoPE:
    q (heads, T, head_dim) as attention uses them, but for the first ``skip`` (never all). Raises UsageError where the
    layer's RoPE is not known."""
    heads, length, dim = q.shape
    total, square = q.new_zeros(heads, dim, dtype=torch.float64), q.new_zeros(heads, dim, dim, dtype=torch.float64)
    origin, skip = q.new_zeros(heads, 1, dim, dtype=torch.float32), min(skip, length - 1)
    for at, part in enumerate(_before_rope(q, _known(layer), skip)):
        if at == 0:
            origin = part.mean(1, keepdim=True)
        part = part - origin  # squares of what is far from zero would cancel in float32
        total += part.sum(1)
        square += part.transpose(1, 2) @ part
    mean = total / (length - skip)
    return (mean + origin[:, 0]).float(), (square / (length - skip) - mean[:, :, None] * mean[:, None]).float()


def query_centres(q: Tensor, layer: LayerContext) -> Tensor:
    """What `QueryCentres` says: q (heads, T, head_dim) as attention uses them. Raises UsageError where the layer's RoPE
    is not known."""
    rope = _known(layer)
    sums = [
        torch.cat([part.double().sum(1), rope.pairs(part).norm(dim=-1).double().sum(1)], -1)
        for part in _before_rope(q, rope)
    ]
    return (torch.stack(sums).sum(0) / q.shape[1]).float()


def _known(layer: LayerContext) -> Rope:
    if layer.rope is None:
        raise UsageError(f"layer {layer.index} rotates its queries in a way that kvsuite cannot undo")
    return layer.rope


def _before_rope(q: Tensor, rope: Rope, skip: int = 0, block: int = 1024) -> Iterator[Tensor]:
    """A prompt's queries before RoPE, but for the first ``skip``, float32 (heads, n, head_dim) at a time."""
    for first in range(skip, q.shape[1], block):
        part = q[:, first : first + block].float()
        back = torch.arange(-first, -first - part.shape[1], -1, device=q.device)[:, None]
        yield rope.rotate(part, back) / rope.scaling


def chunk_attention(q: Tensor, k: Tensor, chunk: int) -> Tensor:
    """What `ChunkAttention` says: q (heads, T, head_dim), k (kv_heads, T, head_dim) to float32 (kv_heads, T)."""
    kv_heads, length, dim = k.shape
    parts = [k.new_zeros(kv_heads, 0, dtype=torch.float32)]
    for first in range(0, length, chunk):
        keys = k[:, first : first + chunk].float()
        queries = q[:, first : first + chunk].float().reshape(kv_heads, -1, dim)
        parts.append((queries @ keys.transpose(1, 2)).softmax(-1).sum(1))
    return torch.cat(parts, 1) / (q.shape[0] // kv_heads)


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()
