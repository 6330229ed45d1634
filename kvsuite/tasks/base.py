"""What a task is, and how one is found by name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import kvsuite.tasks
from kvsuite.errors import UsageError, unknown

Type = Literal["qa", "summarization", "few-shot", "synthetic", "code", "chat"]


@dataclass(frozen=True)
class Sample:
    """One prompt with its reference. ``context`` + ``question`` is the user's message."""

    id: str
    context: str
    question: str
    reference: str
    max_new_tokens: int
    cluster: str = ""
    """The document it was made of, where several samples can be made of one: they are not independent."""


class Task:
    """A named set of samples with a scorer."""

    name: ClassVar[str]
    type: ClassVar[Type]
    evaluation: ClassVar[Literal["samples", "length", "throughput"]] = "samples"
    """What its answers are for: their scores, their lengths, or the time they take."""

    def fetch(self) -> Iterable[Path]:
        """Make sure its texts are here and name their files. Raises UsageError that says what to run."""
        raise NotImplementedError

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        """``count`` samples; prompts of about ``lengths`` tokens in turn, as ``tokens`` counts them. The same arguments
        give the same samples."""
        raise NotImplementedError

    def score(self, sample: Sample, answer: str) -> float | None:
        """From 0 to 1, or None where there is nothing to compare with."""
        raise NotImplementedError


def names() -> list[str]:
    """All tasks, found by file name."""
    found = pkgutil.iter_modules([str(Path(kvsuite.tasks.__path__[0]))])
    return sorted(m.name.replace("_", "-") for m in found if m.name != "base")


def task(name: str) -> Task:
    """The task of that name. Raises UsageError with the nearest known one."""
    if name not in names():
        raise unknown("task", name, names())
    module = importlib.import_module(f"kvsuite.tasks.{name.replace('-', '_')}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__:
            return value()
    raise UsageError(f"{module.__name__} defines no task")
