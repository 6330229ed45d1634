"""One cell of the speed evaluation. A cache is timed only after its output was checked, and it is the same object."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import DynamicCache

from kvsuite.cache import adapter
from kvsuite.cache.checker import AttentionChecker
from kvsuite.cache.prefill import PrefillCache
from kvsuite.engines.decoder import Decoder
from kvsuite.engines.memory import PeakMemory
from kvsuite.engines.request import Request
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.engines.worker import Prompt
from kvsuite.errors import UsageError
from kvsuite.methods import Method
from kvsuite.modes import PAGED

ENDLESS = 1 << 30
GIB = 1 << 30


class Unchecked(RuntimeError):
    """A cache was to be timed whose output nobody looked at, or whose output was wrong."""


@dataclass
class Room:
    """Memory that the caches of a cell may take."""

    left: float
    """Bytes."""
    what: str
    """Whose they are."""

    def take(self, nbytes: int) -> None:
        """Raises MemoryError for more than is left."""
        if nbytes > self.left:
            have = f"{max(self.left, 0) / GIB:.2f} GiB are left of {self.what}"
            raise MemoryError(f"the cache needs {nbytes / GIB:.2f} GiB, and {have}")
        self.left -= nbytes


ENOUGH = Room(math.inf, "a machine without end")


class DecodeCell:
    """``width`` sequences with the same context under one method, decoding without end."""

    def __init__(
        self,
        engine: TransformersEngine,
        method: Method,
        prompt: Prompt,
        width: int,
        steps: int,
        mode: str = PAGED,
        room: Room = ENOUGH,
    ) -> None:
        """``steps``: rounds to come, one token each. ``mode``: what attends, of `kvsuite.modes`. Raises MemoryError
        before anything is written where there is no ``room``."""
        length = prompt.context[0].k.shape[1]
        self.checked: float | None = None
        with torch.inference_mode():
            lengths = [(length, steps + 3)]  # and the two of `check`
            self.worker = engine.worker(method, width, lengths, backend="" if mode == PAGED else mode)
            if mode not in (PAGED, self.worker.backend):
                raise UsageError(self.worker.refusal)
            room.take(self.worker.allocated)
            self.decoder = Decoder(engine.model, [self.worker], width)
            for _ in range(width):
                for response in self.decoder.admit(self.worker, prompt):
                    raise Unchecked(response.error or "the answer ended before it began")

    def check(self) -> None:
        """One step, watched: every layer's output against float64 attention over what the cache holds."""
        checker = self.worker.member.checker = AttentionChecker()
        try:
            self._step()
        finally:
            self.worker.member.checker = None
        if checker.layers != len(self.worker.caches) or not checker.worst <= 1:
            raise Unchecked(f"attention is {checker.worst:.3g} times further from its cache than rounding explains")
        self._step()  # the first without a checker records the graphs, where there are any
        self.checked = checker.worst

    def round(self) -> float:
        """Seconds of one step. Raises Unchecked before `check`, and where logits are not finite."""
        if self.checked is None:
            raise Unchecked("a cache is timed only after its output was checked")
        start = time.perf_counter()
        self._step()
        return time.perf_counter() - start

    @property
    def attended(self) -> float:
        """Seconds that the caches have taken so far, storing and attending; 0 on a GPU, which works while the clock
        reads."""
        return 0.0 if self.worker.caches[0].layer.device.type == "cuda" else self.worker.member.seconds

    @torch.inference_mode()
    def compress(self, prompt: Prompt) -> None:
        """Put another prompt into the first sequence's place."""
        self.worker.method.compress(0, prompt.context, self.worker.caches)

    def _step(self) -> None:
        with torch.inference_mode():
            for response in self.decoder.step():
                raise Unchecked(response.error or "an answer ended while it was timed")


class PrefillCell:
    """One prompt through the model and into a method's cache: the observations it asks for are its own."""

    def __init__(
        self, engine: TransformersEngine, method: Method, tokens: list[int], mode: str = PAGED, room: Room = ENOUGH
    ) -> None:
        """``mode`` and ``room``: as for `DecodeCell`."""
        self.engine, self.method, self.ids, self.mode = engine, method, tokens, mode
        self.tokens = len(tokens)
        self.checked: float | None = None
        self.inner = DecodeCell(engine, method, self._prefill(), 1, 2, mode, room)

    def check(self) -> None:
        """The cache it fills is decoded from once, watched."""
        self.inner.check()
        self.checked = self.inner.checked

    def round(self) -> float:
        """Seconds until the prompt is compressed. Raises Unchecked before `check`."""
        if self.checked is None:
            raise Unchecked("a cache is timed only after its output was checked")
        start = time.perf_counter()
        prompt = self._prefill()
        self.inner.compress(prompt)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def _prefill(self) -> Prompt:
        return self.engine.prefill(Request("cell", "", "", ENDLESS), self.ids, [], self.method.observes, self.mode)


Cell = TypeVar("Cell", DecodeCell, PrefillCell)


def measured(make: Callable[[], Cell], device: torch.device) -> tuple[Cell, int | None]:
    """A cell that was made and checked, and the peak of memory meanwhile; see `PeakMemory`."""
    with PeakMemory(device) as peak:
        cell = make()
        cell.check()
    return cell, peak.nbytes


class RestCell:
    """A step or a prefill without any layer: what of its time does not grow with them. It holds nothing."""

    def __init__(self, engine: TransformersEngine, ids: list[list[int]]) -> None:
        """``ids``: (batch, n), the tokens that are fed."""
        self.engine, self.ids = engine, torch.tensor(ids, device=engine.model.device)

    @torch.inference_mode()
    def round(self) -> float:
        """Seconds from the tokens to the choice of the next ones."""
        config, layers = self.engine.model.config, self.engine.model.config.num_hidden_layers
        config.num_hidden_layers = 0  # how many of its layers a model runs
        try:
            start = time.perf_counter()
            cache = PrefillCache(self.engine.layers[:1])
            logits = adapter.forward(self.engine.model, cache, self.ids)
            logits.topk(2).values.tolist(), logits.argmax(-1).tolist()
            return time.perf_counter() - start
        finally:
            config.num_hidden_layers = layers


class TransformersCell:
    """transformers' own DynamicCache under its own attention, the same sequences: a row of its own, not the
    baseline."""

    def __init__(self, engine: TransformersEngine, tokens: list[int], width: int, attention: str = "sdpa") -> None:
        self.model, self.tokens, self.attention = engine.model, width, attention
        self.cache: Any = DynamicCache()
        self._forward(torch.tensor([tokens], device=self.model.device))
        self.cache.batch_repeat_interleave(width)

    def round(self) -> float:
        """Seconds of one step of the batch."""
        return self._forward(torch.full((self.tokens, 1), 5, device=self.model.device))

    @property
    def nbytes(self) -> int:
        """Bytes of K and V."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)

    @torch.inference_mode()
    def _forward(self, ids: torch.Tensor) -> float:
        self.model.set_attn_implementation(self.attention)
        try:
            start = time.perf_counter()
            adapter.forward(self.model, self.cache, ids).argmax(-1).tolist()
            return time.perf_counter() - start
        finally:
            self.model.set_attn_implementation(adapter.NAME)
