"""A run whose answers are made in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvsuite import environment, models, tasks
from kvsuite.engines.request import Request, Response
from kvsuite.errors import UsageError
from kvsuite.methods import Method, parse
from kvsuite.plugin.options import BASELINE, Options
from kvsuite.plugin.plan import Speeds, duration, plan
from kvsuite.plugin.session import Session
from kvsuite.records import Answer
from kvsuite.tasks import Sample, Task

if TYPE_CHECKING:
    from kvsuite.engines.transformers import TransformersEngine
    from kvsuite.engines.worker import Prompt

FIRST = 2
"""Failures of the baseline that end a run in which it was never right."""


CALIBRATION = 1024
"""Tokens that a codec learns from where it must."""


class Local(Session):
    """A transformers model in this process, loaded once: what it has answered and timed is a record at once."""

    def __init__(self, options: Options, worker: str = "", folder: Path | None = None) -> None:
        """``worker`` is the name of a pytest-xdist worker, ``folder`` its controller's run folder."""
        super().__init__(options, worker, folder)
        self._answers: dict[str, list[Answer]] = {}
        self._texts: dict[int, list[int]] = {}
        self._prompts: dict[int, Prompt] = {}
        self._proven, self._failures = False, 0
        """Whether the baseline was ever right, and how often it failed."""

    def fetch(self, names: Sequence[str], evaluations: Sequence[str]) -> None:
        """Make sure that the model and these tasks' texts are here. Raises UsageError that says what to run."""
        _ = self.model_folder
        if self.options.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise UsageError("--kv-device cuda: torch finds no CUDA device here")
        super().fetch(names, evaluations)

    def announce(self, items: Sequence[pytest.Item]) -> str:
        """Arms, tasks and cells, what computes, and how long it will take here, by speeds measured now."""
        o = self.options
        parts = [f"{name} {len(self.samples(tasks.task(name)))}" for name in self.chosen]
        parts += [f"{self.timed_cells} timed cells"] if self.timed_cells else []
        what = f"{len(o.methods)} methods on {self.model_name}: {' · '.join(parts)}"
        try:
            self.progress.plan = plan(self, items)
        except pytest.exit.Exception:
            raise
        except Exception as error:  # the tests will tell
            return f"kvsuite: {what}; no estimate ({type(error).__name__}: {error})"
        from kvsuite.engines.precision import dtype_name

        layer = self.engine.layers[0]
        how = dtype_name(layer.dtype)
        if layer.dtype != layer.kv_dtype:
            how += f", K and V in {dtype_name(layer.kv_dtype)}"
        seconds = sum(self.progress.plan.expected.values())
        return f"kvsuite: {what}; about {duration(seconds)} here ({how}: {self.engine.reason})"

    @property
    def model_name(self) -> str:
        """For people."""
        return self.options.model.name if self.options.model else "SmolLM2-135M-Instruct"

    @property
    def model_folder(self) -> Path:
        """The model's folder, fetched if it is the default."""
        return models.located(self.options.model) if self.options.model else models.default_model()

    @cached_property
    def engine(self) -> TransformersEngine:
        """The model, loaded on first use. One that cannot be loaded ends the run, in a sentence."""
        from kvsuite.engines.transformers import TransformersEngine

        try:
            o = self.options
            engine = TransformersEngine.load(self.model_folder, o.dtype, o.device, o.backend)
            self.__dict__["engine"] = engine  # `text` asks for its tokenizer
            engine.calibrate(o.methods, lambda: self.text(CALIBRATION))
            return engine
        except Exception as error:
            said = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
            if self.worker:  # pytest-xdist takes a worker that exits for one that crashed
                raise UsageError(f"the model cannot be loaded: {said}") from error
            pytest.exit(f"the model cannot be loaded: {said}", returncode=pytest.ExitCode.USAGE_ERROR)

    @property
    def exact(self) -> Method:
        """The uncompressed cache that stores what transformers' own stores: `full`, in the compute dtype."""
        from kvsuite.engines.precision import dtype_name

        layer = self.engine.layers[0]
        return BASELINE if layer.kv_dtype == layer.dtype else parse(f"full:dtype={dtype_name(layer.dtype)}")

    def baseline(self, error: str) -> None:
        """Note how the baseline fared. Where it fails twice before it was ever right, the run ends with that
        reason; under pytest-xdist it goes on, since a worker that exits is taken for one that crashed."""
        self._proven |= not error
        self._failures += bool(error)
        if not self._proven and self._failures == FIRST and not self.worker:
            pytest.exit(f"the baseline fails, so nothing can be compared: {error}", pytest.ExitCode.INTERRUPTED)

    @property
    def together(self) -> int:
        """Sequences that are decoded together at most."""
        from kvsuite.engines.pool import step_rows

        return step_rows(self.options.width, self.options.device)

    def speeds(self) -> Speeds:
        """How fast this machine prefills and decodes with the uncompressed cache."""
        from kvsuite.engines.timing import DecodeCell

        length, width = min(self.options.length), 8
        self.prompt(length)  # the first one makes what later ones find
        prompt = self.engine.prefill(Request("speed", "", "", 1 << 30), self.text(length), [])
        cells = [DecodeCell(self.engine, BASELINE, prompt, rows, 3) for rows in (1, width)]
        for cell in cells:
            cell.check()
        one, many = (min(cell.round() for _ in range(2)) for cell in cells)
        return Speeds(prompt.seconds / length, one, max(0.0, many - one) / (width - 1))

    def facts(self) -> dict[str, Any]:
        """The model, and how torch runs it."""
        import torch

        from kvsuite.engines.precision import dtype_name

        o, folder = self.options, self.model_folder
        weights = [f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin", ".json")]
        gpu = torch.cuda.get_device_name() if o.device == "cuda" else None
        layer = self.engine.layers[0]
        return {
            "model": {"name": self.model_name, "fingerprint": environment.fingerprint(weights)},
            "environment": {
                "threads": torch.get_num_threads(),
                "gpu": gpu,
                "compute_dtype": dtype_name(layer.dtype),
                "kv_dtype": dtype_name(layer.kv_dtype),
                "dtype_reason": self.engine.reason,
            },
        }

    def answers(self, name: str) -> list[Answer]:
        """Every method's answers to a task; one pass over the samples serves all methods. A chat task is answered with
        sampling, and once more by the baseline with other noise: its control."""
        if name not in self._answers:
            task, o = tasks.task(name), self.options
            sampled = task.evaluation == "length" and o.temperature > 0
            self._answers[name] = self._pass(task, o.methods, 0)
            if sampled:
                self._answers[name] += self._pass(task, (BASELINE,), 1)
        return self._answers[name]

    def count_tokens(self, text: str) -> int:
        """By the model's own tokenizer."""
        return len(self.engine.tokenizer(text, add_special_tokens=False)["input_ids"])

    def request(self, task: Task, sample: Sample) -> Request:
        """What the engine is asked for a sample."""
        cap = sample.max_new_tokens
        return Request(sample.id, sample.context, sample.question, min(cap, self.options.cap), sample.before)

    def text(self, length: int) -> list[int]:
        """``length`` tokens of presidential messages: what speed is measured on."""
        if length not in self._texts:
            ids: list[int] = []
            for file in sorted(models.messages().glob("*.txt")):
                ids += self.engine.tokenizer(file.read_text(), add_special_tokens=False)["input_ids"]
                if len(ids) >= length:
                    break
            self._texts[length] = ids[:length]
        return self._texts[length]

    def prompt(self, length: int) -> Prompt:
        """That text, prefilled once, with whatever any method of the run asks to see."""
        if length not in self._prompts:
            observes = [o for method in self.options.methods for o in method.observes]
            request = Request("text", "", "", 1 << 30)
            self._prompts[length] = self.engine.prefill(request, self.text(length), [], observes)
        return self._prompts[length]

    def _pass(self, task: Task, methods: Sequence[Method], repeat: int) -> list[Answer]:
        from kvsuite.engines.sampling import Sampling

        o = self.options
        samples = {sample.id: sample for sample in self.samples(task)}
        requests = [self.request(task, sample) for sample in samples.values()]
        temperature = o.temperature if task.evaluation == "length" else 0.0
        how = Sampling(temperature, o.seed, repeat)
        found: list[Answer] = []
        caps = {request.id: request.max_new_tokens for request in requests}
        with self.progress.over(task.name, len(requests) * len(methods)) as done:
            for response in self.engine.generate(
                requests,
                methods,
                width=o.width,
                compress=o.compress,
                sampling=how,
                timeout=o.timeout,
                memory=o.memory * 2**30,
            ):
                answer = self._answer(task, samples[response.id], response, caps[response.id])
                self.record(answer)
                found.append(answer)
                done(len(response.tokens))
                if response.method == BASELINE.name:
                    self.baseline(response.error)
        return found

    def _answer(self, task: Task, sample: Sample, r: Response, cap: int) -> Answer:
        """A response as a record: what both have in common, and where it belongs."""
        broken = r.finish == "error"
        common = {f.name: getattr(r, f.name) for f in dataclasses.fields(Answer) if hasattr(r, f.name)}
        return Answer(
            **common
            | {
                "status": "failed" if broken else "ok",
                "finish": "" if broken else r.finish,
                "score": None if broken else task.score(sample, r.text),
                "evaluation": task.evaluation,
                "task": task.name,
                "type": task.type,
                "sample": sample.id,
                "cluster": sample.cluster,
                "cap": cap,
            }
        )
