"""A run whose answers are made by a transformers model, here or by other processes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvsuite import environment, models, shapes, tasks
from kvsuite.analysis.minutes import Speeds
from kvsuite.engines import ranks
from kvsuite.engines.request import Request
from kvsuite.errors import UsageError
from kvsuite.methods import Method, parse
from kvsuite.plugin.options import BASELINE, Options
from kvsuite.plugin.plan import duration, plan
from kvsuite.plugin.session import Session
from kvsuite.records import REFERENCE, Answer, Job, is_control, read, results
from kvsuite.runs.here import Here
from kvsuite.runs.setting import Executor, Setting
from kvsuite.tasks import Sample, Task

if TYPE_CHECKING:
    from kvsuite.engines.timing import Room
    from kvsuite.engines.transformers import TransformersEngine
    from kvsuite.engines.worker import Prompt

FIRST = 2
"""Failures of the baseline that end a run in which it was never right."""


class Local(Session):
    """What was answered and timed is a record at once."""

    def __init__(self, options: Options, worker: str = "", folder: Path | None = None) -> None:
        """``worker`` is the name of a pytest-xdist worker, ``folder`` its controller's run folder."""
        super().__init__(options, worker, folder)
        self._answers: dict[str, list[Answer]] = {}
        self._prompts: dict[int, Prompt] = {}
        self._asked: dict[str, set[str]] = {}
        """Task ("" for timed cells) → the arms that chosen tests ask for."""
        self._proven, self._failures = False, 0
        """Whether the baseline was ever right, and how often it failed."""
        self._unusable = ""
        """Why no model can be loaded: it is not tried again for every test."""

    def choose(self, items: Sequence[pytest.Item]) -> None:
        """Take note of the arms that the chosen tests ask for: no other is run, but for the baseline and controls."""
        for item in items:
            call = getattr(item, "callspec", None)
            params = {} if call is None else call.params
            arm = params["kv_method"].name if "kv_method" in params else params.get("kv_arm")
            if arm is not None:
                self._asked.setdefault(str(params.get("kv_task", "")), set()).add(arm)
        self.timed_cells = sum({"kv_local", "benchmark"} <= set(getattr(i, "fixturenames", ())) for i in items)

    def _taking_part(self, asked: set[str]) -> tuple[Method, ...]:
        return tuple(m for m in self.options.methods if m.name in asked or m == BASELINE or is_control(m.name))

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        """The arms of this run, the baseline first."""
        return self._taking_part({arm for arms in self._asked.values() for arm in arms})

    @property
    def arms(self) -> Sequence[str]:
        """Their names."""
        return [method.name for method in self.methods]

    def fetch(self, names: Sequence[str], evaluations: Sequence[str]) -> None:
        """Make sure that the model and these tasks' texts are here. Raises UsageError that says what to run."""
        _ = self.model_folder
        if self.options.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                raise UsageError("--kv-device cuda: torch finds no CUDA device here")
        if shapes.is_shape(self.options.model) and (others := sorted({*evaluations} - {"throughput"})):
            raise UsageError(
                f"--kv-model {self.options.model}: a shape has random weights, whose answers mean nothing; "
                f"choose -m throughput, not {' or '.join(others)}"
            )
        if ranks.size() > 1:
            ranks.check(self._config, self.model_name)
        super().fetch(names, evaluations)

    @property
    def _config(self) -> Any:
        from kvsuite.engines import pretrained, random_model

        if shapes.is_shape(self.options.model):
            return random_model.configured(shapes.shaped(self.options.model))
        return pretrained.read_config(self.model_folder)

    def check_model(self) -> None:
        """Refuse a model of the user's that cannot be compared: from its configuration, from what its folder holds, and
        by its twin. The default model is the one file whose hash is known here, and has been compared as a whole."""
        model = self.options.model
        if model is None or shapes.is_shape(model):
            return
        folder = models.located(model, "config.json")
        models.check_whole(folder)
        from kvsuite.engines import pretrained, twin

        config = pretrained.read_config(folder)
        layers = twin.check(config)
        for method in self.options.methods:
            try:
                method.check_layers(layers)
            except UsageError as error:
                raise UsageError(f"{error}; leave it out of --kv-methods for {self.model_name}") from error
            except Exception:  # a broken method costs its own tests, which will tell
                continue
        if any(folder.glob("*.safetensors")) and getattr(config, "quantization_config", None) is None:
            pretrained.load_model(folder, "meta")

    def announce(self, items: Sequence[pytest.Item]) -> str:
        """Arms, tasks and cells, what computes, and how long it will take here, by speeds measured now; nothing where
        tools learn from other runs."""
        if not self.chosen and not self.timed_cells:
            return ""
        parts = [f"{name} {len(self.samples(tasks.task(name)))}{_fitted(tasks.task(name))}" for name in self.chosen]
        beyond = f" ({self.options.beyond} more are beyond the model's context)" if self.options.beyond else ""
        parts += [f"{self.timed_cells} timed cells{beyond}"] if self.timed_cells else []
        what = f"{len(self.methods)} methods on {self.model_name}: {' · '.join(parts)}"
        if self.elsewhere:
            return f"kvsuite: {what}; {self.executor.facts()['executor']}"
        if ranks.size() > 1:  # an estimate takes passes, of which a rank that failed one would know nothing
            return f"kvsuite: {what}; tensor parallel {ranks.size()} ({self.engine.reason})"
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
        return self.options.model.name if self.options.model else models.DEFAULT

    @property
    def scale(self) -> float:
        """Layers of the model over those that run: 1 but for a shape of which some run."""
        model = self.options.model
        return shapes.shaped(model).scale if shapes.is_shape(model) else 1.0

    @property
    def model_folder(self) -> Path:
        """The model's folder, fetched if it is the default."""
        return models.located(self.options.model) if self.options.model else models.default_model()

    @cached_property
    def here(self) -> Here:
        """This process's model. A run that goes on computes in what it began with, which `auto` chose by measuring."""
        o = self.options
        begun = read(self.folder).facts["environment"] if o.resume is not None and o.dtype == "auto" else {}
        return Here(
            Setting(
                self.model_folder, self.methods, begun.get("compute_dtype", o.dtype), o.device, o.backend, o.width,
                o.compress, o.cap, o.temperature, o.repeats, o.seed, o.timeout, o.memory * 2**30,
            )
        )  # fmt: skip

    @cached_property
    def executor(self) -> Executor:
        """Who answers, its model loaded. One that cannot be loaded ends the run, in a sentence."""
        if self._unusable:
            pytest.fail(self._unusable, pytrace=False)
        try:
            if self.elsewhere:
                from kvsuite.runs.ray import OnRay

                return OnRay(self.here.setting, self.options.ray_address)
            _ = self.here.engine
            return self.here
        except Exception as error:
            said = str(error) if isinstance(error, UsageError) else f"{type(error).__name__}: {error}"
            self._unusable = f"the model cannot be loaded: {ranks.failed(error, said)[0]}"
            self.give_up(self._unusable)

    @property
    def elsewhere(self) -> bool:
        """Whether other processes answer, beside which nothing is timed and no model is loaded here."""
        return self.options.executor != "here"

    @property
    def engine(self) -> TransformersEngine:
        """This process's model. A test that asks for it is skipped where others answer."""
        if self.elsewhere:
            pytest.skip("the model is not loaded here: Ray's workers answer")
        _ = self.executor
        return self.here.engine

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
        from kvsuite.engines.request import step_rows

        return step_rows(self.options.width, self.options.device)

    def speeds(self) -> Speeds:
        """How fast this machine prefills and decodes with the uncompressed cache."""
        from kvsuite.engines.timing import DecodeCell

        length, width = min(self.options.length), 8
        self.prompt(length)  # the first one makes what later ones find
        prompt = self.engine.prefill(Request("speed", "", "", 1 << 30), self.here.text(length), [])
        cells = [DecodeCell(self.engine, BASELINE, prompt, rows, 3) for rows in (1, width)]
        for cell in cells:
            cell.check()
        one, many = (min(cell.round() for _ in range(2)) for cell in cells)
        return Speeds(prompt.seconds / length, one, max(0.0, many - one) / (width - 1))

    def known(self) -> dict[str, Any]:
        """The model, too."""
        model: dict[str, Any] = {"name": self.model_name, "fingerprint": models.fingerprint(self.model_folder)}
        if shapes.is_shape(self.options.model):
            found = shapes.shaped(self.options.model)
            model["layers"] = [found.layers, found.shape.layers]
        known = super().known()
        known["environment"]["tensor_parallel"] = ranks.size()
        return known | {"model": model}

    def facts(self) -> dict[str, Any]:
        """How torch runs the model."""
        return {"environment": self.executor.facts()}

    def jobs(self, task: Task) -> list[Job]:
        """What a task asks for: every arm answers every sample once. A chat is answered with sampling, so many times as
        is asked for, by the baseline once more: that is what all others are paired with."""
        o, arms = self.options, [method.name for method in self._taking_part(self._asked.get(task.name, set()))]
        who = [(arm, 0) for arm in arms]
        if task.evaluation == "length" and o.temperature > 0:
            drawn = [*arms, *(f"{REFERENCE}{t:g}" for t in o.references)]
            who = [(arm, repeat) for repeat in range(o.repeats) for arm in drawn] + [(BASELINE.name, o.repeats)]
        return [Job(task.evaluation, arm, task.name, s.id, repeat) for arm, repeat in who for s in self.samples(task)]

    def answers(self, name: str) -> list[Answer]:
        """The answers of all jobs of a task, as recorded; the first call does those that are not. They are read once
        all are there: while samples are answered, memory does not grow with them."""
        if name not in self._answers:
            if self.worker:  # another one may have died over this task since its records were read
                vars(self).pop("recorded", None)
            task, start = tasks.task(name), time.perf_counter()
            jobs = {*self.jobs(task)}
            there = {job: r for job in jobs if isinstance(r := self.recorded.get(job), Answer)}
            try:
                self._answer(task, jobs - there.keys(), {job: answer.seconds for job, answer in there.items()})
            except BaseException:  # the test of the next arm goes on where this one ended
                vars(self).pop("recorded", None)
                raise
            self._answers[name] = [r for r in results(self.folder, jobs) if isinstance(r, Answer)]
            self.sharing += time.perf_counter() - start
        return self._answers[name]

    def _answer(self, task: Task, missing: set[Job], before: dict[Job, float]) -> None:
        if not missing:
            return
        with self.progress.over(task.name, len(missing)) as done:
            for answer in self.executor.answers(task, self.samples(task), missing, before):
                self.record(answer)
                done(len(answer.tokens))
                who = answer.method, task.name
                self.took[who] = self.took.get(who, 0.0) + answer.seconds
                if answer.method == BASELINE.name:
                    self.baseline(answer.error)

    def skip_recorded(self, job: Job) -> None:
        """End the running test as skipped where its job was done before the run was resumed."""
        if ranks.first(job in self.recorded):
            pytest.skip("recorded already")

    def count_tokens(self, text: str) -> int:
        """By the model's own tokenizer."""
        return len(self.here.tokenizer(text, add_special_tokens=False)["input_ids"])

    def request(self, sample: Sample) -> Request:
        """What the engine is asked for a sample."""
        return self.here.request(sample)

    def room(self) -> Room:
        """Memory for the caches of a timed cell; on a GPU torch knows better."""
        from kvsuite.engines.timing import Room

        if self.options.device != "cpu":
            return Room(math.inf, "the GPU's memory")
        asked, free = self.options.memory, environment.free_memory()
        left, what = (asked, f"--kv-memory {asked:.3g}") if asked <= free else (free, "this machine's memory")
        if ranks.size() > 1:
            left, what = left / ranks.size(), f"a rank's share of {what}"
        return Room(left * 2**30, what)

    def text(self, length: int) -> list[int]:
        """``length`` tokens: what speed is measured on."""
        return self.here.text(length)

    def prompt(self, length: int) -> Prompt:
        """That text, prefilled once, with whatever any method of the run asks to see."""
        if length not in self._prompts:
            while self._prompts and sum(map(_nbytes, self._prompts.values())) > self.options.memory * 2**29:
                self._prompts.pop(next(iter(self._prompts)))  # half of the memory is for caches
            observes = [o for method in self.methods for o in method.observes]
            request = Request("text", "", "", 1 << 30)
            self._prompts[length] = self.engine.prefill(request, self.text(length), [], observes)
        return self._prompts[length]


def _nbytes(prompt: Prompt) -> int:
    return sum(seen.k.nbytes + seen.v.nbytes for seen in prompt.context)


def _fitted(task: Task) -> str:
    """What was done so that its samples fit the model, in brackets."""
    done = ", ".join(f"{count} {what}" for what, count in task.fitted.items())
    return f" ({done})" if done else ""
