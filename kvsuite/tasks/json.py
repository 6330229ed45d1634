"""json: facts of a document as a JSON object of given keys."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence

from kvsuite import ifeval
from kvsuite.errors import UsageError
from kvsuite.tasks.base import Sample
from kvsuite.tasks.messages import MessageTask, first_sentences

SHIPS = ("Aurora", "Beagle", "Calypso", "Dolphin", "Endeavour", "Falcon", "Gloria", "Hermes")
PORTS = ("Lisbon", "Bergen", "Naples", "Havana", "Boston", "Dublin", "Odessa", "Manila")
CAPTAINS = ("Hansen", "Moreau", "Rossi", "Novak", "Tanaka", "Okafor", "Silva", "Larsen")
FACTS = (
    "The ship {ship} sailed from the port of {port}.",
    "The captain of the ship {ship} was {captain}.",
    "There were {sailors} sailors on the ship {ship}.",
)
QUESTION = "\n\nGive port, captain and sailors of the ship {ship} as a JSON object."
EXAMPLE = {"port": "Calais", "captain": "Berg", "sailors": 12}
BEFORE = (
    ("user", (" ".join(FACTS) + QUESTION).format(ship="Comet", **EXAMPLE)),
    ("assistant", json.dumps(EXAMPLE)),
)
"""What the object is to look like."""


class Json(MessageTask):
    """Three facts about a ship, hidden in a presidential message, after an example with its answer. The score is the
    mean of three parts: whether the answer is a JSON object (IFEval: json_format), its share of the keys, and of the
    values. A value counts where its text is the fact's, in either case."""

    name = "json"
    type = "qa"

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        files, order = self.fetch(), random.Random(f"json {seed}")
        order.shuffle(files)
        frame = tokens(" ".join(text for _, text in BEFORE))
        found: list[Sample] = []
        for text in files * (1 + count):
            if len(found) == count:
                return found
            length, ship = lengths[len(found) % len(lengths)], order.choice(SHIPS)
            facts = {
                "port": order.choice(PORTS),
                "captain": order.choice(CAPTAINS),
                "sailors": order.randrange(20, 100),
            }
            said = [fact.format(ship=ship, **facts) for fact in FACTS]
            question = QUESTION.format(ship=ship)
            taken = first_sentences(
                text.read_text(encoding="utf-8"), length - frame - tokens(" ".join(said) + question), tokens
            )
            if not taken:
                continue
            for fact in said:
                taken.insert(order.randrange(len(taken) + 1), fact)
            name = f"json-l{length}-{len(found)}"
            wanted = json.dumps(facts)
            found.append(Sample(name, " ".join(taken), question, wanted, 64, cluster=text.stem, before=BEFORE))
        if len(found) == count:
            return found
        raise UsageError(f"no presidential message is long enough for --kv-length {max(lengths)}")

    def score(self, sample: Sample, answer: str) -> float:
        wanted, said = json.loads(sample.reference), ifeval.parsed(answer)
        if not isinstance(said, dict):
            return 0.0
        keys = sum(key in said for key in wanted)
        values = sum(str(said.get(key)).strip().lower() == str(value).lower() for key, value in wanted.items())
        return (1 + keys / len(wanted) + values / len(wanted)) / 3
