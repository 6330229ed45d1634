"""A run whose answers are made by servers, which are all asked the same (`Visits` goes to them)."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from kvsuite import environment, models, tasks
from kvsuite.engines.request import Ask
from kvsuite.errors import UsageError, first_line
from kvsuite.plugin import schedule
from kvsuite.plugin.options import Options
from kvsuite.plugin.schedule import Cell, Period
from kvsuite.plugin.servers import AGAIN, BASELINE, Servers
from kvsuite.plugin.session import Session
from kvsuite.plugin.visits import Visits
from kvsuite.records import Record, Served


class Serving(Session):
    """What is asked and what came back; everything is measured in one go when the first test asks, since servers are
    started and stopped for it."""

    def __init__(self, options: Options, worker: str = "", folder: Path | None = None) -> None:
        """As any session."""
        super().__init__(options, worker, folder)
        self.loads: Sequence[Cell] = ()
        """The cells, where chosen tests time them."""
        self.found: list[Served] = []
        """Every answer so far."""
        self._visits: Visits | None = None

    @property
    def asked(self) -> Servers:
        """What serves."""
        assert self.options.servers is not None
        return self.options.servers

    @cached_property
    def cells(self) -> list[Cell]:
        """The loads that are timed."""
        return schedule.cells(self.options, self.asked)

    def fetch(self, names: Sequence[str], evaluations: Sequence[str]) -> None:
        """Make sure that texts, model and client are here. Raises UsageError."""
        specs = self.asked.specs.values()
        if any(s.kind != "openvino" for s in specs) and importlib.util.find_spec("httpx") is None:
            raise UsageError("asking a server needs httpx: pip install 'kvsuite[client]'")
        if any(s.needs_model for s in specs):
            self.model()
        super().fetch(names, evaluations)
        if "throughput" in evaluations:
            self.loads = self.cells
            if self.asked.workload is None:
                tasks.task(schedule.DIGEST).fetch()
            self.asks(self.loads[0], BASELINE, 0)  # a trace that cannot be read is told before a server is started

    def asks(self, cell: Cell, arm: str, draw: int) -> list[Ask]:
        """A cell's requests: other prompts in every draw, such as a block's, and the same in every arm."""
        return schedule.load_asks(cell, self.options, self.asked, draw, arm, self.count_tokens)

    def requests(self, period: Period) -> int:
        """How many a period has, but for those that search for goodput."""
        timed = sum(len(self.asks(cell, period.arm, period.block)) for cell in self.loads) if period.timed else 0
        return timed + (sum(len(self.samples(tasks.task(n))) for n in self.chosen) if period.answers else 0)

    def record(self, record: Record) -> None:
        """Write one record, and keep an answer."""
        super().record(record)
        if isinstance(record, Served):
            self.found.append(record)

    def model(self) -> Path:
        """What ``{model}`` stands for: the model asked for, else the default one."""
        if self.options.model:
            return models.located(self.options.model).absolute()
        kinds = {s.kind for s in self.asked.specs.values() if s.needs_model}
        return models.default_gguf() if kinds == {"openvino"} else models.default_model()

    def count_tokens(self, text: str) -> int:
        """By the model's own tokenizer where its folder is known, else at 4 characters each."""
        return -(-len(text) // 4) if self.tokenizer is None else self.tokenizer(text)

    @cached_property
    def tokenizer(self) -> Callable[[str], int] | None:
        """The model's own, where its folder is known."""
        known = self.model() if any(s.needs_model for s in self.asked.specs.values()) else self.options.model
        file = models.located(known, "tokenizer.json") / "tokenizer.json" if known else None
        if file is None or not file.is_file() or importlib.util.find_spec("tokenizers") is None:
            return None
        return tokens_by(file)

    def answers(self, name: str) -> list[Served]:
        """Every arm's answers to a task."""
        return [a for a in self.measured() if a.task == name]

    def timed(self, arm: str, cell: str) -> list[Served]:
        """An arm's answers in a cell, of all blocks."""
        return [a for a in self.measured() if a.method == arm and a.cell == cell]

    def measured(self) -> list[Served]:
        """All answers; the first call makes them. A baseline that cannot be started ends the session, in a sentence."""
        if self._visits is None:
            self._visits = Visits(self)
            try:
                asyncio.run(self._visits.all())
            except UsageError as error:
                self.describe()
                pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
        return self.found

    def expected(self) -> dict[str, Any]:
        """The samples of each task, and how many blocks are timed."""
        return super().expected() | ({"blocks": self.options.rounds} if self.loads else {})

    def facts(self) -> dict[str, Any]:
        """Which model is served by what, and which arm is the baseline."""
        known = self._visits.servers if self._visits else {}
        served = next((s.served for s in known.values() if s.served), "?")
        name = "SmolLM2-135M-Instruct" if str(models.cache_folder()) in served else Path(served).name or served
        print_of = hashlib.sha256(served.encode()).hexdigest()
        if any(s.needs_model for s in self.asked.specs.values()):
            path = self.model()
            files = [path] if path.is_file() else [f for f in path.iterdir() if f.suffix in (".safetensors", ".json")]
            print_of = environment.fingerprint(files)
        return {
            "model": {"name": name, "fingerprint": print_of},
            "baseline": BASELINE,
            "controls": [AGAIN],
            "servers": {arm: spec.text for arm, spec in self.asked.specs.items()},
            "cells": [cell.name for cell in self.loads],
            "environment": {"threads": None, "dtype": None, "gpu": None},
        }


def tokens_by(file: Path) -> Callable[[str], int]:
    """How many tokens a text has, by a model's tokenizer.json. Both raise UsageError where it is none that works."""
    from tokenizers import Tokenizer

    def of(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:  # whatever the library finds wrong
            raise UsageError(f"{str(file)!r} is no tokenizer that works: {first_line(error)}") from error

    tokenizer = of(lambda: Tokenizer.from_file(str(file)))

    def tokens(text: str) -> int:
        plain = text.encode(errors="replace").decode()  # the library takes no lone surrogate
        return len(of(lambda: tokenizer.encode(plain, add_special_tokens=False).ids))

    return tokens
