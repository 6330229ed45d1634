"""reference:TASK: the reference answers of a scored task, forced through every arm's cache behind the prompts: how much
less likely a method makes the right answer. A score is 0 or 1; this shows what a method does long before one falls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from kvsuite.errors import UsageError
from kvsuite.tasks.base import Sample, Task

PREFIX = "reference:"


class Reference(Task):
    """The samples of another task; what is forced of a reference is at most as long as an answer may be. Raises
    UsageError for a task whose references are no answers."""

    evaluation = "divergence"

    def __init__(self, scored: Task) -> None:
        if scored.evaluation != "samples" or not scored.literal:
            raise UsageError(f"--kv-tasks {PREFIX}{scored.name}: answers to {scored.name} have no reference to force")
        self.scored = scored
        self.name, self.type = f"{PREFIX}{scored.name}", scored.type

    @property
    def spelled(self) -> str:
        return f"{PREFIX}{self.scored.spelled}"

    def fetch(self) -> Iterable[Path]:
        return self.scored.fetch()

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        found = self.scored.samples(count, lengths, seed, tokens)
        return [replace(s, max_new_tokens=min(s.max_new_tokens, tokens(s.reference))) for s in found]

    def score(self, sample: Sample, answer: str) -> None:
        return None
