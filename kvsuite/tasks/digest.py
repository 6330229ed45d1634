"""digest: a presidential message to be summarized, cut to length: what servers are timed on."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from kvsuite.errors import UsageError
from kvsuite.tasks.base import Sample
from kvsuite.tasks.messages import MessageTask, first_sentences

LONGEST = 1 << 16
"""Tokens of an answer: the run's cap decides."""
QUESTION = "\n\nSummarize this message."


class Digest(MessageTask):
    """Every sample is another message, or another part of one, so that no prompt begins like another. Answers end
    where the model ends them; they are timed, not scored."""

    name = "digest"
    type = "summarization"
    evaluation = "throughput"

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        files = self.fetch()
        order = random.Random(f"digest {seed}")
        found: list[Sample] = []
        begun: set[tuple[str, int]] = set()
        for _ in range(100 * count):
            if len(found) == count:
                return found
            text, length = order.choice(files), lengths[len(found) % len(lengths)]
            words = text.read_text(encoding="utf-8").split()
            start = order.randrange(max(1, len(words) - length // 2))  # a token is a part of a word
            if (text.stem, start) in begun:
                continue
            begun.add((text.stem, start))
            taken = first_sentences(" ".join(words[start:]), length - tokens(QUESTION), tokens)
            if taken:
                name = f"digest-l{length}-{len(found)}"
                found.append(Sample(name, " ".join(taken), QUESTION, "", max_new_tokens=LONGEST, cluster=text.stem))
        raise UsageError(f"the presidential messages do not hold {count} different prompts of {max(lengths)} tokens")

    def score(self, sample: Sample, answer: str) -> None:
        return None
