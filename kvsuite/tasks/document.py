"""document: a presidential message and how it goes on. Nothing is asked: the continuation is forced through every arm's
cache, for divergence and perplexity."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from kvsuite.errors import UsageError
from kvsuite.tasks.base import Sample
from kvsuite.tasks.messages import MessageTask, first_sentences

POSITIONS = 128
"""Tokens that are forced."""


class Document(MessageTask):
    """Every sample is another message, from a random place in it. ``reference`` is the text that follows the context,
    at least as long as what is forced of it."""

    name = "document"
    type = "text"
    evaluation = "divergence"

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        files, order = self.fetch(), random.Random(f"document {seed}")
        order.shuffle(files)
        found: list[Sample] = []
        begun: set[tuple[str, int]] = set()
        for text in files * (1 + count):  # from another place of a message only where there are too few
            if len(found) == count:
                return found
            length, words = lengths[len(found) % len(lengths)], text.read_text(encoding="utf-8").split()
            start = order.randrange(max(1, len(words) - length - POSITIONS))  # a word is a token or more
            context = first_sentences(" ".join(words[start:]), length, tokens)
            if not context or (text.stem, start) in begun:
                continue
            taken = " ".join(context)
            rest = " " + " ".join(words[start + len(taken.split()) :][: 2 * POSITIONS])
            if tokens(rest) > POSITIONS:
                begun.add((text.stem, start))
                name = f"document-l{length}-{len(found)}"
                found.append(Sample(name, taken, "", rest, POSITIONS, cluster=text.stem))
        if len(found) == count:
            return found
        raise UsageError(f"the presidential messages do not hold {count} documents of {max(lengths)} tokens")

    def score(self, sample: Sample, answer: str) -> None:
        return None
