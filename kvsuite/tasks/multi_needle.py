"""multi-needle: several numbers hidden in a presidential message; all are asked for, or one among the others."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from kvsuite import scorers
from kvsuite.errors import UsageError
from kvsuite.tasks.base import Sample
from kvsuite.tasks.messages import MessageTask, first_sentences
from kvsuite.tasks.needle import CITIES, GOLDEN
from kvsuite.tasks.needle import QUESTION as ONE

HIDDEN = 4
"""Numbers in a prompt."""
ALL = "\n\nWhat are the secret numbers of {cities}? Answer with the {count} numbers only."


class MultiNeedle(MessageTask):
    """Four five-digit numbers of four cities, a quarter of the message apart. Half of the samples ask for all, half for
    one (RULER's niah_multiquery and niah_multikey). The score is the share of the numbers asked for that the answer
    names (RULER: string_match_all). Any one hidden number, named by chance, scores a quarter."""

    name = "multi-needle"
    type = "synthetic"

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        files, order = self.fetch(), random.Random(f"multi-needle {seed}")
        order.shuffle(files)
        found: list[Sample] = []
        for text in files * (1 + count):
            if len(found) == count:
                return found
            turn, place = divmod(len(found), len(lengths))
            length, depth = lengths[place], (len(found) * GOLDEN) % 1 / HIDDEN
            cities = order.sample(CITIES, HIDDEN)
            numbers = [str(number) for number in order.sample(range(10_000, 100_000), HIDDEN)]
            needles = [f"The secret number of {c} is {n}." for c, n in zip(cities, numbers, strict=True)]
            asked = order.randrange(HIDDEN)
            if turn % 2:
                question, wanted = ONE.format(city=cities[asked]), numbers[asked : asked + 1]
            else:
                named = f"{', '.join(cities[:-1])} and {cities[-1]}"
                question, wanted = ALL.format(cities=named, count=HIDDEN), numbers
            taken = first_sentences(
                text.read_text(encoding="utf-8"), length - tokens(" ".join(needles) + question), tokens
            )
            if taken is None or len(taken) < HIDDEN:
                continue
            for at in reversed(range(HIDDEN)):
                taken.insert(round((depth + at / HIDDEN) * len(taken)), needles[at])
            name = f"multi-needle-l{length}-{'one' if turn % 2 else 'all'}-{len(found)}"
            found.append(
                Sample(
                    name, " ".join(taken), question, " ".join(wanted), max_new_tokens=16 + 12 * len(wanted),
                    cluster=text.stem, chance=1 / HIDDEN,
                )
            )  # fmt: skip
        if len(found) == count:
            return found
        raise UsageError(f"no presidential message is long enough for --kv-length {max(lengths)}")

    def score(self, sample: Sample, answer: str) -> float:
        return scorers.ruler("niah", answer, sample.reference.split())
