"""Every method against the baseline and its noise: all endpoints of STATISTICS.md from one pass of resampling."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np

from kvsuite.analysis import length, samples
from kvsuite.analysis.resample import DRAWS, Design, Mask, eligible, sign_flip
from kvsuite.analysis.samples import Broken, same_answers
from kvsuite.analysis.stats import Estimate, benjamini_hochberg, counts, discordant_p, estimate
from kvsuite.analysis.verdict import Effect, Named, Verdict, decide, effect, overall
from kvsuite.columns import Arm
from kvsuite.margins import Margins

DEFAULT = Margins()
FLOORED = ("broken", "churn", "truncation", "longer", "shorter")
"""Figures that need the control's answers."""
RULE = Broken()


@dataclass(frozen=True)
class Finding:
    """An exploratory figure: shown beside the endpoints, never a verdict."""

    name: str
    estimate: Estimate | None
    p: float | None
    adjusted: float | None = None
    """After Benjamini and Hochberg, over all exploratory figures of all methods."""
    counts: tuple[int, int] | None = None
    """Samples only the method shows it on, and only the other arm."""


@dataclass(frozen=True)
class Comparison:
    """One method: the primary endpoints that could be measured, and what stands beside them."""

    method: str
    n: int
    effects: list[Effect]
    findings: list[Finding]
    negatives: int | None = None
    """Samples it breaks, of ``eligible``; None without scores."""
    floor: int | None = None
    """Samples that noise alone breaks, of the same; None where no floor was measured."""
    eligible: int = 0

    def effect(self, endpoint: str) -> Effect | None:
        """One of quality, broken, length."""
        return next((e for e in self.effects if e.endpoint == endpoint), None)

    def finding(self, name: str) -> Finding | None:
        """One of the exploratory figures."""
        return next((f for f in self.findings if f.name == name), None)

    def joined(self, other: Comparison) -> Comparison:
        """With what another part of the same method showed."""
        scores = self if self.negatives is not None else other
        effects, findings = self.effects + other.effects, self.findings + other.findings
        return replace(scores, n=self.n + other.n, effects=effects, findings=findings)

    @property
    def verdict(self) -> Verdict:
        """Over all endpoints once they are decided: scores alone, without a floor for broken samples, are never within
        margin."""
        found, quality = overall(self.effects), self.effect("quality")
        unknown = quality is not None and not quality.veto and self.effect("broken") is None
        return "undecided" if unknown and found == "within margin" else found


@dataclass(frozen=True)
class Part:
    """Arms that are compared with each other, aligned (``columns.align``): a run's scored tasks, say, or its chats.

    ``control`` is the baseline once more, other by noise alone; without it, or where its answers are identical, no
    floor is measured. ``coupled`` says that ``base`` and the methods were sampled with the same noise and ``control``
    with other: pairs are then formed with the control, on both sides alike, because coupled answers part later than
    free ones.
    """

    base: Arm
    methods: Mapping[str, Arm]
    control: Arm | None = None
    coupled: bool = False
    asked: int = 0
    """Samples that were to be compared; 0 where that is not known. With fewer, failed ones included, there is no
    verdict."""
    floored: bool = False
    """Whether only the figures that need the control are asked: where it answered fewer samples than the others, these
    are compared without it in another part."""

    extremes: tuple[Part, Part] | None = None
    """The same with failed answers as bad and as good for the method as they could have been (``answered.py``)."""
    repeats: int = 1
    """Entries of each prompt, all of one cluster."""
    acted: bool = False
    """Whether the control's noise is known to have acted, as its logits differ: the same answers are then a floor of
    0."""

    @property
    def pair(self) -> tuple[Arm, Arm | None]:
        """What single samples are held against, and what noise makes of that."""
        control = self.control
        if control is not None and not self.acted and same_answers(self.base, control):
            control = None
        return (control, self.base) if self.coupled and control is not None else (self.base, control)


def compare(
    parts: Sequence[Part], margins: Margins = DEFAULT, rule: Broken = RULE, draws: int = DRAWS, seed: int = 0
) -> list[Comparison]:
    """Every method of every part with its baseline, before verdicts (``decided``). What an arm has no column of –
    scores, lengths – is left out. Raises UsageError where caps differ."""
    found: dict[str, Comparison] = {}
    for part in parts:
        for row in _bounded(part, margins, rule, draws, seed):
            known = found.get(row.method)
            found[row.method] = row if known is None else known.joined(row)
    return _adjusted(list(found.values()))


def _bounded(part: Part, margins: Margins, rule: Broken, draws: int, seed: int) -> Iterator[Comparison]:
    """The figures of answers that did not fail, with bounds and p that hold whatever the others would have been."""
    rows = list(_compare(part, margins, rule, draws, seed))
    if part.extremes is None:
        yield from rows
        return
    poor, rich = (list(_compare(x, margins, rule, draws, seed)) for x in part.extremes)
    for row, worst, best in zip(rows, poor, rich, strict=True):
        yield replace(row, effects=[_between(e, worst, best) for e in row.effects])


def _between(e: Effect, worst: Comparison, best: Comparison) -> Effect:
    """One endpoint; a method that fails scores less and answers shorter, which breaks more and truncates more."""
    one, other = worst.effect(e.endpoint), best.effect(e.endpoint)
    if one is None or other is None:
        return replace(e, estimate=Estimate(e.estimate.mean, *e.estimate.bounds))
    low, high = (one.estimate, other.estimate) if DIRECTIONS[e.endpoint] < 1 else (other.estimate, one.estimate)
    estimate = replace(e.estimate, low=low.low, high=high.high, extremes=(low, high))
    return replace(e, estimate=estimate, lacking=one.lacking, verdict=one.verdict)


def _compare(part: Part, margins: Margins, rule: Broken, draws: int, seed: int) -> Iterator[Comparison]:
    base, (reference, floor) = part.base, part.pair
    design = Design.of(base.dataset, base.cluster)
    scored = samples.scored(reference)
    allowed = eligible(design, reference.score, rule.benign) if scored else np.zeros(len(base), dtype=np.bool_)
    asked = {
        name: samples.ask(design, arm, base, reference, floor, rule, part.acted)
        | length.ask(design, arm, base, reference, floor, part.acted)
        for name, arm in part.methods.items()
    }
    if part.floored:
        asked = {name: a.only(FLOORED) for name, a in asked.items()}
    ratios = [r for a in asked.values() for r in (*a.endpoints.values(), *a.findings.values())]
    estimates = iter(estimate(design, ratios, reference.score if scored else None, rule.benign, draws, seed))
    if not design.independent:  # whole documents: an exact test of single samples would count them several times
        asked = {name: replace(a, flips=a.flips | a.pairs) for name, a in asked.items()}
    columns = [column for a in asked.values() for column in a.flips.values()]
    flipped = iter(sign_flip(design, np.column_stack(columns), draws, seed) if columns else ())
    for name, a in asked.items():
        p = {key: discordant_p(*counts(pair)) for key, pair in a.pairs.items() if key not in a.flips}
        p |= {key: float(next(flipped)) for key in a.flips}
        effects = [_effect(key, next(estimates), margins, allowed, part) for key in a.endpoints]
        tallies = {key: counts(pair) for key, pair in a.pairs.items()}
        findings = [Finding(key, next(estimates), p.get(key), counts=tallies.get(key)) for key in a.findings]
        others = [key for key in a.pairs if key not in a.endpoints and key not in a.findings]
        findings += [Finding(key, None, p[key], counts=tallies[key]) for key in others]
        mine, noise = (_count(x, reference, allowed, rule) for x in (part.methods[name], floor))
        n = 0 if part.floored else len(base) // part.repeats
        yield Comparison(name, n, effects, findings, mine, noise, int(allowed.sum()))


def _count(arm: Arm | None, reference: Arm, allowed: Mask, rule: Broken) -> int | None:
    """How many samples an arm breaks."""
    if arm is None or not (samples.scored(arm) and samples.scored(reference)):
        return None
    return int((allowed & rule.fell(reference.score, arm.score)).sum())


DIRECTIONS: dict[str, Literal[-1, 0, 1]] = {"quality": -1, "broken": 1, "length": 0, "truncation": 1}
"""Whether smaller, larger, or both are worse."""


def _effect(key: str, found: Estimate, margins: Margins, allowed: Mask, part: Part) -> Effect:
    n = int(allowed.sum()) if key == "broken" else len(allowed) // part.repeats
    margin, ratio = getattr(margins, key), key == "length"
    hidden = ratio and length.capped(part.base, margin)
    return effect(key, found, margin, DIRECTIONS[key], n, ratio, len(allowed), part.asked, hidden)


def decided(
    rows: Sequence[Comparison],
    margins: Margins = DEFAULT,
    beside: Sequence[Named] = (),
    withheld: Mapping[str, Collection[str]] = MappingProxyType({}),
) -> tuple[list[Comparison], list[Named]]:
    """The rows, and the endpoints ``beside`` that were measured elsewhere, with the verdicts of all together. Those in
    ``withheld``, by method, are not found within their margins."""
    found = [
        (row.method, replace(e, withheld=e.endpoint in withheld.get(row.method, ())))
        for row in rows
        for e in row.effects
    ]
    effects = iter(decide([*found, *beside], margins))
    judged = [replace(row, effects=[next(effects)[1] for _ in row.effects]) for row in rows]
    return judged, list(effects)


def _adjusted(rows: list[Comparison]) -> list[Comparison]:
    """Benjamini–Hochberg over the exploratory figures of all methods."""
    adjusted = iter(benjamini_hochberg([f.p for row in rows for f in row.findings if f.p is not None]))
    return [
        replace(row, findings=[f if f.p is None else replace(f, adjusted=next(adjusted)) for f in row.findings])
        for row in rows
    ]
