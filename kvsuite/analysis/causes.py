"""What a method's cache had lost of the samples that it broke, beside the same of those that it did not.

A figure that is the same in both groups explains nothing. One that differs goes with the damage; that it causes it is
shown only by a method that keeps just that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvsuite.analysis.divergence import first_difference
from kvsuite.analysis.resample import DRAWS, ROUNDING, Design, Floats, eligible
from kvsuite.analysis.samples import Broken
from kvsuite.analysis.stats import Estimate, Interval, mean_interval
from kvsuite.readers.run import answers
from kvsuite.records import Answer, Job, Loss, Run

RULE = Broken()
DROPPED = {
    "span_kept": "tokens of the reference's sentence kept",
    "span_gone": "heads that keep none of them",
    "attention": "attention to tokens not held, over the answer",
    "parting": "the same where the answers part",
}
"""What tells of methods that leave tokens out."""
ROUNDED = {
    "span_k_error": "error of K, the reference's sentence",
    "span_v_error": "error of V, the reference's sentence",
    "k_error": "error of K, the prompt",
    "v_error": "error of V, the prompt",
}
"""What tells of methods that store tokens less accurately."""


@dataclass(frozen=True)
class Looked:
    """One answer that can be looked into: of a method, to a sample that the baseline answers well."""

    method: str
    task: str
    sample: str
    repeat: int
    base: Answer
    cluster: str
    broken: bool
    """The score is below 90 % of the baseline's (``samples.Broken``)."""
    parting: int | None
    """Place of the first differing token."""

    @property
    def job(self) -> Job:
        """The job of its `Loss`."""
        return Job("why", self.method, self.task, self.sample, self.repeat)


def looked_at(run: Run) -> list[Looked]:
    """All such answers of a run's methods, without controls, sample by sample: the baseline's score is over 0, and no
    lower than its mean in the task."""
    by: dict[str, dict[str, dict[str, Answer]]] = {}
    for a in answers(run, "samples"):
        if a.status == "ok" and a.score is not None and not a.repeat:
            by.setdefault(a.task, {}).setdefault(a.method, {})[a.sample] = a
    found = []
    for task, arms in by.items():
        base = arms.get(run.baseline, {})
        if not base:
            continue
        scores = np.array([b.score for b in base.values()], dtype=float)
        allowed = eligible(Design.alone(len(scores)), scores, RULE.benign)
        methods = [method for method in arms if method != run.baseline and not run.is_control(method)]
        for (sample, b), benign in zip(base.items(), allowed, strict=True):
            for method in methods if benign else ():
                if (mine := arms[method].get(sample)) is not None:
                    fell = bool(RULE.fell(float(b.score or 0), float(mine.score or 0)))
                    place = first_difference(mine.tokens, b.tokens)
                    found.append(Looked(method, task, sample, mine.repeat, b, mine.cluster or sample, fell, place))
    return found


@dataclass(frozen=True)
class Contrast:
    """One figure of a method, in both groups; None where a group has none."""

    key: str
    broken: Interval | None
    intact: Interval | None
    difference: Interval | None
    """Broken less intact, with Welch's interval of documents; None where one group has fewer than two of them, or
    nothing differs within either."""
    p: float | None
    """That documents fell into the groups by chance: two-sided, of permutations."""


@dataclass(frozen=True)
class Cause:
    """One method on one task."""

    method: str
    task: str
    broken: int
    """Samples looked at that it broke, and those that it did not."""
    intact: int
    contrasts: list[Contrast]

    @property
    def main(self) -> Contrast | None:
        """The figure that says most: the first that both groups have."""
        return next((c for c in self.contrasts if c.broken and c.intact), next(iter(self.contrasts), None))


def causes(run: Run) -> list[Cause]:
    """Every method and task of which losses were measured (``kvsuite why``)."""
    there = {r.job: r for r in run.records if isinstance(r, Loss) and r.status == "ok"}
    looked = [(one, there[one.job]) for one in looked_at(run) if one.job in there]
    found = []
    for task, method in dict.fromkeys((one.task, one.method) for one, _ in looked):
        mine = [(one, loss) for one, loss in looked if (one.task, one.method) == (task, method)]
        broken, intact = ([pair for pair in mine if pair[0].broken is side] for side in (True, False))
        losses = [loss for _, loss in mine]
        keys = list(DROPPED) if any(loss.kept < 1 for loss in losses) else []
        keys += ROUNDED if any(loss.k_error or loss.v_error for loss in losses) else []
        contrasts = [_contrast(key, broken, intact) for key in keys]
        contrasts = [c for c in contrasts if c.broken or c.intact]
        found.append(Cause(method, task, len(broken), len(intact), contrasts))
    return found


def _contrast(key: str, broken: Sequence[tuple[Looked, Loss]], intact: Sequence[tuple[Looked, Loss]]) -> Contrast:
    one, other = (_documents(key, group) for group in (broken, intact))
    bounded = key in DROPPED
    return Contrast(key, _mean(one, bounded), _mean(other, bounded), _welch(one, other), _permuted(one, other))


def _documents(key: str, group: Sequence[tuple[Looked, Loss]]) -> Floats:
    """(documents,): samples of one document are not independent, so their mean counts once."""
    by: dict[str, list[float]] = {}
    for one, loss in group:
        if (value := getattr(loss, key)) is not None:
            by.setdefault(one.cluster, []).append(value)
    return np.array([np.mean(values) for values in by.values()])


def _mean(x: Floats, bounded: bool) -> Interval | None:
    if not len(x):
        return None
    if bounded:
        return mean_interval(np.clip(x, 0, 1).tolist())
    se = float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return Estimate.of(float(x.mean()), se, len(x) - 1, bounds=(0.0, math.inf))


def _welch(one: Floats, other: Floats) -> Interval | None:
    if min(len(one), len(other)) < 2:
        return None
    parts = [float(x.var(ddof=1)) / len(x) for x in (one, other)]
    se2 = sum(parts)
    if se2 < ROUNDING**2:
        return None
    df = se2**2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (one, other), strict=True))
    return Estimate.of(float(one.mean() - other.mean()), math.sqrt(se2), df)


def _permuted(one: Floats, other: Floats) -> float | None:
    if not (len(one) and len(other)):
        return None
    every, n = np.concatenate([one, other]), len(one)
    drawn = np.random.default_rng(0).permuted(np.tile(every, (DRAWS, 1)), axis=1)
    seen, others = (abs(x[..., :n].mean(-1) - x[..., n:].mean(-1)) for x in (every, drawn))
    return float(1 + (others >= seen - ROUNDING).sum()) / (DRAWS + 1)
