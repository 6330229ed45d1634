"""qa: when was it said? Of excerpts of several messages, each under its president's name and year."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from kvsuite import scorers
from kvsuite.errors import UsageError
from kvsuite.tasks.base import Sample
from kvsuite.tasks.messages import MessageTask, excerpt, president, year

DOCUMENTS = 4
HEAD = "Message of President {name}, {year}:\n{text}\n\n"
QUESTION = "In which year did President {name} give his message?"
BEFORE = (
    ("user", HEAD.format(name="Smith", year=1234, text="The harvest was good.") + QUESTION.format(name="Smith")),
    ("assistant", "1234"),
)
"""How short an answer is to be."""


class Qa(MessageTask):
    """Four excerpts of as many presidents' messages, after an example with its answer; the year of one is asked. The
    score is the F1 of words (LongBench: qa_f1_score); one of the four years is the guess."""

    name = "qa"
    type = "qa"

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        files, order = self.fetch(), random.Random(f"qa {seed}")
        frame = tokens(" ".join(text for _, text in BEFORE) + QUESTION.format(name="Roosevelt"))
        frame += DOCUMENTS * tokens(HEAD.format(name="Roosevelt", year=1900, text=""))
        found: list[Sample] = []
        for _ in range(100 * count):
            if len(found) == count:
                return found
            length, own = lengths[len(found) % len(lengths)], order.sample(files, DOCUMENTS)
            texts = [excerpt(file, order, (length - frame) // DOCUMENTS, tokens) for file in own]
            asked = order.choice(own)
            if len({president(file) for file in own}) < DOCUMENTS or not all(texts):
                continue
            shown = [
                HEAD.format(name=president(file), year=year(file), text=" ".join(text))
                for file, text in zip(own, texts, strict=True)
            ]
            name, question = f"qa-l{length}-{len(found)}", QUESTION.format(name=president(asked))
            found.append(
                Sample(
                    name, "".join(shown), question, str(year(asked)), 16, cluster=asked.stem, before=BEFORE,
                    chance=1 / DOCUMENTS,
                )
            )  # fmt: skip
        if len(found) == count:
            return found
        raise UsageError(f"the presidential messages do not hold {DOCUMENTS} excerpts for --kv-length {min(lengths)}")

    def score(self, sample: Sample, answer: str) -> float:
        return scorers.qa_f1(answer, sample.reference)
