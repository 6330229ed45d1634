"""What all jobs of a run share, and what whoever does them must offer."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from kvsuite.methods import Method
from kvsuite.records import Answer, Job
from kvsuite.tasks import Sample, Task


@dataclass(frozen=True)
class Setting:
    """What must be known to answer, wherever that is done; it is pickled for other processes."""

    model: Path
    methods: tuple[Method, ...]
    """All arms of the run, the baseline first: what codecs learn, they learn once for all."""
    dtype: str
    device: str
    backend: str
    width: int
    """Rows of each method."""
    compress: Literal["prompt", "context"]
    cap: int
    """Most tokens of an answer."""
    temperature: float
    """Of answers whose length is measured; all others are greedy."""
    repeats: int
    """Answers of an arm to a prompt whose length is measured, each with other noise."""
    seed: int
    timeout: float
    """Seconds; see `TransformersEngine.generate`."""
    memory: float
    """Bytes; as there."""


class Executor(Protocol):
    """Whoever answers."""

    def facts(self) -> dict[str, Any]:
        """Where answers are made, for ``run.json``: threads, gpu, compute_dtype, kv_dtype, dtype_reason."""

    def answers(
        self, task: Task, samples: Sequence[Sample], jobs: Collection[Job], before: Mapping[Job, float]
    ) -> Iterator[Answer]:
        """The answers of some jobs of one task, as they end. ``before``: what was answered earlier, and the seconds it
        took, which count for timeouts. A job that cannot be done ends as a failed answer."""
