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
from kvsuite.columns import Arm, ArmBuilder
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
    def compared(self) -> bool:
        """Whether there are two answers to look at: none failed, and no document was forced instead."""
        good = self.base is not None and self.base.status == self.answer.status == "ok"
        return good and not isinstance(self.answer, Forced)

    @property
    def token(self) -> int | None:
        """Place of the first differing token, from 0; None where there is none or token ids are not known."""
        if self.base is None or not self.compared or not (self.answer.tokens and self.base.tokens):
            return None
        return _first(self.base.tokens, self.answer.tokens)

    @property
    def character(self) -> int | None:
        """Place of the first differing character of the texts, from 0; None where there is none."""
        return _first(self.base.text, self.answer.text) if self.base is not None and self.compared else None

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


Sampled = tuple[str, str]
"""Task and sample."""
Answers = dict[Sampled, Answer]


def pairs(run: Run) -> list[Pair]:
    """All answers of a run to its tasks, arm by arm, without the baseline's own. What was timed under load is left
    out."""
    arms: dict[tuple[str, int], Answers] = {}
    for a in sorted(answers(run), key=lambda a: a.status == "ok"):  # asked again, it may have succeeded
        arms.setdefault((a.method, a.repeat), {})[a.task, a.sample] = a
    order = {method: at for at, method in enumerate(run.facts.get("methods", ()))}
    first = (run.baseline, 0)
    ordered = sorted(arms.keys() - {first}, key=lambda arm: (order.get(arm[0], len(order)), arm))
    beside: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for arm in ordered:
        seed = (run.baseline, arm[1])  # the same noise of sampling
        beside.setdefault(seed if seed in arms and seed != arm else first, []).append(arm)
    found: dict[tuple[str, int], list[Pair]] = {}
    for base, mine in beside.items():
        theirs = arms.get(base, {})
        garbled = _garbled(theirs, [_good(arms[arm], theirs) for arm in mine])
        found |= {
            arm: _pairs(_named(*arm), arms[arm], theirs, marked) for arm, marked in zip(mine, garbled, strict=True)
        }
    return [pair for arm in ordered for pair in found[arm]]


def _named(method: str, repeat: int) -> str:
    return method + (f", other seed {repeat}" if repeat > 1 else ", other seed" if repeat else "")


def _good(mine: Answers, theirs: Answers) -> Answers:
    """The answers that are there on both sides."""
    return {k: a for k, a in mine.items() if a.status == "ok" and k in theirs and theirs[k].status == "ok"}


def _pairs(arm: str, mine: Answers, base: Answers, garbled: set[Sampled]) -> list[Pair]:
    good = _good(mine, base)
    regressed, healed = _moved(good, base)
    found = []
    for key, a in mine.items():
        verdicts: list[Verdict] = ["failed"] if a.status != "ok" or key in base else ["unpaired"]
        if key in good:
            marks: dict[Verdict, bool] = {
                "garbled": key in garbled,
                "regressed": key in regressed,
                "healed": key in healed,
            }
            verdicts = _verdicts(a, base[key], marks)
        found.append(Pair(arm, a, base.get(key), tuple(verdicts)))
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


def _garbled(base: Answers, arms: Sequence[Answers]) -> list[set[Sampled]]:
    """For each arm what is garbled of its answers to what the baseline answered. What an arm lacks stands in as the
    baseline's answer, beside which it shows nothing."""
    keys = [key for key, b in base.items() if b.status == "ok" and not isinstance(b, Forced)]
    if not keys:
        return [set() for _ in arms]
    mine = [_texts(keys, {**base, **arm}) for arm in arms]
    return [set(itertools.compress(keys, shown)) for shown in hopeless(_texts(keys, base), mine)]


def _texts(keys: Iterable[Sampled], said: Answers) -> Arm:
    builder = ArmBuilder("")
    for task, sample in keys:
        builder.add("", task, sample, text=_said(said[task, sample]))
    return builder.arm()


def _said(answer: Answer) -> str:
    """All that an answer says: of a server its reasoning and the tools it called, too."""
    if not isinstance(answer, Served):
        return answer.text
    return "\n".join(filter(None, (answer.reasoning, answer.text, answer.calls)))


def _moved(good: Answers, base: Answers) -> tuple[set[Sampled], set[Sampled]]:
    """What an arm broke, and what it healed, as *net harm* counts them."""
    scored = [(key, a.score, base[key].score) for key, a in good.items() if a.score is not None]
    known = [(key, score, theirs) for key, score, theirs in scored if theirs is not None]
    if not known:
        return set(), set()
    keys, mine, theirs = zip(*known, strict=True)
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
