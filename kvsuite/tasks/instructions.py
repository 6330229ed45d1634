"""instructions: several rules for one answer, in the system prompt or before a long document."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from kvsuite import ifeval
from kvsuite.errors import UsageError
from kvsuite.tasks.base import Sample
from kvsuite.tasks.messages import MessageTask, first_sentences

ASKED = 3
"""Rules of a sample."""
WORDS = ("banana", "guitar", "penguin", "volcano", "bicycle", "lantern", "pepper", "violin")
ENDS = ("That is all.", "Ask me anything.", "Have a good day.", "I am done.")
TEXTS = {
    "change_case:english_capital": "Write in capital letters only.",
    "change_case:english_lowercase": "Write in lower case letters only.",
    "detectable_format:number_bullet_lists": "Write exactly {} bullet points, each beginning with *.",
    "detectable_format:title": "Begin with a title in double angular brackets, such as <<title>>.",
    "keywords:existence": "Use the word {}.",
    "punctuation:no_comma": "Do not use any commas.",
    "startend:end_checker": "End with the exact words: {}",
}
HEAD = "You always follow these rules in your answers:\n{}"
FIRST = "What are horses?"
HORSES = ("Horses are strong animals", "They can run very fast", "People ride them", "They eat grass", "They live long")
QUESTION = "\n\nWhat is this message about? Follow all the rules."


class Instructions(MessageTask):
    """Three of IFEval's rules and an answer that keeps them, then a presidential message and a question about it. In
    every other sample the rules are the system prompt, in the others they begin the user's first message; in both the
    long text stands between them and the answer. The score is the share of rules that the answer keeps (IFEval, strict,
    by instruction). Some are kept by accident: a short answer may have no commas."""

    name = "instructions"
    type = "chat"
    literal = False  # it is the rules

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        files, order = self.fetch(), random.Random(f"instructions {seed}")
        order.shuffle(files)
        found: list[Sample] = []
        for text in files * (1 + count):
            if len(found) == count:
                return found
            turn, place = divmod(len(found), len(lengths))
            length, rules = lengths[place], _rules(order)
            head = HEAD.format("\n".join(f"{at}. {TEXTS[r].format(v)}" for at, (r, v) in enumerate(rules, 1)))
            where = ("system", "user")[turn % 2]
            asked = (("system", head), ("user", FIRST)) if where == "system" else (("user", f"{head}\n\n{FIRST}"),)
            before = (*asked, ("assistant", _kept(dict(rules))))
            frame = tokens(" ".join(said for _, said in before) + QUESTION)
            taken = first_sentences(text.read_text(encoding="utf-8"), length - frame, tokens)
            if not taken:
                continue
            name = f"instructions-l{length}-{where}-{len(found)}"
            wanted = json.dumps(rules)
            found.append(Sample(name, " ".join(taken), QUESTION, wanted, 96, cluster=text.stem, before=before))
        if len(found) == count:
            return found
        raise UsageError(f"no presidential message is long enough for --kv-length {max(lengths)}")

    def score(self, sample: Sample, answer: str) -> float:
        rules = json.loads(sample.reference)
        return sum(ifeval.followed(rule, value, answer) for rule, value in rules) / len(rules)


def _rules(order: random.Random) -> list[tuple[str, Any]]:
    """Names of rules and what they are about; at most one of the two cases."""
    left_out = order.choice(["change_case:english_capital", "change_case:english_lowercase"])
    values = {
        "detectable_format:number_bullet_lists": order.randrange(2, 6),
        "keywords:existence": order.choice(WORDS),
        "startend:end_checker": order.choice(ENDS),
    }
    chosen = order.sample([rule for rule in TEXTS if rule != left_out], ASKED)
    return [(rule, values.get(rule)) for rule in chosen]


def _kept(rules: dict[str, Any]) -> str:
    """An answer to `FIRST` that keeps the rules."""
    bullets = rules.get("detectable_format:number_bullet_lists", 0)
    lines = [f"* {said}" for said in HORSES[:bullets]] if bullets else [". ".join(HORSES) + "."]
    if "detectable_format:title" in rules:
        lines.insert(0, "<<Horses>>")
    if "keywords:existence" in rules:
        lines[-1] += f" like a {rules['keywords:existence']}"
    lines += [rules["startend:end_checker"]] if "startend:end_checker" in rules else []
    answer = "\n".join(lines)
    if "change_case:english_capital" in rules:
        return answer.upper()
    return answer.lower() if "change_case:english_lowercase" in rules else answer
