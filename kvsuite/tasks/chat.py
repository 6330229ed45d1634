"""chat: MT-Bench's open prompts, whose answers have no right length."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvsuite import models
from kvsuite.tasks.base import Sample, Task


class Chat(Task):
    """The first turns of MT-Bench (Zheng et al. 2023), 80 prompts of 8 categories, shuffled by the seed. Their answers
    are compared by length, not scored. Prompts have the length they have; more than 80 cannot be had."""

    name = "chat"
    type = "chat"
    evaluation = "length"

    def fetch(self) -> list[Path]:
        return [models.questions() / "question.jsonl"]

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        rows = read(self.fetch()[0])
        random.Random(f"chat {seed}").shuffle(rows)
        return [Sample(_id(row), row["turns"][0], "", "", max_new_tokens=1024) for row in rows[:count]]

    def references(self) -> dict[str, str]:
        good = answered()
        return {_id(row): good[row["question_id"]][0] for row in read(self.fetch()[0]) if row["question_id"] in good}

    def score(self, sample: Sample, answer: str) -> None:
        return None


def _id(row: dict[str, Any]) -> str:
    return f"chat-{row['category']}-{row['question_id']}"


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of MT-Bench's files."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def answered() -> dict[int, list[str]]:
    """MT-Bench's reference answers: to the 30 questions of math, reasoning and coding, by their id, one a turn."""
    return {row["question_id"]: row["choices"][0]["turns"] for row in read(models.references() / "gpt-4.jsonl")}
