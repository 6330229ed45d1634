"""Teacher forcing: all arms read the same continuations, each through the decode path of its own cache, and every
next-token distribution is held against the baseline's at the same position.

All arms are at the same position of the same documents, so the logits of one step are all that is held of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvsuite.engines.decoder import Decoder
from kvsuite.engines.pool import PATIENCE
from kvsuite.engines.request import Request, Response
from kvsuite.engines.worker import MethodWorker, Prompt, failed, say
from kvsuite.methods import Method

if TYPE_CHECKING:
    from kvsuite.engines.transformers import TransformersEngine

TOGETHER = 256
"""Rows of the matrix products on a CPU, all arms together. It does not follow the number of arms, so that what one is
found to do does not depend on which others are measured."""
ROWS = 16
"""Rows on a GPU, one arm after the other."""


@dataclass(frozen=True)
class Continued:
    """A document to be prefilled and the tokens that follow it: all but the last are fed, all but the first are
    predicted."""

    request: Request
    context: list[int]
    forced: list[int]


@dataclass
class ForcedResponse:
    """What one arm made of one document."""

    response: Response
    kl: list[float] = field(default_factory=list)
    """KL of the baseline's distribution against this arm's at each position, nats."""
    flips: list[int] = field(default_factory=list)
    """1 where the most likely token is another than the baseline's."""
    logs: list[float] = field(default_factory=list)
    """Log probability of the token that follows, nats."""


Found = Mapping[tuple[str, str], ForcedResponse]
"""By document and arm."""


class Forcing:
    """``methods``, the baseline first, on any number of documents. An arm that fails, or takes ``timeout`` seconds more
    than 10 times what the baseline has taken, costs its own responses only."""

    def __init__(
        self,
        engine: TransformersEngine,
        methods: Sequence[Method],
        documents: Sequence[Continued],
        timeout: float = math.inf,
        memory: float = math.inf,
    ) -> None:
        """``memory``: bytes that all arms' caches may reserve; with less, fewer documents are read at a time."""
        self.engine, self.methods, self.documents, self.timeout = engine, list(methods), documents, timeout
        self.lost: dict[str, str] = {}
        """Why an arm reads no more."""
        together = engine.model.device.type == "cpu"
        self.rows = max(1, TOGETHER // len(methods)) if together else ROWS
        self.arms = self._arms()
        each = sum(worker.reserved for worker in self.arms.values())
        if self.rows * each > memory:
            self.rows = max(1, int(memory // each))
            self.arms = self._arms()
        workers = list(self.arms.values())
        groups = [workers] if together and workers else [[worker] for worker in workers]
        width = max(TOGETHER, len(methods)) if together else ROWS
        self.decoders = [Decoder(engine.model, group, width) for group in groups]

    def _arms(self) -> dict[str, MethodWorker]:
        found = {}
        lengths = [(len(d.context), len(d.forced)) for d in self.documents]
        for method in self.methods:
            try:
                found[method.name] = self.engine.worker(method, self.rows, lengths)
            except Exception as error:
                self.lost[method.name] = say(error)
        return found

    def run(self, wanted: Collection[tuple[str, str]]) -> Iterator[ForcedResponse]:
        """The responses of ``wanted``, (request's id, method's name). The baseline reads every document for the others,
        whether its own response is wanted or not."""
        named = {document for document, _ in wanted}
        asked = [document for document in self.documents if document.request.id in named]
        for first in range(0, len(asked), self.rows):
            for found in self._group(asked[first : first + self.rows]):
                if (found.response.id, found.response.method) in wanted:
                    yield found

    @torch.inference_mode()
    def _group(self, documents: Sequence[Continued]) -> list[ForcedResponse]:
        prompts, observes = list[tuple[Continued, Prompt]](), [o for m in self.methods for o in m.observes]
        found = {
            (d.request.id, m.name): ForcedResponse(failed(m.name, d.request, ""))
            for d in documents
            for m in self.methods
        }
        for document in documents:
            try:
                prompts.append((document, self.engine.prefill(document.request, document.context, [], observes)))
            except Exception as error:  # a document too large for this machine costs its own responses
                for method in self.methods:
                    found[document.request.id, method.name].response.error = say(error)
        for method in self.methods:
            self._admit(method.name, prompts)
        self._read({d.request.id: d.forced for d in documents}, found)
        for (_, name), one in found.items():
            if one.response.finish == "error" and not one.response.error:
                one.response.error = self.lost.get(name, "the baseline failed")
        return list(found.values())

    def _admit(self, name: str, prompts: Sequence[tuple[Continued, Prompt]]) -> None:
        """Compress the prompts of a group into an arm's rows, in their order."""
        try:
            for document, prompt in prompts if name not in self.lost else ():
                worker = self.arms[name]
                row = worker.compress(prompt)
                sequence = worker.sequences[row]
                assert sequence is not None
                sequence.forced, sequence.response.width = document.forced[:-1], self.decoders[0].width
                worker.measure(row)
        except Exception as error:
            self._lose(name, error)

    def _lose(self, name: str, error: Exception) -> None:
        self.lost[name] = say(error)
        list(self.arms[name].fail(error))

    def _read(self, forced: Mapping[str, list[int]], found: Found) -> None:
        """Feed the continuations, one token of every document to every arm at a time."""
        base = self.methods[0].name
        for at in range(1, max(map(len, forced.values()))):
            if base in self.lost or not self.arms[base].active:
                break
            ids = [sequence.request.id for _, sequence in self.arms[base].active]
            following = torch.tensor([forced[i][at] for i in ids], device=self.engine.model.device)
            logits = {name: own for decoder in self.decoders for name, own in self._step(decoder, found).items()}
            if base not in logits:
                break
            expected = _Expected.of(logits[base])
            for name, own in logits.items():
                columns = _compared(expected, own.float().log_softmax(-1), following)
                for one, kl, flip, log in zip([found[i, name] for i in ids], *columns, strict=True):
                    one.kl.append(kl)
                    one.flips.append(flip)
                    one.logs.append(log)
        for worker in self.arms.values():  # without a baseline nothing can be compared
            if worker.active:
                list(worker.fail("the baseline failed"))

    def _step(self, decoder: Decoder, found: Found) -> dict[str, Tensor]:
        """One token of every document: the logits of each arm that did not fail, (documents, vocabulary)."""
        places = {worker.method.name: [row for row, _ in worker.active] for worker in decoder.workers}
        try:
            for response in decoder.step():
                found[response.id, response.method].response = response
        except Exception as error:  # of the model itself: all who took part have failed
            for name in places:
                self._lose(name, error)
        for worker in decoder.workers:
            self._refuse_late(worker)
        parts, first = dict[str, Tensor](), 0
        for name, rows in places.items():
            own = rows if decoder.graph is not None else range(first, first + len(rows))
            parts[name], first = decoder.logits[list(own)], first + len(rows)
        return {name: own for name, own in parts.items() if name not in self.lost}

    def _refuse_late(self, worker: MethodWorker) -> None:
        name, base = worker.method.name, self.arms[self.methods[0].name]
        limit = self.timeout + PATIENCE * base.seconds
        if worker.failure:
            self.lost.setdefault(name, worker.failure)
        elif worker is not base and worker.seconds > limit:
            self._lose(name, TimeoutError(f"took more than {limit:.3g} s"))


@dataclass(frozen=True)
class _Expected:
    """The baseline's distributions at one position, which all arms are held against: (rows, vocabulary)."""

    logs: Tensor
    probabilities: Tensor
    best: Tensor
    """(rows,): the most likely tokens."""

    @classmethod
    def of(cls, logits: Tensor) -> _Expected:
        logs = logits.float().log_softmax(-1)
        return cls(logs, logs.exp(), logs.argmax(-1))


def _compared(expected: _Expected, mine: Tensor, following: Tensor) -> tuple[list[float], list[int], list[float]]:
    """KL, flips and log probabilities of what follows, (rows,), from log probabilities (rows, vocabulary)."""
    kl = (expected.probabilities * (expected.logs - mine)).sum(-1)
    flips = expected.best != mine.argmax(-1)
    logs = mine.gather(-1, following[:, None])[:, 0]
    return kl.tolist(), flips.int().tolist(), logs.tolist()
