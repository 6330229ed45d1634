"""Ragged batched decoding at a fixed width, of one method or several together."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kvsuite.cache import adapter
from kvsuite.cache.adapter import KVCache
from kvsuite.engines import ranks
from kvsuite.engines.graph import StepGraph
from kvsuite.engines.request import Response
from kvsuite.engines.worker import MethodWorker, Prompt


class Decoder:
    """A step feeds one token to every sequence of all workers. The matrix products always have ``width`` rows, since
    their rounding depends on it; attention is computed row by row, by each worker's own caches. So an answer depends
    on its prompt, its method and the width, never on its mates."""

    def __init__(
        self, model: Any, workers: Sequence[MethodWorker], width: int, stop: frozenset[int] = frozenset()
    ) -> None:
        """``width``: most sequences at a time, padded to a power of two. ``stop``: token ids that end an answer."""
        self.model, self.workers, self.stop = model, workers, stop
        self.width = padded_width(width)
        self.cache = KVCache(*(worker.member for worker in workers))
        self.logits = torch.empty(0)
        """(width, vocabulary), of the last step."""
        self.graph: StepGraph | None = None
        alone = len(workers) == ranks.size() == 1  # that a graph can hold the exchanges of ranks has not been tried
        if alone and workers[0].backend == "triton" and model.device.type == "cuda":
            self.graph = StepGraph(model, self.cache, workers[0].caches, self.width)

    @property
    def active(self) -> int:
        """Sequences that are being decoded."""
        return sum(len(worker.active) for worker in self.workers)

    def room(self, worker: MethodWorker) -> bool:
        """Whether a worker can take one sequence more."""
        return not worker.full and self.active < self.width

    def admit(self, worker: MethodWorker, prompt: Prompt) -> Iterator[Response]:
        """Compress a prompt into a worker's free row. Yields its answer if its first token was the last.

        A suffix is fed by itself, all at once. Caches that evict take it token by token: there it is fed with the
        batch's next steps, one token each, before the answer begins.
        """
        row = worker.compress(prompt)
        sequence = worker.sequences[row]
        assert sequence is not None
        sequence.response.width = self.width
        if prompt.suffix and worker.stepwise:
            sequence.forced = list(prompt.suffix)
            return
        logits = prompt.logits
        if prompt.suffix:
            start = time.perf_counter()
            logits = self._feed_suffix(worker, row, prompt)
            _wait(logits)
            worker.spend(row, time.perf_counter() - start, prefilling=True)
            sequence.position += len(prompt.suffix)
        worker.measure(row)
        yield from self._take(worker, row, logits, logits.topk(2).values.tolist(), int(logits.argmax()))

    def step(self) -> Iterator[Response]:
        """One token for every sequence. Yields the answers that end with it, and those of a worker that failed."""
        start = time.perf_counter()
        before = [worker.member.seconds for worker in self.workers]
        items = self._lay_out()
        fed = [[0 if s is None else (s.forced or s.response.tokens[-1:])[0]] for _, _, s in items]
        self.logits = logits = self._logits(fed, [[0 if s is None else s.position] for _, _, s in items])
        _wait(logits)
        self._book(time.perf_counter() - start, before)
        best, greedy = logits.topk(2).values.tolist(), logits.argmax(-1).tolist()
        for at, (worker, row, sequence) in enumerate(items):
            if sequence is None or worker is None or worker.member.error is not None:
                continue
            sequence.position += 1
            if sequence.forced:
                sequence.forced.pop(0)
                if sequence.forced:
                    continue
                worker.measure(row)
            yield from self._take(worker, row, logits[at], best[at], greedy[at])
        for worker in self.workers:
            if worker.member.error is not None and not worker.failure:
                yield from worker.fail(worker.member.error)

    def _lay_out(self) -> list[tuple[MethodWorker | None, int, Any]]:
        """The batch's items: worker, row and sequence (None where idle). A graph finds each row at its own place;
        elsewhere sequences stand together, worker by worker."""
        items: list[tuple[MethodWorker | None, int, Any]] = []
        for worker in self.workers:
            found = list(enumerate(worker.sequences)) if self.graph is not None else worker.active
            worker.member.rows = tuple(row if sequence is not None else None for row, sequence in found)
            items += [(worker, row, sequence) for row, sequence in found]
        idle = self.width - len(items)
        if len(self.workers) == 1:
            self.workers[0].member.rows += (None,) * idle
        return items + [(None, 0, None)] * idle

    def _book(self, seconds: float, before: list[float]) -> None:
        """Share a step's seconds out: a worker's attention to its own sequences, the rest to all alike."""
        own = [worker.member.seconds - b for worker, b in zip(self.workers, before, strict=True)]
        common = (seconds - sum(own)) / max(1, self.active)
        for worker, attending in zip(self.workers, own, strict=True):
            active = worker.active
            for row, sequence in active:
                worker.spend(row, common + attending / len(active), prefilling=bool(sequence.forced))
                sequence.response.decode_seconds += 0.0 if sequence.forced else seconds

    def _feed_suffix(self, worker: MethodWorker, row: int, prompt: Prompt) -> Tensor:
        """The suffix through the compressed cache, by itself: what it sees does not depend on mates."""
        for other in self.workers:
            other.member.rows = (row,) if other is worker else ()
        first = prompt.context[0].k.shape[1]
        logits = self._forward([prompt.suffix], [list(range(first, first + len(prompt.suffix)))])[0]
        if worker.member.error is not None:
            raise worker.member.error
        return logits

    def _logits(self, tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        """One step of all rows, as a graph where there is one; a checker looks at the cache between two kernels."""
        if self.graph is None or self.workers[0].member.checker is not None:
            return self._forward(tokens, positions)
        return self.graph(tokens, positions)

    def _forward(self, tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        device = self.model.device
        ids, at = (torch.tensor(x, device=device) for x in (tokens, positions))
        return adapter.forward(self.model, self.cache, ids, position_ids=at)

    def _take(
        self, worker: MethodWorker, row: int, logits: Tensor, best: list[float], greedy: int
    ) -> Iterator[Response]:
        """Choose a row's next token; yield its answer and free the row if it ends here."""
        sequence = worker.sequences[row]
        assert sequence is not None
        response = sequence.response
        if not all(map(math.isfinite, best)):
            response.finish, response.error = "error", "logits are not finite"
        else:
            token = greedy
            if worker.sampling.temperature > 0:
                token = worker.sampling.pick(logits, response.id, len(response.tokens))
            response.tokens.append(token)
            response.margins.append(best[0] - best[1])
            if token in self.stop:
                response.finish = "stop"
            elif len(response.tokens) < sequence.request.max_new_tokens:
                return
        yield worker.release(row)


def padded_width(width: int) -> int:
    """Rows that really run: the next power of two. At others a matrix product may split its rows unevenly over the
    threads and round them differently by place (seen with float32, 5 rows, 2 threads)."""
    return 1 << (width - 1).bit_length()


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()
