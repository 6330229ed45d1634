"""needle: a number hidden in a presidential message."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from kvsuite.errors import UsageError
from kvsuite.tasks.base import Sample
from kvsuite.tasks.messages import MessageTask, first_sentences

CITIES = ("Amsterdam", "Bogotá", "Cairo", "Dhaka", "Edinburgh", "Florence", "Geneva", "Hanoi", "Istanbul", "Jakarta")
GOLDEN = 0.6180339887498949
QUESTION = "\n\nWhat is the secret number of {city}? Answer with the number only."


class Needle(MessageTask):
    """One sentence with a five-digit number at a depth of a message cut to length. Depths follow the golden ratio, so
    any number of samples covers them evenly. Scores 1 where the answer names the number, else 0."""

    name = "needle"
    type = "synthetic"

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        files = self.fetch()
        order = random.Random(f"needle {seed}")
        order.shuffle(files)
        found: list[Sample] = []
        texts = iter(files * (1 + count))
        while len(found) < count:
            length, depth = lengths[len(found) % len(lengths)], (0.5 + len(found) * GOLDEN) % 1
            city, number = order.choice(CITIES), str(order.randrange(10_000, 100_000))
            needle, question = f"The secret number of {city} is {number}.", QUESTION.format(city=city)
            text = next(texts, None)
            if text is None:
                raise UsageError(f"no presidential message is long enough for --kv-length {length}")
            sentences = first_sentences(text.read_text(encoding="utf-8"), length - tokens(needle + question), tokens)
            if sentences is None:  # a message shorter than asked for
                continue
            sentences.insert(round(depth * len(sentences)), needle)
            name = f"needle-l{length}-d{round(100 * depth)}-{len(found)}"
            found.append(Sample(name, " ".join(sentences), question, number, max_new_tokens=24, cluster=text.stem))
        return found

    def score(self, sample: Sample, answer: str) -> float:
        numbers = (number.replace(",", "") for number in re.findall(r"\d[\d,]*", answer))
        return float(sample.reference in numbers)
