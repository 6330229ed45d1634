"""What the tests of one run share, whoever answers: options, the run's folder, and what has been answered."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvsuite import environment, registry, tasks
from kvsuite.plugin.options import Options
from kvsuite.plugin.progress import Progress
from kvsuite.records import Answer, Record, RunFolder
from kvsuite.tasks import Sample, Task

if TYPE_CHECKING:
    import pytest


class Session:
    """One run; a subclass knows who answers. Nothing is loaded before it is used."""

    def __init__(self, options: Options, worker: str = "", folder: Path | None = None) -> None:
        """``worker`` is the name of a pytest-xdist worker, ``folder`` its controller's run folder."""
        self.options, self.worker = options, worker
        self.folder = folder or options.run or Path("runs") / time.strftime("%Y-%m-%d-%H%M%S")
        self.run = RunFolder(self.folder, worker)
        self.progress = Progress(quiet=bool(worker))
        self.chosen: Sequence[str] = ()
        """The tasks that the chosen tests ask for."""
        self.timed_cells = 0
        """Cells that the chosen tests time in this process."""
        self._described = False
        self._samples: dict[str, list[Sample]] = {}

    @property
    def tasks(self) -> list[Task]:
        """The tasks asked for."""
        return [tasks.task(name) for name in self.options.tasks]

    def fetch(self, names: Sequence[str], evaluations: Sequence[str]) -> None:
        """Make sure that what these tasks and evaluations need is here. Raises UsageError that says what to run."""
        self.chosen = names
        for name in names:
            tasks.task(name).fetch()

    def announce(self, items: Sequence[pytest.Item]) -> str:
        """What the chosen tests are going to do, in a line; empty where nothing is known."""
        return ""

    def samples(self, task: Task) -> list[Sample]:
        """The run's samples of a task."""
        if task.name not in self._samples:
            o = self.options
            self._samples[task.name] = task.samples(o.samples, o.length, o.seed, self.count_tokens)
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

    def record(self, record: Record) -> None:
        """Write one record; the first one is preceded by ``run.json``."""
        if not self._described:
            self.describe()
        self.run.append(record)

    def describe(self) -> None:
        """Write ``run.json``."""
        o, own = self.options, self.facts()
        self.run.describe(
            {
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "command": sys.argv[1:],
                "preset": o.preset,
                "methods": list(o.arms),
                "texts": {task.name: environment.fingerprint(task.fetch()) for task in self.tasks},
                "plugins": {file.name: environment.fingerprint([file]) for file in registry.loaded()},
                "settings": o.settings(),
                "margins": vars(o.margins),
                "expected": self.expected(),
                **own,
                "environment": environment.describe() | own.get("environment", {}),
            }
        )
        self._described = True
