"""passage-count: how many different passages there are among some that come twice."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from kvsuite import scorers
from kvsuite.errors import UsageError
from kvsuite.tasks.base import Sample
from kvsuite.tasks.messages import MessageTask, excerpt

PASSAGES = 6
FEWEST = 3
ASK = (
    "There are some paragraphs below, taken from messages of presidents. Some of them are duplicates. Count the "
    "different ones.\n\n"
)
QUESTION = (
    "\n\nHow many different paragraphs are there, after the duplicates are removed? There are 3, 4, 5 or 6. "
    "Answer with the number only."
)


class PassageCount(MessageTask):
    """LongBench's passage_count on presidential messages: 6 passages, of which 3 to 6 are different. The score is the
    part of the answer's numbers that are right (LongBench: count_score); one of the four counts is the guess, which the
    default model does not reach."""

    name = "passage-count"
    type = "synthetic"

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        files, order = self.fetch(), random.Random(f"passage-count {seed}")
        frame = tokens(ASK + QUESTION) + tokens(_shown([""] * PASSAGES))
        found: list[Sample] = []
        for at in range(count):
            length, different = lengths[at % len(lengths)], order.randrange(FEWEST, PASSAGES + 1)
            own: dict[str, None] = {}
            for _ in range(100):
                if len(own) < different:
                    taken = excerpt(order.choice(files), order, (length - frame) // PASSAGES, tokens)
                    own |= {" ".join(taken): None} if taken else {}
            if len(own) < different:
                raise UsageError(f"--kv-length {length} is too short for {PASSAGES} passages")
            passages = [*own, *order.choices([*own], k=PASSAGES - different)]
            order.shuffle(passages)
            name = f"passage-count-l{length}-{at}"
            chance = 1 / (PASSAGES + 1 - FEWEST)
            found.append(Sample(name, ASK + _shown(passages), QUESTION, str(different), 16, chance=chance))
        return found

    def score(self, sample: Sample, answer: str) -> float:
        return scorers.count(answer, sample.reference)


def _shown(passages: Sequence[str]) -> str:
    return "\n\n".join(f"Paragraph {at}: {text}" for at, text in enumerate(passages, 1))
