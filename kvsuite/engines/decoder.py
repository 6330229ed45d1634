"""Ragged batched decoding of one method at a fixed width."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvsuite.cache import adapter
from kvsuite.cache.adapter import KVCache
from kvsuite.cache.context import LayerContext
from kvsuite.cache.fused import FusedCache
from kvsuite.cache.prefill import Observation
from kvsuite.engines.graph import StepGraph
from kvsuite.engines.request import Request, Response
from kvsuite.engines.sampling import Sampling
from kvsuite.methods import Method


@dataclass(frozen=True)
class Prompt:
    """A prefilled prompt, ready to be compressed by any number of methods."""

    request: Request
    context: list[Observation]
    suffix: list[int]
    logits: Tensor
    """(vocabulary,) after the context; the first token's if there is no suffix."""
    seconds: float
    observing_seconds: float


@dataclass
class _Sequence:
    request: Request
    response: Response
    position: int = 0
    """Of the token to be fed next."""


class Decoder:
    """``width`` rows, each with a sequence or idle; a step feeds one token to every row. Idle rows take part in the
    matrix products (whose rounding depends on the width) and hold nothing."""

    def __init__(
        self,
        model: Any,
        method: Method,
        layers: list[LayerContext],
        width: int,
        capacity: int,
        sampling: Sampling,
        stop: frozenset[int],
    ) -> None:
        self.model, self.method, self.sampling, self.stop = model, method, sampling, stop
        self.rows: list[_Sequence | None] = [None] * padded_width(width)
        self.width = width
        self.caches = [method.cache(layer, len(self.rows), capacity) for layer in layers]
        self.cache = KVCache(self.caches)
        fused = [cache for cache in self.caches if isinstance(cache, FusedCache)]
        self.graph: StepGraph | None = None
        if len(fused) == len(self.caches) and fused[0].layer.device.type == "cuda":
            self.graph = StepGraph(model, self.cache, fused, len(self.rows))

    @property
    def full(self) -> bool:
        """Whether all ``width`` rows are taken."""
        return self.active >= self.width

    @property
    def active(self) -> int:
        """Rows with a sequence."""
        return sum(s is not None for s in self.rows)

    @property
    def provenance(self) -> str:
        """The class that stores and attends, with its module."""
        kind = type(self.caches[0])
        return f"{kind.__module__}.{kind.__qualname__}"

    @property
    def path(self) -> str:
        """The codec, and what stores and attends."""
        return f"{self.method.codec.name}/{self.caches[0].path}"

    @property
    def nbytes(self) -> int:
        """Bytes all sequences hold, all layers."""
        return sum(cache.nbytes for cache in self.caches)

    def admit(self, prompt: Prompt) -> Iterator[Response]:
        """Compress a prompt into a free row and choose its first token. Yields its answer if that was the last."""
        row = self.rows.index(None)
        start = time.perf_counter()
        self.method.compress(row, prompt.context, self.caches)
        logits = self._feed_suffix(row, prompt) if prompt.suffix else prompt.logits
        _wait(logits)
        length = prompt.context[0].k.shape[1]
        response = Response(
            id=prompt.request.id,
            method=self.method.name,
            prompt_tokens=length + len(prompt.suffix),
            context_tokens=length,
            nbytes=sum(cache.row_nbytes(row) for cache in self.caches),
            kept=sum(cache.kept(row) for cache in self.caches),
            repeat=self.sampling.repeat,
            cache=self.provenance,
            path=self.path,
        )
        shared = prompt.seconds - (0.0 if self.method.needs else prompt.observing_seconds)
        response.prefill_seconds = shared + time.perf_counter() - start
        self.rows[row] = _Sequence(prompt.request, response, response.prompt_tokens)
        yield from self._take(row, logits, logits.topk(2).values.tolist(), int(logits.argmax()))

    def step(self) -> Iterator[Response]:
        """One token for every row. Yields the answers that end with it."""
        start = time.perf_counter()
        active = [(row, s) for row, s in enumerate(self.rows) if s is not None]
        fed = [0 if s is None else s.response.tokens[-1] for s in self.rows]
        at = [0 if s is None else s.position for s in self.rows]
        self.cache.rows = tuple(None if s is None else row for row, s in enumerate(self.rows))
        logits = self._logits([[token] for token in fed], [[position] for position in at])
        _wait(logits)
        seconds = time.perf_counter() - start
        best = logits.topk(2).values.tolist()
        greedy = logits.argmax(-1).tolist()
        for row, sequence in active:
            sequence.position += 1
            sequence.response.decode_seconds += seconds
            sequence.response.decode_share += seconds / len(active)
            yield from self._take(row, logits[row], best[row], greedy[row])

    def _feed_suffix(self, row: int, prompt: Prompt) -> Tensor:
        """The suffix through the compressed cache, by itself: what it sees does not depend on mates."""
        self.cache.rows = (row,)
        first = prompt.context[0].k.shape[1]
        return self._forward([prompt.suffix], [list(range(first, first + len(prompt.suffix)))])[0]

    def _logits(self, tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        """One step of all rows, as a graph where there is one; a witness looks at the cache between two kernels."""
        if self.graph is None or self.cache.witness is not None:
            return self._forward(tokens, positions)
        return self.graph(tokens, positions)

    def _forward(self, tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        device = self.model.device
        ids, at = (torch.tensor(x, device=device) for x in (tokens, positions))
        return adapter.forward(self.model, self.cache, ids, position_ids=at)

    def _take(self, row: int, logits: Tensor, best: list[float], greedy: int) -> Iterator[Response]:
        """Choose a row's next token; yield its answer and free the row if it ends here."""
        sequence = self.rows[row]
        assert sequence is not None
        response = sequence.response
        if not all(map(math.isfinite, best)):
            response.finish, response.error = "error", "logits are not finite"
        else:
            token = greedy
            if self.sampling.temperature > 0:
                token = self.sampling.pick(logits, response.id, len(response.tokens))
            response.tokens.append(token)
            response.margins.append(best[0] - best[1])
            if token in self.stop:
                response.finish = "stop"
            elif len(response.tokens) < sequence.request.max_new_tokens:
                return
        response.nbytes_end = sum(cache.row_nbytes(row) for cache in self.caches)
        response.dense_end = sum(cache.seen(row) * cache.layer.token_bytes for cache in self.caches)
        self.rows[row] = None
        for cache in self.caches:
            cache.reset(row)
        yield response


def padded_width(width: int) -> int:
    """Rows that really run: the next power of two. At others a matrix product may split its rows unevenly over the
    threads and round them differently by place (seen with float32, 5 rows, 2 threads)."""
    return 1 << (width - 1).bit_length()


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()
