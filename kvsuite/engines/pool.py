"""The decoders of all methods of a run: who takes a prompt when, and who is too late."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from kvsuite.engines.decoder import Decoder
from kvsuite.engines.request import Request, Response, step_rows
from kvsuite.engines.sampling import Sampling
from kvsuite.engines.worker import MethodWorker, Prompt, failed, say
from kvsuite.methods import Method

if TYPE_CHECKING:
    from kvsuite.engines.transformers import TransformersEngine

PATIENCE = 10
"""How many times as long as the baseline a method or a cell may take before its timeout begins to count."""


class DecoderPool:
    """Hands each prefilled prompt to all methods, decoding until there is room. The first method is the baseline."""

    def __init__(
        self,
        engine: TransformersEngine,
        methods: Sequence[Method],
        asked: Sequence[tuple[Request, Sequence[int], Sequence[int]]],
        width: int,
        sampling: Sampling,
        again: Mapping[str, Sampling],
        timeout: float,
        memory: float,
        done: Mapping[tuple[str, str], float],
    ) -> None:
        """``asked``: requests with their context's and suffix's tokens; ``width``: rows of each arm; ``timeout`` in
        seconds, ``memory`` in bytes, ``again`` and ``done`` as `TransformersEngine.generate` takes them."""
        self.timeout = timeout
        self.arms = {m.name: (m, sampling) for m in methods} | {name: (methods[0], own) for name, own in again.items()}
        """By name, the baseline first."""
        self.memory = memory if engine.model.device.type == "cpu" else float("inf")  # a GPU's caches are all reserved
        self.workers: dict[str, MethodWorker | str] = {}
        """Each arm's worker, or why there is none."""
        for name, (method, own) in self.arms.items():
            lengths = [(len(c), len(s) + r.max_new_tokens) for r, c, s in asked]
            try:
                self.workers[name] = engine.worker(method, width, lengths, own, name)
            except Exception as error:
                self.workers[name] = say(error)
        for (_, name), seconds in done.items():
            worker = self.workers.get(name)
            if isinstance(worker, MethodWorker):
                worker.seconds += seconds
        able = [worker for worker in self.workers.values() if isinstance(worker, MethodWorker)]
        together = [able] if engine.model.device.type == "cpu" and able else [[worker] for worker in able]
        rows = step_rows(width, engine.model.device.type)
        self.decoders = [Decoder(engine.model, group, rows, engine.stop) for group in together]

    def take(self, prompt: Prompt, names: Sequence[str]) -> Iterator[Response]:
        """Give a prompt to these arms. Yields the answers that end meanwhile, failed ones included."""
        for name in names:
            worker = self.workers[name]
            if isinstance(worker, str):
                yield self.lost(name, prompt.request, worker)
                continue
            decoder = next(d for d in self.decoders if worker in d.workers)
            yield from self._refuse_late(worker)
            while not worker.failure and not (decoder.room(worker) and self._fits(worker)):
                yield from self._step()
            ended: list[Response] = []
            if not worker.failure:
                try:
                    yield from decoder.admit(worker, prompt)
                    continue
                except Exception as error:
                    ended = list(worker.fail(error))
                    yield from ended
            if prompt.request.id not in [response.id for response in ended]:
                yield self.lost(name, prompt.request, worker.failure)

    def lost(self, name: str, request: Request, error: str) -> Response:
        """An arm's answer to a request that it did not answer."""
        return failed(name, request, error, self.arms[name][1].repeat)

    def drain(self) -> Iterator[Response]:
        """Decode until all answers have ended."""
        while any(decoder.active for decoder in self.decoders):
            yield from self._step()

    def _step(self) -> Iterator[Response]:
        for decoder in self.decoders:
            if decoder.active:
                try:
                    yield from decoder.step()
                except Exception as error:  # of the model itself, not of one method: all who took part have failed
                    for worker in decoder.workers:
                        if worker.active:
                            yield from worker.fail(error)
        for decoder in self.decoders:
            for worker in decoder.workers:
                yield from self._refuse_late(worker)

    def _fits(self, worker: MethodWorker) -> bool:
        """Whether one sequence more stays within the memory; one alone always does."""
        held = [(len(other.active), other.reserved) for decoder in self.decoders for other in decoder.workers]
        total = sum(count * each for count, each in held)
        return total == 0 or total + worker.reserved <= self.memory

    def _refuse_late(self, worker: MethodWorker) -> Iterator[Response]:
        baseline = self.workers[next(iter(self.arms))]
        if worker is baseline or worker.failure or not isinstance(baseline, MethodWorker) or baseline.failure:
            return
        limit = self.timeout + PATIENCE * baseline.seconds
        if worker.seconds > limit:
            yield from worker.fail(TimeoutError(f"took more than {limit:.3g} s"))
