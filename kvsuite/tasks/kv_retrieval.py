"""kv-retrieval: the value of one key of a JSON object of random keys and values."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from kvsuite import scorers
from kvsuite.errors import UsageError
from kvsuite.tasks.base import Sample, Task

COLOURS = (
    "amber", "black", "blue", "brown", "copper", "coral", "crimson", "golden", "green", "grey", "indigo", "ivory",
    "lilac", "orange", "pink", "purple", "red", "scarlet", "silver", "teal", "violet", "white", "yellow",
)  # fmt: skip
THINGS = (
    "anchor", "basket", "bell", "boat", "book", "bottle", "bridge", "button", "candle", "chair", "clock", "coat", "cup",
    "drum", "flag", "flute", "gate", "hammer", "kettle", "key", "ladder", "lamp", "mirror", "needle", "pillow", "ring",
    "rope", "saddle", "shoe", "spoon", "table", "tower", "vase", "wheel", "window",
)  # fmt: skip
ASK = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
QUESTION = '\n\nKey: "{key}"\nCorresponding value:'


class KvRetrieval(Task):
    """As many pairs as fill the length; the one that is asked for is at random. *Lost in the Middle* (Liu et al. 2024)
    asks for one of many UUIDs, in these words; here a key is two words and a value five digits. Scores 1 where the
    answer holds the value (RULER: string_match_part), else 0; another key's value is the guess. The default model names
    a value, hardly ever that of the key."""

    name = "kv-retrieval"
    type = "synthetic"

    def fetch(self) -> list[Path]:
        return []

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        order, found = random.Random(f"kv-retrieval {seed}"), list[Sample]()
        names = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]
        for at in range(count):
            length, pairs = lengths[at % len(lengths)], dict[str, str]()
            left = length - tokens(ASK + QUESTION.format(key=names[-1]))
            for key in order.sample(names, len(names)):
                value = str(order.randrange(10_000, 100_000))
                left -= tokens(f' "{key}": "{value}",\n')
                if left < 0:
                    break
                pairs[key] = value
            if left >= 0 or not pairs:
                raise UsageError(f"kv-retrieval has no prompts of {length} tokens; it has {len(names)} keys")
            key, body = order.choice([*pairs]), json.dumps(pairs, indent=1)
            name = f"kv-retrieval-l{length}-{at}"
            context, question = ASK + body, QUESTION.format(key=key)
            found.append(Sample(name, context, question, pairs[key], 24, chance=1 / len(pairs)))
        return found

    def score(self, sample: Sample, answer: str) -> float:
        return scorers.string_match_part(answer, [sample.reference])
