"""One run's engine, loaded once, and the answers of all methods, made once per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsuite import models, tasks
from kvsuite.analysis.samples import Answer, summarize
from kvsuite.engines.request import Request, Response
from kvsuite.plugin.options import BASELINE, Options
from kvsuite.tasks import Sample

if TYPE_CHECKING:
    from kvsuite.engines.transformers import TransformersEngine


@dataclass(frozen=True)
class Answered:
    """One sample, the response of one method and its score."""

    sample: Sample
    response: Response
    score: float


class Session:
    """What the tests of one run share. Nothing is loaded before it is used."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._answers: dict[str, dict[str, list[Answered]]] = {}

    def fetch(self) -> None:
        """Make sure that model and texts are here. Raises UsageError that says what to run."""
        if self.options.model is None:
            models.default_model()
        models.messages()

    @property
    def folder(self) -> Path:
        """The model's folder."""
        return self.options.model or models.default_model()

    @cached_property
    def engine(self) -> TransformersEngine:
        """The model, loaded on first use."""
        from kvsuite.engines.transformers import TransformersEngine

        return TransformersEngine.load(self.folder, self.options.dtype, self.options.device)

    def answers(self, task_name: str) -> dict[str, list[Answered]]:
        """Every method's answers to a task, by method name; one pass over the samples serves all methods."""
        if task_name not in self._answers:
            self._answers[task_name] = self._answer(task_name)
        return self._answers[task_name]

    @staticmethod
    def request(sample: Sample) -> Request:
        """What the engine is asked for a sample."""
        return Request(sample.id, sample.context, sample.question, sample.max_new_tokens)

    def fact(self, task_name: str, method: str) -> dict[str, Any]:
        """What the summary shows of one method on one task, as JSON primitives."""
        arms = {name: _plain(answers) for name, answers in self.answers(task_name).items()}
        o = self.options
        where = {"kind": "samples", "task": task_name, "method": method, "model": self.name}
        setting = {"width": o.batch, "lengths": list(o.length), "compress": o.compress, "dtype": self.dtype}
        return where | setting | {"threads": self.threads} | summarize(arms[method], arms[BASELINE.name])

    @property
    def name(self) -> str:
        """What the report calls the model."""
        return self.options.model.name if self.options.model else "SmolLM2-135M-Instruct"

    @property
    def dtype(self) -> str:
        """The model's number format, e.g. bfloat16."""
        return str(self.engine.model.dtype).removeprefix("torch.")

    @property
    def threads(self) -> int:
        """CPU threads torch uses."""
        import torch

        return torch.get_num_threads()

    def _answer(self, task_name: str) -> dict[str, list[Answered]]:
        o, task = self.options, tasks.task(task_name)

        def tokens(text: str) -> int:
            return len(self.engine.tokenizer(text, add_special_tokens=False)["input_ids"])

        samples = {s.id: s for s in task.samples(o.samples, o.length, o.seed, tokens)}
        requests = [self.request(sample) for sample in samples.values()]
        found: dict[str, list[Answered]] = {method.name: [] for method in o.methods}
        for response in self.engine.generate(requests, o.methods, width=o.batch, compress=o.compress):
            sample = samples[response.id]
            score = 0.0 if response.finish == "error" else task.score(sample, response.text)
            found[response.method].append(Answered(sample, response, score))
        order = {name: at for at, name in enumerate(samples)}
        return {name: sorted(answers, key=lambda a: order[a.sample.id]) for name, answers in found.items()}


def _plain(answers: Sequence[Answered]) -> list[Answer]:
    return [
        Answer(
            a.sample.id, a.score, tuple(a.response.tokens), a.response.finish == "error", a.response.nbytes,
            a.response.prompt_tokens, a.response.prefill_seconds, a.response.decode_share,
        )
        for a in answers
    ]  # fmt: skip
