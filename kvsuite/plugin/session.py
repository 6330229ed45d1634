"""What the tests of one run share, whoever answers: options, the run's folder, and what has been answered."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import pytest

from kvsuite import disk, environment, registry, shapes, tasks
from kvsuite.engines import ranks
from kvsuite.errors import UsageError
from kvsuite.plugin.options import Options
from kvsuite.plugin.progress import Progress
from kvsuite.records import Answer, Job, Record, RunFolder, changed, read
from kvsuite.tasks import Sample, Task


class Session:
    """One run; a subclass knows who answers. Nothing is loaded before it is used."""

    def __init__(self, options: Options, worker: str = "", folder: Path | None = None) -> None:
        """``worker`` is the name of a pytest-xdist worker, ``folder`` its controller's run folder."""
        self.options, self.worker = options, worker
        self.folder = folder or options.resume or options.run or Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
        self.run = RunFolder(self.folder, worker)
        self.progress = Progress(quiet=bool(worker))
        self.chosen: Sequence[str] = ()
        """The tasks that the chosen tests ask for."""
        self.timed_cells = 0
        """Cells that the chosen tests time in this process."""
        self.took: dict[tuple[str, str], float] = {}
        """Arm and task → the seconds of its jobs since they were last asked for."""
        self.sharing = 0.0
        """Seconds spent so far on jobs that several tests share."""
        self._described = False
        self._claim = contextlib.ExitStack()
        self._samples: dict[str, list[Sample]] = {}

    def claim(self) -> None:
        """Make the run's folder, to which nobody else can write until `release`. Raises UsageError where another
        process does, where the folder holds a run already, and where it cannot be made."""
        o, name = self.options, self.folder.name
        try:
            for at in itertools.count(2):
                with contextlib.suppress(FileExistsError):
                    self.folder.mkdir(parents=True)
                    break
                if o.resume is not None or o.run is not None:
                    break
                self.folder = self.folder.with_name(f"{name}-{at}")  # another run began in this second
            if not self.folder.is_dir():
                raise UsageError(f"--kv-run {str(self.folder)!r} is no folder")
            self._claim.enter_context(disk.claim(self.folder))
        except OSError as error:
            raise UsageError(f"{str(self.folder)!r} cannot be written: {error.strerror}") from error
        if o.resume is None:
            self._claim.callback(self._remove_empty)
        self.run = RunFolder(self.folder)
        if o.resume is None and any(self.folder.glob("records*.jsonl")):
            said = "already holds a run; name another folder, or --kv-resume it"
            raise UsageError(f"--kv-run {str(self.folder)!r} {said}")

    def release(self) -> None:
        """Let others write to the folder; one in which nothing was left is removed."""
        self._claim.close()

    def _remove_empty(self) -> None:
        with contextlib.suppress(OSError):  # it is not empty
            self.folder.rmdir()
            if self.options.run is None:
                self.folder.parent.rmdir()

    @property
    def tasks(self) -> list[Task]:
        """The tasks asked for."""
        return [tasks.task(name) for name in self.options.tasks]

    @property
    def arms(self) -> Sequence[str]:
        """Names of what this run measures."""
        return self.options.arms

    @cached_property
    def recorded(self) -> dict[Job, Record]:
        """Jobs that need not be done: they were before a run was resumed, or by a worker that this one replaces."""
        if not (self.folder / "run.json").is_file():
            return {}
        return {r.job: r for r in read(self.folder).records if r.job is not None and r.status == "ok"}

    def choose(self, items: Sequence[pytest.Item]) -> None:
        """Take note of the tests that were chosen."""

    def fetch(self, names: Sequence[str], evaluations: Sequence[str]) -> None:
        """Make sure that what these tasks and evaluations need is here. Raises UsageError that says what to run."""
        self.chosen = names
        for name in names:
            tasks.task(name).fetch()

    def check_model(self) -> None:
        """Refuse, with a UsageError, a model that cannot be compared."""

    def announce(self, items: Sequence[pytest.Item]) -> str:
        """What the chosen tests are going to do, in a line; empty where nothing is known."""
        return ""

    def samples(self, task: Task) -> list[Sample]:
        """The run's samples of a task."""
        if task.name not in self._samples:
            o = self.options
            count = o.samples.get(task.name, o.samples[""])
            task.limit, task.cap = o.limit, o.cap
            self._samples[task.name] = task.samples(count, o.length, o.seed, self.count_tokens)
        return self._samples[task.name]

    def count_tokens(self, text: str) -> int:
        """How many tokens a text has."""
        raise NotImplementedError

    def answers(self, name: str) -> Sequence[Answer]:
        """Every arm's answers to a task."""
        raise NotImplementedError

    def expected(self) -> dict[str, Any]:
        """What an arm's records must hold once the run has come to its end, as JSON."""
        found: dict[str, Any] = {"samples": {name: len(self.samples(tasks.task(name))) for name in self.chosen}}
        return found | ({"timings": self.timed_cells} if self.timed_cells else {})

    def facts(self) -> dict[str, Any]:
        """What ``run.json`` says beside what all runs say: model, environment, who is the baseline."""
        raise NotImplementedError

    def known(self) -> dict[str, Any]:
        """What ``run.json`` says of any run, and what can be told before a model is loaded."""
        o = self.options
        return {
            "texts": {task.name: task.fingerprint() for task in self.tasks if not shapes.is_shape(o.model)},
            "plugins": {file.name: environment.fingerprint([file]) for file in registry.loaded()},
            "settings": o.settings(),
            "environment": environment.describe(),
        }

    def record(self, record: Record) -> None:
        """Write one record; the first one is preceded by ``run.json``. The first rank writes for all. Where that cannot
        be, the run ends."""
        if ranks.rank() == 0:
            try:
                self.describe()
                self.run.append(record)
            except UsageError as error:
                self.give_up(f"{error}; what was recorded stays, and --kv-resume {self.folder} goes on")

    def give_up(self, said: str) -> NoReturn:
        """End the run with exit code 4 and a sentence. A worker of pytest-xdist fails its test with it: one that exits
        is taken for one that crashed."""
        if self.worker:
            pytest.fail(said, pytrace=False)
        pytest.exit(said, returncode=pytest.ExitCode.USAGE_ERROR)

    def check_resumed(self) -> None:
        """Raises UsageError where the run that is to go on is another one than this."""
        before, now = read(self.folder).facts, json.loads(json.dumps(self.known()))
        if self.options.resume is not None and (reason := changed(before, now)):
            raise UsageError(f"{str(self.folder)!r} cannot be resumed: {reason}; leave out --kv-resume for a new run")

    def _resume(self, now: str) -> None:
        """A run that goes on may measure more arms and tasks than before."""
        before = read(self.folder).facts
        was, wanted = before.get("expected", {}), self.expected()
        expected = {**was, **wanted, "samples": {**was.get("samples", {}), **wanted["samples"]}}
        if "timings" in was:
            expected["timings"] = max(was["timings"], wanted.get("timings", 0))
        methods = dict.fromkeys([*before["methods"], *self.arms])
        known = self.known()
        self.run.amend(
            {
                "resumed": now,
                "finished": None,
                "methods": list(methods),
                "texts": before["texts"] | known["texts"],
                "settings": before["settings"] | {"tasks": known["settings"]["tasks"]},
                "expected": expected,
                "fitted": before.get("fitted", {}) | self._fitted(),
            }
        )

    def _fitted(self) -> dict[str, Any]:
        return {name: dict(done) for name in self.chosen if (done := tasks.task(name).fitted)}

    def describe(self) -> None:
        """Write ``run.json``, or what is new in that of a run that goes on; once."""
        if self._described:
            return
        self._described = True
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        if self.options.resume is not None:
            self._resume(now)
            return
        o, known, own = self.options, self.known(), self.facts()
        self.run.describe(
            {
                "started": now,
                "command": sys.argv[1:],
                "preset": o.preset,
                "methods": list(self.arms),
                **known,
                "margins": vars(o.margins),
                "expected": self.expected(),
                "fitted": self._fitted(),
                **own,
                "environment": known["environment"] | own.get("environment", {}),
            }
        )
