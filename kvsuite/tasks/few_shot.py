"""few-shot: whether a text is old or modern, told by examples that are turns of a conversation."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from kvsuite import scorers
from kvsuite.errors import UsageError
from kvsuite.tasks.base import Sample
from kvsuite.tasks.messages import MessageTask, excerpt, year

CLASSES = ("old", "modern")
UNTIL, SINCE = 1850, 1950
EXCERPT = 60
"""Tokens of an example's text."""
QUESTION = "Is this text old or modern?\n\n{}"


class FewShot(MessageTask):
    """Excerpts of presidential messages until 1850 and since 1950, in pairs of both in either order, as many as fill
    the length. Each is the user's, its class the assistant's; the last one is asked. The score is 1 where the first
    line of the answer names the right class and no other (LongBench: trec); half is the guess."""

    name = "few-shot"
    type = "few-shot"

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        order, found = random.Random(f"few-shot {seed}"), list[Sample]()
        files = [f for f in self.fetch() if year(f) <= UNTIL], [f for f in self.fetch() if year(f) >= SINCE]

        def example(which: int) -> tuple[str, str]:
            for _ in range(100):
                file = order.choice(files[which])
                if taken := excerpt(file, order, EXCERPT, tokens):
                    return file.stem, QUESTION.format(" ".join(taken))
            raise UsageError(f"the presidential messages hold no excerpts of {EXCERPT} tokens")

        for at in range(count):
            length, asked = lengths[at % len(lengths)], order.randrange(len(CLASSES))
            stem, question = example(asked)
            before, left = list[tuple[str, str]](), length - tokens(question)
            while left > 0:
                for which in order.sample(range(len(CLASSES)), len(CLASSES)):
                    text = example(which)[1]
                    left -= tokens(text) + tokens(CLASSES[which])
                    if left > 0:
                        before += [("user", text), ("assistant", CLASSES[which])]
            name = f"few-shot-l{length}-{at}"
            found.append(
                Sample(
                    name, "", question, CLASSES[asked], 8, cluster=stem, before=tuple(before), chance=1 / len(CLASSES)
                )
            )
        return found

    def score(self, sample: Sample, answer: str) -> float:
        return scorers.longbench("trec", answer.lower(), [sample.reference], CLASSES)
