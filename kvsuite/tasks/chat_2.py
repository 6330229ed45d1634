"""chat-2: MT-Bench's second questions, after a first answer that is the same for all."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvsuite import models
from kvsuite.tasks.base import Sample, Task
from kvsuite.tasks.chat import answered, read


class Chat2(Task):
    """The second turns of MT-Bench, each after its first question and the benchmark's own reference answer to that:
    what a method does to a conversation whose beginning it has compressed, not to one that it has led itself. Only the
    30 prompts of math, reasoning and coding have one. Answers are compared by length, not scored."""

    name = "chat-2"
    type = "chat"
    evaluation = "length"

    def fetch(self) -> list[Path]:
        return [models.questions() / "question.jsonl", models.references() / "gpt-4.jsonl"]

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        first = answered()
        rows = [row for row in read(self.fetch()[0]) if row["question_id"] in first]
        random.Random(f"chat-2 {seed}").shuffle(rows)
        found = []
        for row in rows[:count]:
            question, then = row["turns"]
            before = (("user", question), ("assistant", first[row["question_id"]][0]))
            found.append(Sample(_id(row), "", then, "", max_new_tokens=1024, before=before))
        return found

    def references(self) -> dict[str, str]:
        good = answered()
        return {_id(row): good[row["question_id"]][1] for row in read(self.fetch()[0]) if row["question_id"] in good}

    def score(self, sample: Sample, answer: str) -> None:
        return None


def _id(row: dict[str, Any]) -> str:
    return f"chat-2-{row['category']}-{row['question_id']}"
