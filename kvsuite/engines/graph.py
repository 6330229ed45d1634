"""A whole decoding step as a CUDA graph: one launch instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvsuite.cache import adapter
from kvsuite.cache.adapter import KVCache
from kvsuite.cache.fused import FusedCache, row_tensor

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Records what a step does without doing it: a way to do it again, and the tensor its result will be in."""


class StepGraph:
    """Steps of one token per row. There are two graphs: one in which full residuals are encoded, and one without.

    Token ids, positions, rows and all lengths are tensors that keep their place; a Python number would be frozen into a
    graph and replay silently wrong. What changes on the host (is there room, bytes held) is counted beside the replay.
    """

    def __init__(
        self, model: Any, cache: KVCache, caches: Sequence[FusedCache], width: int, capture: Capture | None = None
    ) -> None:
        """``cache`` and its layers ``caches`` have ``width`` rows. ``capture``: PyTorch's CUDA graphs unless given."""
        device = caches[0].layer.device
        self.model, self.cache, self.caches, self.capture = model, cache, caches, capture or cuda_capture
        self.ids = torch.zeros((width, 1), dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.rows = torch.zeros(width, dtype=torch.int32, device=device)
        sides = [side.codec for one in caches for side in (one.k, one.v)]
        self.kinds = {False, any(codec.residual and not codec.rolling for codec in sides)}
        self.graphs: dict[bool, tuple[Callable[[], None], Tensor]] = {}

    def __call__(self, tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        """The logits (width, vocabulary) after one token more in the rows of the cache's only member; overwritten by
        the next step."""
        rows = self.cache.members[0].rows
        due = [cache.advance(rows) for cache in self.caches]
        encodes = any(due)
        self.ids.copy_(torch.tensor(tokens))
        self.positions.copy_(torch.tensor(positions))
        self.rows.copy_(row_tensor(rows, torch.device("cpu")))
        for cache in self.caches:
            cache.bind(rows, self.rows)
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
            cache.flushes, cache.replaying = encodes, True
        try:
            return self._model()
        finally:
            for cache in self.caches:
                cache.replaying = False

    def _model(self) -> Tensor:
        return adapter.forward(self.model, self.cache, self.ids, position_ids=self.positions)


def cuda_capture(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record ``step`` as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph.replay, out
