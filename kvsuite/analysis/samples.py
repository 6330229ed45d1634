"""Per method: score, what changed against the baseline, what broke beyond noise, bytes, and speed while answering."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from kvsuite.analysis.divergence import parting
from kvsuite.analysis.endpoints import Endpoints
from kvsuite.analysis.resample import ROUNDING, Design, Floats, Mask, Places, Rule, eligible
from kvsuite.analysis.stats import Interval, Ratio, mean_intervals
from kvsuite.columns import Arm
from kvsuite.errors import UsageError
from kvsuite.records import Answer

Key = TypeVar("Key")


@dataclass(frozen=True)
class SampleRow:
    """One method on one task. Figures that nothing could be measured for are None."""

    method: str
    n: int
    failed: int
    error: str
    """Why the first failed answer failed."""
    score: Interval | None = None
    chance: float = 0.0
    """What guessing scores on these samples; 0 in earlier runs."""
    pairs: int = 0
    same: int = 0
    """Of ``pairs`` answers, those that are the baseline's to the token, or to the letter."""
    parted: Interval | None = None
    """Tokens before the first that is not the baseline's (t_div), median; None where token ids are not known."""
    nbytes: float | None = None
    """Mean bytes held after the prompt."""
    ratio: float | None = None
    """Those bytes as a part of the baseline's on the same samples."""
    read: float | None = None
    """Bytes that the last steps read as a part of those held; None where that was not recorded."""
    fragmentation: float = 0.0
    """Mean share of the slots in use at the end that held no token."""
    prefill: float | None = None
    decode: float | None = None
    """Tokens per second; the first token of an answer belongs to the prefill."""


def sample_rows(answers: Sequence[Answer], base: str = "full") -> list[SampleRow]:
    """One task's answers of all methods, in order of appearance. Failures count as failures, never as scores."""
    arms: dict[str, list[Answer]] = {}
    for a in answers:
        arms.setdefault(a.method, []).append(a)
    good = {method: {a.sample: a for a in arm if a.status == "ok"} for method, arm in arms.items()}
    scores = {method: [a.score for a in arm.values() if a.score is not None] for method, arm in good.items()}
    scored = [method for method, some in scores.items() if some]
    means = dict(zip(scored, mean_intervals([scores[method] for method in scored]), strict=True))
    baseline = good.get(base, {})
    return [_row(method, arm, good[method], baseline, means.get(method)) for method, arm in arms.items()]


def _row(
    method: str, answers: list[Answer], good: dict[str, Answer], baseline: dict[str, Answer], score: Interval | None
) -> SampleRow:
    errors = [a.error for a in answers if a.status == "failed"]
    counts = (method, len(answers), len(errors), errors[0] if errors else "")
    if not good:
        return SampleRow(*counts)
    mine = list(good.values())
    paired = [(a, baseline[a.sample]) for a in mine if a.sample in baseline]
    return SampleRow(
        *counts,
        score=score,
        chance=sum(a.chance for a in mine) / len(mine),
        pairs=len(paired),
        same=sum(a.output_key == b.output_key for a, b in paired),
        parted=parted(paired) if good is not baseline else None,
        nbytes=sum(a.nbytes for a in mine) / len(mine),
        ratio=held_share(good, baseline),
        read=sum(a.read_end for a in mine) / (sum(a.nbytes_end for a in mine) or 1) or None,
        fragmentation=sum(a.fragmentation for a in mine) / len(mine),
        prefill=_rate(sum(a.prompt_tokens for a in mine), sum(a.prefill_seconds for a in mine)),
        decode=_rate(sum(a.length - 1 for a in mine), sum(a.decode_share for a in mine)),
    )


def parted(pairs: Sequence[tuple[Answer, Answer]]) -> Interval | None:
    """The median of t_div of pairs of answers; None where token ids are not known."""
    known = [(a.tokens, b.tokens) for a, b in pairs if a.tokens and b.tokens]
    return parting(known).median if known else None


def held_share(mine: Mapping[Key, Answer], base: Mapping[Key, Answer]) -> float | None:
    """Bytes held after the prompt, as a part of the baseline's on the same samples; None where nothing is known."""
    shared = [key for key in mine if key in base and mine[key].nbytes]
    whole = sum(base[key].nbytes for key in shared)
    return sum(mine[key].nbytes for key in shared) / whole if whole else None


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens and seconds > 0 else None


@dataclass(frozen=True)
class Broken:
    """When an answer counts as broken: its score fell by more than θ of the baseline's. The defaults are the
    endpoint's; everything else (the paper's median rule and ``<=``, another θ, an absolute loss) is exploratory. Raises
    UsageError for a θ outside 0 to 1."""

    theta: float = 0.10
    benign: Rule = "mean"
    inclusive: bool = False
    absolute: bool = False
    """θ is points of the score, not a part of the baseline's."""

    def __post_init__(self) -> None:
        if not 0 < self.theta < 1:
            raise UsageError(f"theta must be a number between 0 and 1, not {self.theta:g}")

    def fell(self, base: Floats | float, score: Floats | float) -> Mask:
        """(n,), or of one sample: whether the score is that far below the baseline's."""
        edge = base - self.theta if self.absolute else (1 - self.theta) * base
        return np.asarray(score <= edge + ROUNDING if self.inclusive else score < edge - ROUNDING)


def scored(arm: Arm) -> bool:
    """Whether every sample of an arm has a score."""
    return not np.isnan(arm.score).any()


def ask(
    design: Design, arm: Arm, base: Arm, reference: Arm, floor: Arm | None, rule: Broken, acted: bool = False
) -> Endpoints:
    """What the scores of one method ask: *quality* against the arm of the same noise, the others against ``reference``,
    as ``floor`` is, which is known to be noise where it ``acted``. Empty without scores."""
    if not (scored(arm) and scored(base) and scored(reference)):
        return Endpoints()
    difference, one, b = arm.score - base.score, arm.score, reference.score
    down, up = harm(design.datasets, b, one, rule)
    asked = Endpoints(
        endpoints={"quality": _quality(base.score, difference)},
        pairs={"net harm": down.astype(float) - up},
    )
    if floor is None or not scored(floor):
        return asked
    known = floored(design, reference, floor, acted)
    mine, noise = rule.fell(b, one), rule.fell(b, floor.score)
    churn, moved = (np.asarray(rule.fell(b, x) | rule.fell(x, b)) for x in (one, floor.score))
    beyond, both = (known * (x.astype(float) - y) for x, y in ((mine, noise), (churn, moved)))
    measured = known.astype(float)
    asked.findings["churn"] = Ratio(both, measured, large=both != 0, bounds=(-1, 1), paired=True)
    asked.pairs["churn"] = both
    allowed = eligible(design, b, rule.benign) & known
    if allowed.any():
        asked.endpoints["broken"] = Ratio(
            beyond, measured, eligible=True, large=beyond != 0, bounds=(-1, 1), paired=True
        )
    return asked


def harm(datasets: Iterable[Places], base: Floats, score: Floats, rule: Broken) -> tuple[Mask, Mask]:
    """(n,) each: the samples that a method broke, and those that it healed, of what one of the two answers well: at
    least as well as both do on average in the sample's dataset."""
    level = np.zeros(len(base))
    for at in datasets:
        level[at] = np.concatenate([base[at], score[at]]).mean()
    high = np.maximum(base, score) >= np.maximum(level, np.nextafter(0, 1))
    return high & rule.fell(base, score), high & rule.fell(score, base)


def _quality(base: Floats, difference: Floats) -> Ratio:
    """What did not change could still fall to 0 or rise to 1."""
    paired, level = bool(np.isin(base, (0, 1)).all() and np.isin(difference, (-1, 0, 1)).all()), float(base.mean())
    large = np.abs(difference) >= 0.5
    return Ratio(difference, large=large, room=(level, 1 - level), bounds=(-1, 1), paired=paired)


def floored(design: Design, reference: Arm, floor: Arm, acted: bool = False) -> Mask:
    """(n,): the samples of datasets in which noise changed anything, all where it is known to have acted; elsewhere no
    floor was measured."""
    if acted:
        return np.ones(len(reference), dtype=np.bool_)
    found = np.zeros(len(reference), dtype=np.bool_)
    for at in design.datasets:
        found[at] = not same_answers(reference.take(at.tolist()), floor.take(at.tolist()))
    return found


def same_answers(one: Arm, other: Arm) -> bool:
    """Whether two arms answered identically: by text where both have it, else by score and length. A control that did
    measured no floor."""
    if all(t is not None for t in one.text) and all(t is not None for t in other.text):
        return one.text == other.text
    columns = ((one.score, other.score), (one.tokens, other.tokens))
    return all(np.array_equal(a, b, equal_nan=True) for a, b in columns)
