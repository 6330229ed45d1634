"""Answers made in this process: all arms of a task in one pass over its samples."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kvsuite import models, shapes
from kvsuite.engines import ranks
from kvsuite.engines.request import Request, Response
from kvsuite.records import REFERENCE, Answer, Forced, Job, is_reference
from kvsuite.runs.setting import Setting
from kvsuite.tasks import Sample, Task, scored

if TYPE_CHECKING:
    from kvsuite.engines.forcing import Continued
    from kvsuite.engines.transformers import TransformersEngine

CALIBRATION = 1024
"""Tokens that a codec learns from where it must."""


class Here:
    """A transformers model, loaded when it is first needed."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._texts: dict[int, list[int]] = {}

    @cached_property
    def engine(self) -> TransformersEngine:
        """The model, and what codecs have learned of it."""
        from kvsuite.engines.transformers import TransformersEngine

        s = self.setting
        ranks.join(s.device)
        load = TransformersEngine.shaped if shapes.is_shape(s.model) else TransformersEngine.load
        engine = load(s.model, s.dtype, s.device, s.backend)
        for method in s.methods:
            method.check_model(engine.layers)
        engine.calibrate(s.methods, lambda: self.text(CALIBRATION))
        return engine

    @cached_property
    def tokenizer(self) -> Any:
        """The model's; by itself where the model is not needed here."""
        import transformers

        return transformers.AutoTokenizer.from_pretrained(
            self.setting.model, local_files_only=True, trust_remote_code=False
        )

    def facts(self) -> dict[str, Any]:
        """See `Executor.facts`."""
        import torch

        from kvsuite.engines.precision import dtype_name

        layer = self.engine.layers[0]
        return {
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if self.setting.device == "cuda" else None,
            "compute_dtype": dtype_name(layer.dtype),
            "kv_dtype": dtype_name(layer.kv_dtype),
            "dtype_reason": self.engine.reason,
        }

    def text(self, length: int) -> list[int]:
        """``length`` tokens of presidential messages: what speed is measured on, and what codecs learn from. A shape
        has random ones."""
        if shapes.is_shape(self.setting.model):
            vocab = shapes.shaped(self.setting.model).shape.vocab
            return random.Random(self.setting.seed).choices(range(vocab), k=length)
        if length not in self._texts:
            ids: list[int] = []
            for file in sorted(models.messages().glob("*.txt")):
                ids += self.tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
                if len(ids) >= length:
                    break
            self._texts[length] = ids[:length]
        return self._texts[length]

    def answers(
        self, task: Task, samples: Sequence[Sample], jobs: Collection[Job], before: Mapping[Job, float]
    ) -> Iterator[Answer]:
        """See `Executor.answers`: one prefill of a sample serves all arms whose answers are missing."""
        if task.evaluation == "divergence":
            yield from self._forced(task, samples, jobs)
            return
        passes: dict[int, list[Job]] = {}
        for job in jobs:  # the baseline's last repeat has no other arm's beside it, and joins the first
            passes.setdefault(job.repeat % self.setting.repeats, []).append(job)
        for repeat, some in sorted(passes.items()):
            yield from self._pass(task, samples, some, before, repeat)

    def _pass(
        self, task: Task, samples: Sequence[Sample], jobs: Collection[Job], before: Mapping[Job, float], repeat: int
    ) -> Iterator[Answer]:
        from kvsuite.engines.sampling import Sampling

        s = self.setting
        arms = {_name(job, repeat): job for job in jobs}
        methods = [m for m in s.methods if m.name in arms or m is s.methods[0]]  # timeouts are the baseline's multiples
        drawn = Sampling(s.temperature if task.evaluation == "length" else 0.0, s.seed, repeat)
        again = {
            name: replace(drawn, temperature=_temperature(job.arm, s.temperature), repeat=job.repeat)
            for name, job in arms.items()
            if is_reference(name) or job.repeat != repeat
        }
        wanted, named = {(job.item, _name(job, repeat)) for job in jobs}, {sample.id: sample for sample in samples}
        requests, names = [self.request(sample) for sample in samples], [*(m.name for m in methods), *again]
        done = {(r.id, name): 0.0 for r in requests for name in names if (r.id, name) not in wanted}
        done |= {(j.item, j.arm): t for j, t in before.items() if j.repeat == repeat and (j.item, j.arm) in done}
        for response in self.engine.generate(
            requests, methods, width=s.width, compress=s.compress, sampling=drawn, again=again,
            timeout=s.timeout, memory=s.memory, done=done,
        ):  # fmt: skip
            sample, response.method = named[response.id], arms[response.method].arm
            yield record(task, sample, response, self.request(sample).max_new_tokens)

    def _forced(self, task: Task, samples: Sequence[Sample], jobs: Collection[Job]) -> Iterator[Forced]:
        """The samples' references, forced through the caches of all arms that miss one."""
        from kvsuite.engines.forcing import Forcing

        s, arms, named = self.setting, {job.arm for job in jobs}, {sample.id: sample for sample in samples}
        documents = [self._continued(task, sample) for sample in samples]
        methods = [m for m in s.methods if m.name in arms or m is s.methods[0]]
        forcing = Forcing(self.engine, methods, documents, s.timeout, s.memory)
        for found in forcing.run({(job.item, job.arm) for job in jobs}):
            sample = named[found.response.id]
            answer = record(task, sample, found.response, sample.max_new_tokens)
            known = {field.name: getattr(answer, field.name) for field in fields(answer)}
            if answer.status == "ok":
                kl, logs = ([float(f"{x:.6g}") for x in column[-answer.cap :]] for column in (found.kl, found.logs))
                yield Forced(**known, kl=kl, flips=found.flips[-answer.cap :], logs=logs)
            else:
                yield Forced(**known)

    def _continued(self, task: Task, sample: Sample) -> Continued:
        """A document and how it goes on; or a prompt as it is asked elsewhere and its reference. Of that every token is
        predicted from the compressed cache: what is compressed ends before the prompt's last token, or, with
        ``compress="context"``, before the question."""
        from kvsuite.engines.forcing import Continued

        request = replace(self.request(sample), max_new_tokens=1)
        forced = self.tokenizer(sample.reference, add_special_tokens=False)["input_ids"]
        if task.type == "text":
            return Continued(request, self.tokenizer(sample.context)["input_ids"], forced[: sample.max_new_tokens + 1])
        context, suffix = self.engine.encode(request, self.setting.compress)
        if not suffix:
            context, suffix = context[:-1], context[-1:]
        return Continued(request, context, [*suffix, *forced[: sample.max_new_tokens]])

    def request(self, sample: Sample) -> Request:
        """What the engine is asked for a sample."""
        cap = min(sample.max_new_tokens, self.setting.cap)
        return Request(sample.id, sample.context, sample.question, cap, sample.before, sample.opening, sample.plain)


def _name(job: Job, repeat: int) -> str:
    """What an arm is called in the pass of a repeat."""
    return job.arm if job.repeat == repeat else f"{job.arm}@{job.repeat}"


def _temperature(arm: str, own: float) -> float:
    return float(arm.removeprefix(REFERENCE)) if is_reference(arm) else own


def record(task: Task, sample: Sample, r: Response, cap: int) -> Answer:
    """A response as a record: what both have in common, and where it belongs."""
    broken = r.finish == "error"
    score, error = (None, r.error) if broken else scored(task, sample, r.text)
    common = {f.name: getattr(r, f.name) for f in fields(Answer) if hasattr(r, f.name)}
    return Answer(
        **common
        | {
            "status": "failed" if error else "ok",
            "error": error,
            "finish": "" if broken else r.finish,
            "score": score,
            "evaluation": task.evaluation,
            "task": task.name,
            "type": task.type,
            "sample": sample.id,
            "cluster": sample.cluster,
            "prompt": sample.prompt_end,
            "prompt_hash": sample.prompt_hash,
            "chance": sample.chance,
            "cap": cap,
        }
    )
