"""A whole decoding step as a CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvsuite.cache import adapter
from kvsuite.cache.adapter import KVCache
from kvsuite.cache.layer import LayerCache

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records what a step does without doing it: a way to do it again, and the tensor its result will be in."""


class StepGraph:
    """Steps of one token per row. There are two graphs: one in which full residuals are encoded, and one without.

    Token ids, positions, rows and all lengths are tensors that keep their place; a Python number would be frozen into a
    graph and replay silently wrong. What changes on the host (is there room, which pages are taken and given back) is
    counted beside the replay, and page tables are changed in place.
    """

    def __init__(
        self, model: Any, cache: KVCache, caches: Sequence[LayerCache], width: int, capture: Capture | None = None
    ) -> None:
        """``cache`` and its layers ``caches``, of the triton backend, have ``width`` rows. ``capture``: PyTorch's CUDA
        graphs unless given."""
        device = caches[0].layer.device
        self.model, self.cache, self.caches, self.capture = model, cache, caches, capture or cuda_capture
        self.ids = torch.zeros((width, 1), dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.rows = torch.zeros(width, dtype=torch.int32, device=device)
        specs = [store.spec for one in caches for store in (one.kv.k, one.kv.v)]
        self.kinds = {False, any(spec.residual > 0 and not spec.rolling for spec in specs)}
        self.graphs: dict[bool, tuple[Callable[[], None], Tensor]] = {}

    def __call__(self, tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        """The logits (width, vocabulary) after one token more in the rows of the cache's only member; overwritten by
        the next step."""
        rows = self.cache.members[0].rows
        for cache in self.caches:
            cache.advance(rows)
        encodes = any(cache.kv.encodes for cache in self.caches)
        self.ids.copy_(torch.tensor(tokens))
        self.positions.copy_(torch.tensor(positions))
        self.rows.copy_(self.caches[0].kv.items(rows))
        for cache in self.caches:
            cache.kv.bound = tuple(rows), self.rows
        if self.graphs:
            replay, logits = self.graphs[encodes]
            replay()
        else:
            logits = self._first()
        for cache in self.caches:
            cache.settle(rows)
        return logits

    def _first(self) -> Tensor:
        """Run one step, which compiles every kernel (encoding where nothing is full does nothing), then record both."""
        logits = self._forward(max(self.kinds))
        self.graphs = {kind: self.capture(partial(self._forward, kind)) for kind in self.kinds}
        return logits

    def _forward(self, encodes: bool) -> Tensor:
        for cache in self.caches:
            cache.kv.encodes, cache.prepared = encodes, True
        try:
            return self._model()
        finally:
            for cache in self.caches:
                cache.prepared = False

    def _model(self) -> Tensor:
        return adapter.forward(self.model, self.cache, self.ids, position_ids=self.positions)


def cuda_capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record ``step`` as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph.replay, out
