"""One method's share of a decoder: its caches, the sequences in them, and what they have cost."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvsuite.cache.adapter import Member
from kvsuite.cache.observations import Observation
from kvsuite.cache.prefill import PrefilledLayer
from kvsuite.engines.request import Request, Response
from kvsuite.engines.sampling import GREEDY, Sampling
from kvsuite.kernels.context import LayerContext
from kvsuite.methods import Method
from kvsuite.methods.artifact import Artifact


@dataclass(frozen=True)
class Prompt:
    """A prefilled prompt, ready to be compressed by any number of methods."""

    request: Request
    context: list[PrefilledLayer]
    suffix: list[int]
    logits: Tensor
    """(vocabulary,) after the context; the first token's if there is no suffix."""
    seconds: float
    observing: Mapping[Observation, float]
    """Seconds that each observation took; part of ``seconds``."""


@dataclass
class Sequence:
    """One prompt and its answer so far, in one row of a method's caches."""

    request: Request
    response: Response
    position: int
    """Of the token to be fed next."""
    forced: list[int] = field(default_factory=list)
    """Tokens of the prompt that are still to be fed, one at each step, before the answer begins."""


class MethodWorker:
    """``rows`` rows of one method's caches. Whatever it raises becomes failed answers of its own."""

    def __init__(
        self,
        method: Method,
        layers: list[LayerContext],
        rows: int,
        lengths: Iterable[tuple[int, int]],
        *,
        sampling: Sampling = GREEDY,
        name: str = "",
        backend: str = "auto",
        artifact: Artifact | None = None,
    ) -> None:
        """``lengths``: of each sequence to come, the context's tokens and the most that follow; ``sampling``: how its
        tokens are drawn; ``name`` of its responses: the method's unless given; ``backend``: who computes on its caches;
        ``artifact``: what its codec has learned."""
        self.method, self.sampling, self.name = method, sampling, name or method.name
        self.sequences: list[Sequence | None] = [None] * rows
        self.seconds = 0.0
        """Spent for this method alone, and its share of the steps it took part in."""
        self.failure = ""
        """Why it answers no more; empty while it does."""
        sizes = sorted(set(lengths))
        slots = max(method.capacity(*size) for size in sizes)
        pages = [max(method.pages(layer, *size) for size in sizes) for layer in layers]
        self.artifact = "" if artifact is None else artifact.hash
        self.caches = [
            method.cache(layer, rows, slots, most, backend=backend, artifact=artifact)
            for layer, most in zip(layers, pages, strict=True)
        ]
        self.member = Member(self.caches, isolated=True)
        self.reserved = sum(cache.slack for cache in self.caches) // rows
        """Bytes that one row has room for, all layers."""

    @property
    def active(self) -> list[tuple[int, Sequence]]:
        """Rows with a sequence."""
        return [(row, s) for row, s in enumerate(self.sequences) if s is not None]

    @property
    def full(self) -> bool:
        """Whether all rows are taken."""
        return None not in self.sequences

    @property
    def provenance(self) -> str:
        """The class that stores and attends, with its module, and its backends."""
        kind = type(self.caches[0])
        return f"{kind.__module__}.{kind.__qualname__}/{self.backend}"

    @property
    def path(self) -> str:
        """The codec, and what stores and attends."""
        return f"{self.method.codec.name}/{self.backend}"

    @property
    def backend(self) -> str:
        """Who computes on its caches; several where layers differ."""
        return "+".join(dict.fromkeys(cache.backend.NAME for cache in self.caches))

    @property
    def refusal(self) -> str:
        """Why other backends were not taken."""
        return "; ".join(dict.fromkeys(cache.refusal for cache in self.caches if cache.refusal))

    @property
    def stepwise(self) -> bool:
        """Whether tokens must come one by one."""
        return any(cache.stepwise for cache in self.caches)

    @property
    def nbytes(self) -> int:
        """Bytes all sequences hold, all layers."""
        return sum(cache.nbytes for cache in self.caches)

    @property
    def allocated(self) -> int:
        """Bytes that are reserved for them, free pages and slots included."""
        return sum(cache.kv.allocated for cache in self.caches)

    @property
    def read_nbytes(self) -> int:
        """Bytes that one step of all sequences reads, all layers."""
        return sum(cache.read_nbytes(row) for cache in self.caches for row, _ in self.active)

    def compress(self, prompt: Prompt) -> int:
        """Put a prefilled context into a free row, which is returned."""
        row = self.sequences.index(None)
        start = time.perf_counter()
        self.method.compress(row, prompt.context, self.caches)
        if prompt.logits.is_cuda:
            torch.cuda.synchronize()
        length = prompt.context[0].k.shape[1]
        response = Response(
            id=prompt.request.id,
            method=self.name,
            prompt_tokens=length + len(prompt.suffix),
            context_tokens=length,
            repeat=self.sampling.repeat,
            cache=self.provenance,
            path=self.path,
            refusal=self.refusal,
            artifact=self.artifact,
        )
        shared = prompt.seconds - sum(s for o, s in prompt.observing.items() if o not in self.method.observes)
        response.prefill_seconds, response.shared_seconds = shared, prompt.seconds - sum(prompt.observing.values())
        self.sequences[row] = Sequence(prompt.request, response, length)
        self.spend(row, time.perf_counter() - start, prefilling=True)
        return row

    def spend(self, row: int, seconds: float, prefilling: bool) -> None:
        """Book what a sequence cost beyond the shared prefill."""
        sequence = self.sequences[row]
        assert sequence is not None
        self.seconds += seconds
        if prefilling:
            sequence.response.prefill_seconds += seconds
        else:
            sequence.response.decode_share += seconds

    def measure(self, row: int) -> None:
        """Note what a row holds now that its whole prompt is in."""
        sequence = self.sequences[row]
        assert sequence is not None
        sequence.response.nbytes = sum(cache.row_nbytes(row) for cache in self.caches)
        sequence.response.kept = sum(cache.kept(row) for cache in self.caches)

    def release(self, row: int) -> Response:
        """The answer of a row, which is free again."""
        sequence = self.sequences[row]
        assert sequence is not None
        response = sequence.response
        response.nbytes_end = sum(cache.row_nbytes(row) for cache in self.caches)
        response.read_end = sum(cache.read_nbytes(row) for cache in self.caches)
        response.fragmentation = sum(cache.fragmentation(row) for cache in self.caches) / len(self.caches)
        response.dense_end = sum(cache.seen(row) * cache.layer.token_bytes for cache in self.caches)
        self.sequences[row] = None
        for cache in self.caches:
            cache.reset(row)
        return response

    def fail(self, error: Exception | str) -> Iterator[Response]:
        """Answer no more; what was being answered has failed."""
        self.failure = error if isinstance(error, str) else say(error)
        for row, sequence in self.active:
            sequence.response.finish, sequence.response.error = "error", self.failure
            self.sequences[row] = None
            yield sequence.response


def failed(name: str, request: Request, error: str, repeat: int = 0) -> Response:
    """The answer to a request that was not answered."""
    return Response(request.id, name, finish="error", error=error, repeat=repeat)


def say(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}"
