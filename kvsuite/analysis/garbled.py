"""Whether a variant answers garbage: broken is not fast, so what is broken is not ranked by speed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvsuite.analysis.length import is_empty, loops
from kvsuite.analysis.resample import Floats, Mask, Places
from kvsuite.analysis.samples import same_answers
from kvsuite.analysis.stats import holm
from kvsuite.analysis.texts import LONG, WORDS, NgramModel, Script, TfidfIndex, Vocabulary, length, squeezed, stuttered
from kvsuite.analysis.verdict import POWER
from kvsuite.columns import Arm, Key
from kvsuite.errors import UsageError

Name = Literal["empty", "repetition", "language", "cap hits", "order", "agreement"]
State = Literal["passed", "failed", "could not tell"]
LEVEL = 0.01
"""How often a variant that differs by noise alone is called broken at most, over all signs."""
FEW = 8
"""Prompts below which nothing is tested."""
SHARE = 0.2
"""Of the prompts: garbage in so many answers is found 4 times of 5, or the check says that it could not tell."""
MOST = 10_000
"""Prompts beyond which nobody asks."""
LEAST: dict[Name, float] = {
    "empty": 0.1,
    "repetition": 0.1,
    "language": 0.1,
    "cap hits": 0.2,
    "order": 0.2,
    "agreement": 0.2,
}
"""The share of answers beyond the floor from which a sign can fail. A sane but lossy variant does end late, or leave
the topic, now and then."""
BLIND: dict[Name, float] = {
    "empty": 0.05,
    "repetition": 0.05,
    "language": 0.05,
    "cap hits": 1 / 3,
    "order": 1 / 3,
    "agreement": 1 / 3,
}
"""The floor that is taken for granted where none was measured; for order and agreement always. A control in nearly the
same letters does not show how far sane answers in other words are from each other: of 16 chats of a 135M model, sampled
twice, a third are no closer to each other than to others', of 64 a fifth."""
GUESSED: tuple[Name, ...] = ("order", "agreement")
"""Signs of which sane answers in other words show some."""
NOISE = 5 / 6
"""Of answers that are noise, the share whose words are no likelier in their order."""
HOPELESS: tuple[Name, ...] = ("empty", "repetition", "language")
"""Signs that one answer can show by itself, without others to compare with."""


@dataclass(frozen=True)
class Sign:
    """One way of being garbage.

    * *empty*: nothing but white space.
    * *repetition*: ends in a loop, or its end is far more repetitive than the baseline's answers, or most of it is
      there twice in a row.
    * *language*: symbols, or a script or language that the baseline does not use, at its start, middle or end.
    * *cap hits*: ended by the cap, 3/2 as long as the baseline's answer or longer, which ended by itself.
    * *order*: its words are no likelier in their order than in another.
    * *agreement*: no closer to the baseline's answer than to its answers to other prompts.
    """

    name: Name
    n: int
    """Answers it could be seen on: the baseline's does not show it; for order and agreement it is long enough."""
    count: int
    """Of these, the variant's answers that show it."""
    floor: int | None
    """The same of the control; None where no floor was measured."""
    back: int
    """Answers of the baseline that show it where the variant's does not: a small model that loops here may as well loop
    there."""
    p: float
    """Exact and one-sided, prompts as wholes: the largest p of all that would explain it: that the control shows it as
    often; without one, and for order and agreement, that no more than the share ``BLIND`` does; that ``back`` is as
    likely as ``count``."""
    adjusted: float
    """After Holm's correction over the signs whose discordant prompts are enough to fail at all."""
    failed: bool
    where: tuple[int, int, int] | None = None
    """Of ``count``, how many show it at their start, in their middle and at their end; None where that is not known."""


@dataclass(frozen=True)
class Example:
    """An answer that shows the sign, beside the baseline's."""

    sample: Key
    sign: Name
    baseline: str
    variant: str


@dataclass(frozen=True)
class Check:
    """What was found. A broken variant has an example and no rank."""

    n: int
    """Answers whose text is known of all arms."""
    signs: tuple[Sign, ...]
    broken: bool
    example: Example | None
    told: int
    """Prompts whose answers garbage would be seen in: they are long enough, or as right as the baseline's, or word for
    word what it said."""
    needed: float
    """So many of them are enough to find garbage in ``SHARE`` of all; infinite where no number is."""
    same: float
    """The share of the prompts whose answers are all word for word the baseline's."""

    @property
    def state(self) -> State:
        """Whether answers are answers."""
        if self.broken:
            return "failed"
        return "passed" if self.told >= self.needed or self.same > 1 - SHARE else "could not tell"


def check(base: Arm, variant: Arm, control: Arm | None) -> Check:
    """Whether ``variant`` is broken, against the baseline's answers to the same prompts; ``control`` is the baseline
    once more and says how often noise alone looks like it. All arms are aligned.

    A sign fails where its adjusted p is at most ``LEVEL`` and its share is ``LEAST`` beyond the floor. With fewer than
    ``FEW`` prompts none can. Broken is also a variant all of whose answers are empty, repetitive or in a wrong language
    where none of the control's is, or so few that it is no chance. Raises UsageError where the arms are not aligned or
    no text was kept."""
    arms = [base, variant, *([control] if control is not None else [])]
    if any(arm.keys != base.keys for arm in arms):
        raise UsageError(f"{variant.source} cannot be checked: it does not answer the same samples as {base.source}")
    at = [i for i in range(len(base)) if all(arm.text[i] is not None for arm in arms)]
    if not at:
        raise UsageError(f"{variant.source} cannot be checked for garbage: the text of the answers was not kept")
    base, *others = (arm.take(at) for arm in arms)
    if control is not None and same_answers(base, others[1]):  # it measures no floor
        others = others[:1]
    prompts = _codes(base.cluster)
    count = int(prompts.max()) + 1
    found = {name: _by_dataset(mark, base, others) for name, mark in MARKS.items()}
    signs = _signs(found, prompts, count < FEW)
    hard = [np.any([found[name].shown(k) for name in HOPELESS], axis=0) for k in range(len(others))]
    alone = [len(np.unique(prompts[hard[0] & ~x])) for x in hard[1:]]
    all_hard = bool(hard[0].all()) and all(0.5**n <= LEVEL or not x.any() for n, x in zip(alone, hard[1:], strict=True))
    failed = [s.name for s in signs if s.failed] or (list(HOPELESS) if all_hard else [])
    example = _example(base, others[0], found, failed) if failed else None
    same = np.array([mine == theirs for mine, theirs in zip(others[0].text, base.text, strict=True)], np.bool_)
    right = (base.score > 0) & (others[0].score >= base.score)
    told = len(np.unique(prompts[same | right | found["language"].told]))
    apart = len(np.unique(prompts[~same]))
    return Check(len(base), signs, bool(failed), example, told, _needed(found, told), 1 - apart / count)


def _needed(found: dict[Name, _Marks], told: int) -> float:
    """How many prompts find garbage in ``SHARE`` of them 4 times of 5, by a sign that single answers show, where noise
    shows it as often as it does here."""
    floor, granted = 0.0, 0.0
    for marks in (found[name] for name in HOPELESS):
        n = max(int(marks.possible.sum()), 1)
        floor = max([floor, *(float(x.sum() / n) for x in (marks.back, *(marks.shown(k) for k in marks.controls)))])
    granted = max(found[name].granted(name) for name in HOPELESS)
    n = max(told, FEW)
    if told >= FEW and _finds(told, floor, granted):
        return told
    while n < MOST and not _finds(n, floor, granted):
        n = math.ceil(1.05 * n)
    return n if n < MOST else math.inf


def _finds(n: int, floor: float, granted: float) -> bool:
    """Whether ``n`` prompts do. ``floor``: the share of them in which noise shows the sign; ``granted``: that which
    may show it without anything being wrong."""
    from scipy.stats import binom

    counts, noise = np.arange(n + 1), round(floor * n)
    p = np.maximum(binom.sf(counts - 1, counts + noise, 0.5), binom.sf(counts - 1, n, granted))
    enough = (len(HOPELESS) * p <= LEVEL) & (counts >= n * (max(floor, granted) + LEAST["language"]))
    least = int(np.argmax(enough)) if enough.any() else n + 1
    return float(binom.sf(least - 1, n, min(SHARE + floor, 1))) >= POWER


def hopeless(base: Arm, variants: Sequence[Arm]) -> list[Mask]:
    """For each variant (n,): which of its answers show one of `HOPELESS` where the baseline's does not. All arms are
    aligned and all texts known."""
    found = ([_by_dataset(MARKS[name], base, [variant]).shown(0) for name in HOPELESS] for variant in variants)
    return [np.any(shown, axis=0) for shown in found]


def senseless(arm: Arm) -> tuple[int, int]:
    """Of how many prompts an arm's answers make no sense by themselves – empty, symbols, no common words, words in no
    order – and of how many that could be told."""
    prompts = _codes(arm.cluster)

    def mark(part: Arm, _: list[Arm]) -> _Marks:
        texts, prompts = _texts(part), _codes(part.cluster)
        script, words = Script(texts), Vocabulary(texts, prompts)
        speech = NgramModel(texts, prompts, most=4)
        odd = np.array([is_empty(text) or script.strange(text) for text in texts], np.bool_) | words.rare(texts)
        odd |= speech.jumbled(texts) & speech.ordered
        told = odd | np.array([length(text) >= LONG for text in texts], np.bool_)
        return _Marks(told, [odd], np.zeros_like(odd), told)

    found = _by_dataset(mark, arm, [arm])
    return len(np.unique(prompts[found.shown(0)])), len(np.unique(prompts[found.told]))


def orderless(bad: int, told: int) -> State:
    """Whether so many of so many prompts without sense are more than a sane model's; of noise it would be five in
    six."""
    from scipy.stats import binom

    sane, counts = BLIND["order"], np.arange(told + 1)
    least = int(np.argmax(np.append(binom.sf(counts - 1, told, sane) <= LEVEL, True)))
    if bad >= least:
        return "failed"
    return "passed" if binom.sf(least - 1, told, NOISE) >= POWER else "could not tell"


@dataclass(frozen=True)
class _Marks:
    """Where a sign is seen: (n,) each."""

    possible: Mask
    """The baseline's answer does not show it, and all that it takes is known."""
    arms: list[Mask]
    """For the variant, and for the control if there is one."""
    back: Mask
    """The baseline's answer shows it, the variant's does not."""
    told: Mask
    """The variant's answer would show it if it were there."""
    where: NDArray[np.bool_] | None = None
    """(n, 3): whether the variant's answer shows it at its start, in its middle, at its end."""

    @property
    def controls(self) -> range:
        """Which ``arms`` are controls."""
        return range(1, len(self.arms))

    def shown(self, k: int) -> Mask:
        """On which answers of an arm it counts."""
        return self.possible & self.arms[k]

    def bar(self, name: Name) -> float:
        """The share of the variant's answers from which it can fail."""
        n = max(int(self.possible.sum()), 1)
        shown = [self.back, *(self.shown(k) for k in self.controls)]
        return max(self.granted(name), *(float(x.sum() / n) for x in shown)) + LEAST[name]

    def granted(self, name: Name) -> float:
        """The share that may show it without anything being wrong; 0 where the control says it."""
        return BLIND[name] if len(self.arms) == 1 or name in GUESSED else 0.0


def _signs(found: dict[Name, _Marks], prompts: Places, few: bool) -> tuple[Sign, ...]:
    """All signs tested and corrected. One that could not reach ``LEVEL`` whatever its discordant prompts said is not in
    the family (Tarone 1990)."""
    tests = {name: _tested(marks, prompts, marks.granted(name)) for name, marks in found.items()}
    counted = [name for name, (_, least) in tests.items() if least <= LEVEL]
    adjusted = dict(zip(counted, holm([tests[name][0] for name in counted]), strict=True))
    signs = []
    for name, marks in found.items():
        n, count, back = (int(x.sum()) for x in (marks.possible, marks.shown(0), marks.back))
        floor = int(marks.shown(1).sum()) if len(marks.arms) > 1 else None
        p = adjusted.get(name, 1.0)
        failed = not few and p <= LEVEL and count >= n * marks.bar(name)
        signs.append(Sign(name, n, count, floor, back, tests[name][0], p, failed, _where(marks)))
    return tuple(signs)


def _where(marks: _Marks) -> tuple[int, int, int] | None:
    """How many of the answers that show a sign do so at their start, in their middle and at their end."""
    if marks.where is None:
        return None
    start, middle, end = (int(x) for x in marks.where[marks.shown(0)].sum(0))
    return start, middle, end


def _tested(marks: _Marks, prompts: Places, blind: float) -> tuple[float, float]:
    """The p of a sign and the least it could have been. Answers to one prompt, or about one document, count once."""
    from scipy.stats import binom

    mine, back, among, *noise = (
        np.bincount(prompts, x.astype(np.float64)).astype(np.float64)
        for x in (marks.shown(0), marks.back, marks.possible, *(marks.shown(k) for k in marks.controls))
    )
    p, _ = _more(mine, back)
    least = 0.0
    if blind:
        k, n = int((2 * mine > among).sum()), int((among > 0).sum())
        p, least = max(p, float(binom.sf(k - 1, n, blind))), blind**n
    if noise:
        against, fewest = _more(mine, noise[0])
        p, least = max(p, against), max(least, fewest)
    return p, least


def _more(mine: Floats, theirs: Floats) -> tuple[float, float]:
    """The p that prompts have more of the one as often as more of the other, and the least it could have been."""
    from scipy.stats import binom

    k, n = int((mine > theirs).sum()), int((mine != theirs).sum())
    return float(binom.sf(k - 1, n, 0.5)), 0.5**n


def _example(base: Arm, variant: Arm, found: dict[Name, _Marks], failed: Sequence[Name]) -> Example:
    """Of the failed sign that most answers show, the answer that shows most signs."""
    sign = max(failed, key=lambda name: found[name].shown(0).sum())
    signs = np.sum([marks.shown(0) for marks in found.values()], axis=0)
    at = int(np.argmax(np.where(found[sign].shown(0), signs, 0)))
    return Example(base.keys[at], sign, base.text[at] or "", variant.text[at] or "")


def _by_dataset(mark: Callable[[Arm, list[Arm]], _Marks], base: Arm, arms: list[Arm]) -> _Marks:
    """Each dataset by itself, as answers of one are alike in length and form; small ones together."""
    sizes = Counter(base.dataset)
    names = np.array([name if sizes[name] >= FEW else "" for name in base.dataset])
    possible, back, told, *marked = (np.zeros(len(base), np.bool_) for _ in range(3 + len(arms)))
    where: NDArray[np.bool_] | None = None
    for name in np.unique(names):
        at = np.flatnonzero(names == name)
        part = mark(base.take(at.tolist()), [arm.take(at.tolist()) for arm in arms])
        possible[at], back[at], told[at] = part.possible, part.back, part.told
        for whole, mine in zip(marked, part.arms, strict=True):
            whole[at] = mine
        if part.where is not None:
            where = np.zeros((len(base), 3), np.bool_) if where is None else where
            where[at] = part.where
    return _Marks(possible, marked, back, told, where)


def _codes(names: Sequence[str]) -> Places:
    return np.unique(np.asarray(names), return_inverse=True)[1].astype(np.intp)


def _texts(arm: Arm) -> list[str]:
    return [text or "" for text in arm.text]


def _each(base: Arm, arms: list[Arm], told: Callable[[str], bool]) -> _Marks:
    told = cache(told)  # many answers are the baseline's
    own, *others = (np.array([told(text) for text in _texts(arm)], np.bool_) for arm in (base, *arms))
    return _Marks(~own, others, own & ~others[0], np.ones_like(own))


def _empty(base: Arm, arms: list[Arm]) -> _Marks:
    return _each(base, arms, is_empty)


def _cap_hits(base: Arm, arms: list[Arm]) -> _Marks:
    known = ~np.any([np.isnan(x.capped) | np.isnan(x.tokens) for x in (base, *arms)], axis=0)

    def late(one: Arm, other: Arm) -> Mask:
        longer = 2 * one.tokens >= 3 * other.tokens
        return np.asarray(known & (one.capped == 1) & (other.capped == 0) & longer)

    return _Marks(known & (base.capped == 0), [late(arm, base) for arm in arms], late(base, arms[0]), known)


TIGHT = 0.25
"""To what part of its size the end of an answer is compressed at least, and to half of what the baseline's are: prose
comes to .5 to .7, tables to .3."""


TWICE_OVER = 2 / 3
"""The share of an answer that is there twice in a row from which every token seems to have been written twice."""


def _repetition(base: Arm, arms: list[Arm]) -> _Marks:
    edge = min(TIGHT, float(np.median([squeezed(text) for text in _texts(base)])) / 2)
    return _each(base, arms, lambda text: loops(text) or squeezed(text) < edge or stuttered(text) > TWICE_OVER)


def _language(base: Arm, arms: list[Arm]) -> _Marks:
    script, prompts = Script(_texts(base)), _codes(base.cluster)
    again = _texts(arms[1]) if len(arms) > 1 else []
    speech, words = NgramModel(_texts(base), prompts, again), Vocabulary(_texts(base), prompts, again)
    strange = (np.array([script.strange(text) for text in _texts(arm)], np.bool_) for arm in (base, *arms))
    foreign = (speech.foreign(_texts(arm)) | words.foreign(_texts(arm)) for arm in (base, *arms))
    seen = [windows | odd[:, None] for windows, odd in zip(foreign, strange, strict=True)]
    own, *others = (np.asarray(windows.any(1)) for windows in seen)
    long = np.array([length(text) >= LONG for text in _texts(arms[0])], np.bool_)
    return _Marks(~own, others, own & ~others[0], long & (speech.known | words.known), seen[1] & ~seen[0])


def _order(base: Arm, arms: list[Arm]) -> _Marks:
    speech = NgramModel(_texts(base), _codes(base.cluster), most=4)
    long = np.array([length(text) >= LONG and len(text.split()) >= WORDS for text in _texts(base)], np.bool_)
    own, *others = (speech.jumbled(_texts(arm)) for arm in (base, *arms))
    return _Marks(long & ~own, others, long & own & ~others[0], long)


VAGUE = 2 / 3
"""The share of the baseline's answers whose halves do not find each other from which no topic can be told: they are too
short, or all the same but for a name or a number."""


def _agreement(base: Arm, arms: list[Arm]) -> _Marks:
    texts, prompts = _texts(base), _codes(base.cluster)
    firsts, seconds = zip(*((text[: len(text) // 2], text[len(text) // 2 :]) for text in texts), strict=True)
    long = np.array([length(text) >= LONG for text in texts], np.bool_)
    topics = TfidfIndex(texts, prompts)
    own, *others = (topics.astray(_texts(arm)) for arm in (base, *arms))
    possible, halves = long & ~own, TfidfIndex(firsts, prompts).astray(seconds)
    if (halves & possible).sum() > VAGUE * possible.sum():
        possible[:] = False
    return _Marks(possible, others, np.zeros(len(base), np.bool_), long)


MARKS: dict[Name, Callable[[Arm, list[Arm]], _Marks]] = {
    "empty": _empty,
    "repetition": _repetition,
    "language": _language,
    "cap hits": _cap_hits,
    "order": _order,
    "agreement": _agreement,
}
