"""Why answers of a run that is there regressed: its samples are prefilled once more, and what each method's cache lacks
of them is measured, of those that it broke and, to compare with, of those that it did not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from kvsuite.analysis.causes import Looked, looked_at
from kvsuite.errors import UsageError, unknown
from kvsuite.methods import Method, parse
from kvsuite.records import Loss, Run, RunFolder
from kvsuite.runs import again
from kvsuite.tasks import Sample, Task


class Why:
    """What is to be looked at in a run. Nothing is loaded before `losses`."""

    def __init__(
        self,
        run: Run,
        model: Path | None = None,
        methods: Collection[str] = (),
        samples: Collection[str] = (),
        made: Collection[str] = (),
    ) -> None:
        """``methods`` and ``samples``: names, of the run's; empty for all. ``made``: its tasks that have no name of
        their own, as they were given to it (``hub:…``, ``jsonl:…``). Raises UsageError where the run's caches cannot be
        had again: another model, other texts, servers."""
        if "servers" in run.facts:
            raise UsageError(f"{run.folder} was answered by servers, whose caches nobody can look into")
        self.made = made
        self.run, done = run, {record.job for record in run.records if isinstance(record, Loss) and not record.error}
        known = looked_at(run)
        for asked, there, what in (
            (methods, {x.method for x in known}, f"method with scores in {run.folder}"),
            (samples, {x.sample for x in known}, f"sample in {run.folder} that the baseline answers well"),
        ):
            if lost := next((name for name in asked if name not in there), None):
                raise unknown(what, lost, there)
        self.asked = [
            x
            for x in known
            if x.job not in done and x.method in (methods or {x.method}) and x.sample in (samples or {x.sample})
        ]
        self.here = again.here(run, model, [parse(name) for name in run.facts["methods"]])

    def losses(self) -> Iterator[Loss]:
        """One record for each method and sample, as they are made; they are appended to the run's."""
        folder = RunFolder(self.run.folder)
        wanted: dict[str, dict[str, list[Looked]]] = {}
        for one in self.asked:
            wanted.setdefault(one.task, {}).setdefault(one.sample, []).append(one)
        for task, samples in again.samples(self.run, self.here, wanted, self.made).items():
            for sample in samples:
                for loss in self._sample(task, sample, wanted[task.name][sample.id]):
                    folder.append(loss)
                    yield loss

    def _sample(self, task: Task, sample: Sample, looked: list[Looked]) -> Iterator[Loss]:
        from kvsuite.engines.losses import ForcedAnswer, losses

        engine, request, span = self.here.engine, self.here.request(sample), sentence(sample)
        context, suffix = engine.encode(request, self.here.setting.compress)
        base = looked[0].base
        if base.prompt_tokens != len(context) + len(suffix) or base.prompt not in ("", sample.prompt_end):
            raise UsageError(f"sample {sample.id} of {task.name} is not the one that {self.run.folder} holds")
        asked = ForcedAnswer(request, context, suffix, base.tokens, engine.tokens_of(request, span))
        methods: dict[Method, Looked] = {parse(one.method): one for one in looked}
        found = losses(engine, asked, {method: one.parting for method, one in methods.items()})
        for method, figures in found.items():
            one, error = methods[method], figures.pop("error", "")
            loss = Loss(one.method, task=task.name, sample=sample.id, repeat=one.repeat, span=span)
            if error:
                yield dataclasses.replace(loss, status="failed", error=error)
            else:
                yield dataclasses.replace(loss, **{key: _short(value) for key, value in figures.items()})


def _short(value: Any) -> Any:
    """Four digits."""
    if isinstance(value, list):
        return [_short(x) for x in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def sentence(sample: Sample) -> str:
    """The sentence of the context in which the reference stands; empty where it stands nowhere, or several times, so
    that nobody knows which is meant."""
    if not sample.reference.strip():
        return ""
    places = [m.start() for m in re.finditer(rf"(?<!\w){re.escape(sample.reference.strip())}(?!\w)", sample.context)]
    if len(places) != 1:
        return ""
    ends = [0, *(m.end() for m in re.finditer(r"[.!?;]\s+|\n+", sample.context)), len(sample.context)]
    first = max(end for end in ends if end <= places[0])
    last = min(end for end in ends if end > places[0])
    return sample.context[first:last].strip()
