"""reasoning: small puzzles that are thought through before they are answered: eviction can lengthen the trace, too
(*Hold Onto That Thought*, arXiv 2512.12008)."""

from __future__ import annotations

import importlib
import importlib.util
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvsuite.errors import UsageError
from kvsuite.tasks.base import Sample, Task

PUZZLES: dict[str, dict[str, Any]] = {
    "letter_counting": {"min_words": 3, "max_words": 6},
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
    "spell_backward": {"min_word_len": 3, "max_word_len": 4},
    "word_sorting": {"min_words": 3, "max_words": 4},
}
"""Dataset of reasoning-gym → how hard it is: what a model of 135 million parameters sometimes solves."""
QUESTION = "\n\nThink step by step. Then write the final answer in a line of its own, after 'Answer:'."
ROOM = 384
"""Tokens of a trace and its answer; what is longer is cut and scores what is there."""
SAID = re.compile(r"answer(?: is)?\W*?:|answer is\b", re.IGNORECASE)


class Reasoning(Task):
    """Generators of reasoning-gym (Stojanovski et al. 2025), one after the other. The library's own scorer judges what
    stands behind the last "Answer:", else the last line. Prompts have the length they have."""

    name = "reasoning"
    type = "synthetic"

    def fetch(self) -> list[Path]:
        found = importlib.util.find_spec("reasoning_gym")  # `samples` says what to install where it is missing
        return [] if found is None or found.origin is None else sorted(Path(found.origin).parent.rglob("*.py"))

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        start, found = random.Random(f"reasoning {seed}").randrange(1 << 24), []
        for at in range(count):
            kind, number = list(PUZZLES)[at % len(PUZZLES)], start + at // len(PUZZLES)
            name, row = f"reasoning-{kind}-{number}", _dataset(kind, number)[0]
            found.append(Sample(name, row["question"].strip(), QUESTION, str(row["answer"]), ROOM, cluster=name))
        return found

    def score(self, sample: Sample, answer: str) -> float:
        _, kind, number = sample.id.split("-")
        dataset = _dataset(kind, int(number))
        return float(dataset.score_answer(final(answer), dataset[0]))


def final(answer: str) -> str:
    """What an answer gives as its result: the line after the last "Answer:", else the last line; of an equation what
    is behind its last sign; without marks."""
    *_, last = SAID.split(answer)
    lines = [line for line in last.strip().splitlines() if line.strip()]
    line = (lines[0] if len(SAID.split(answer)) > 1 else lines[-1]) if lines else ""
    return line.rpartition("=")[2].strip(" *$\t").removesuffix(".")


def _dataset(kind: str, seed: int) -> Any:
    """A dataset of one puzzle; raises UsageError without the library."""
    try:
        library = importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise UsageError(f"the task reasoning needs {error.name}: pip install 'kvsuite[reasoning]'") from error
    return library.create_dataset(kind, size=1, seed=seed, **PUZZLES[kind])
