"""Every answer beside the baseline's to the same sample, and what became of it there."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from kvsuite.analysis.garbled import hopeless
from kvsuite.analysis.samples import Broken, harm
from kvsuite.columns import ArmBuilder
from kvsuite.readers.run import answers
from kvsuite.records import Answer, Forced, Run, Served

Verdict = Literal[
    "failed", "garbled", "regressed", "capped", "longer", "shorter", "flips", "healed", "unpaired", "differs", "same"
]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""The worst first."""
MEANINGS: dict[Verdict, str] = {
    "failed": "one of the two answers failed",
    "garbled": "empty, repetitive or in another language or script, which the baseline's answer is not",
    "regressed": "the score fell by more than a tenth of the baseline's, on a sample that the baseline answers well",
    "capped": "ended by the cap, which the baseline's answer was not",
    "longer": "at least 3/2 as long as the baseline's answer to a chat",
    "shorter": "at most 2/3 as long as the baseline's answer to a chat",
    "flips": "at some position of the forced text, the most likely token is another than the baseline's",
    "healed": "the baseline's score is lower by more than a tenth of this one's, on a sample this arm answers well",
    "unpaired": "the baseline has no answer to this sample",
    "differs": "another answer, and none of the others",
    "same": "the baseline's answer to the token, or to the letter",
}


@dataclass(frozen=True)
class Pair:
    """One answer of an arm, and the baseline's to the same sample."""

    arm: str
    """The method; of the baseline with another seed of sampling, that."""
    answer: Answer
    base: Answer | None
    verdicts: tuple[Verdict, ...]
    """All that apply, the worst first; one at least."""

    @property
    def token(self) -> int | None:
        """Place of the first differing token, from 0; None where there is none or token ids are not known."""
        if self.base is None or isinstance(self.answer, Forced) or not (self.answer.tokens and self.base.tokens):
            return None
        return _first(self.base.tokens, self.answer.tokens)

    @property
    def character(self) -> int | None:
        """Place of the first differing character of the texts, from 0; None where there is none."""
        return None if self.base is None else _first(self.base.text, self.answer.text)

    @property
    def kept(self) -> float | None:
        """Tokens that the cache kept of the prompt, all layers and heads, as a part of the baseline's."""
        return self.answer.kept / self.base.kept if self.base and self.base.kept and self.answer.kept else None

    @property
    def held(self) -> float | None:
        """Bytes held after the prompt as a part of the baseline's; None where that is not known."""
        return self.answer.nbytes / self.base.nbytes if self.base and self.base.nbytes and self.answer.nbytes else None


def perplexity(forced: Forced) -> float | None:
    """Of the text that was forced."""
    return math.exp(-sum(forced.logs) / len(forced.logs)) if forced.logs else None


def pairs(run: Run) -> list[Pair]:
    """All answers of a run to its tasks, arm by arm, without the baseline's own. What was timed under load is left
    out."""
    base: dict[int, dict[Sampled, Answer]] = {}
    arms: dict[tuple[str, int], dict[Sampled, Answer]] = {}
    for a in sorted(answers(run), key=lambda a: a.status == "ok"):  # asked again, it may have succeeded
        if a.method == run.baseline:
            base.setdefault(a.repeat, {})[a.task, a.sample] = a
        if a.method != run.baseline or a.repeat:
            arms.setdefault((a.method, a.repeat), {})[a.task, a.sample] = a
    found = []
    order = {method: at for at, method in enumerate(run.facts.get("methods", ()))}
    for (method, repeat), mine in sorted(arms.items(), key=lambda item: (order.get(item[0][0], len(order)), item[0])):
        beside = base.get(0 if method == run.baseline else repeat, base.get(0, {}))
        found += _pairs(_named(method, repeat), mine, beside)
    return found


Sampled = tuple[str, str]
"""Task and sample."""


def _named(method: str, repeat: int) -> str:
    return method + (f", other seed {repeat}" if repeat > 1 else ", other seed" if repeat else "")


def _pairs(arm: str, mine: dict[Sampled, Answer], base: dict[Sampled, Answer]) -> list[Pair]:
    both = {key: (a, base[key]) for key, a in mine.items() if key in base}
    good = {key: pair for key, pair in both.items() if pair[0].status == pair[1].status == "ok"}
    garbled = _garbled(good)
    regressed, healed = _moved(good)
    found = []
    for key, a in mine.items():
        b = base.get(key)
        if b is None:
            verdicts: list[Verdict] = ["failed"] if a.status != "ok" else ["unpaired"]
        elif key not in good:
            verdicts = ["failed"]
        else:
            marks: dict[Verdict, bool] = {
                "garbled": key in garbled,
                "regressed": key in regressed,
                "healed": key in healed,
            }
            verdicts = _verdicts(a, b, marks)
        found.append(Pair(arm, a, b, tuple(verdicts)))
    return found


def _verdicts(a: Answer, b: Answer, marks: dict[Verdict, bool]) -> list[Verdict]:
    """Of two answers that are both there; ``marks`` are those that take all answers to tell."""
    if isinstance(a, Forced):
        marks |= {"flips": any(a.flips), "same": not any(a.kl) and not any(a.flips)}
    else:
        chat = a.evaluation == "length"
        marks["capped"] = a.finish == "length" != b.finish
        marks["longer"] = chat and 2 * a.length >= 3 * b.length and a.length > b.length
        marks["shorter"] = chat and 3 * a.length <= 2 * b.length and a.length < b.length
        marks["same"] = a.output_key == b.output_key
    return [verdict for verdict in VERDICTS if marks.get(verdict)] or ["differs"]


def _garbled(good: dict[Sampled, tuple[Answer, Answer]]) -> set[Sampled]:
    keys = [key for key, (a, _) in good.items() if not isinstance(a, Forced)]
    if not keys:
        return set()
    arms = []
    for side in (1, 0):
        builder = ArmBuilder("")
        for task, sample in keys:
            builder.add("", task, sample, text=said(good[task, sample][side]))
        arms.append(builder.arm())
    [shown] = hopeless(arms[0], arms[1:])
    return set(itertools.compress(keys, shown))


def said(answer: Answer) -> str:
    """All that an answer says: of a server its reasoning and the tools it called, too."""
    if not isinstance(answer, Served):
        return answer.text
    return "\n".join(filter(None, (answer.reasoning, answer.text, answer.calls)))


def _moved(good: dict[Sampled, tuple[Answer, Answer]]) -> tuple[set[Sampled], set[Sampled]]:
    """What an arm broke, and what it healed, as *net harm* counts them."""
    scored = [(key, a.score, b.score) for key, (a, b) in good.items() if a.score is not None and b.score is not None]
    if not scored:
        return set(), set()
    keys, mine, theirs = zip(*scored, strict=True)
    tasks = np.array([task for task, _ in keys])
    datasets = [np.flatnonzero(tasks == task) for task in dict.fromkeys(tasks.tolist())]
    down, up = harm(datasets, np.array(theirs, dtype=float), np.array(mine, dtype=float), Broken())
    return set(itertools.compress(keys, down)), set(itertools.compress(keys, up))


def _first(one: Sequence[object], other: Sequence[object]) -> int | None:
    """Place from which two sequences are not the same."""
    if one == other:
        return None
    both: Iterable[tuple[object, object]] = zip(one, other, strict=False)
    return next((at for at, (x, y) in enumerate(both) if x != y), min(len(one), len(other)))
