"""chat: MT-Bench's open prompts, whose answers have no right length."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

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
        rows = [json.loads(line) for line in self.fetch()[0].read_text().splitlines()]
        random.Random(f"chat {seed}").shuffle(rows)
        return [
            Sample(f"chat-{row['category']}-{row['question_id']}", row["turns"][0], "", "", max_new_tokens=1024)
            for row in rows[:count]
        ]

    def score(self, sample: Sample, answer: str) -> None:
        return None
