"""What a length predictor is worth on prompts it has not seen, beside predictors that know less, and beside what the
baseline's own second answer tells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvsuite.analysis.resample import Floats
from kvsuite.errors import UsageError
from kvsuite.predict import learner
from kvsuite.predict.length import LEVELS, Entry, Lengths, Predictor, Quantiles, concordant, pinball

FOLDS = 5
DRAWS = 2000
LEAST = 10
"""Prompts."""
Fit = Callable[[Sequence[Entry], Floats, Sequence[Entry], Floats], Floats]
"""Training entries and their features, entries to be predicted and theirs → (n, levels)."""


@dataclass(frozen=True)
class LengthScore:
    """What one predictor is worth; intervals 95 %, of prompts."""

    what: str
    """The baseline's length, the methods' lengths, or their change."""
    predictor: str
    n: int
    prompts: int
    concordance: tuple[float, float, float]
    """Harrell's, and the interval's ends: of pairs of prompts under one method whose order is known."""
    loss: tuple[float, float, float]
    """Pinball, mean over the levels: tokens; of a change, log ratio."""
    better: bool | None
    """Whether the learned predictor's loss is surely less; None for itself, and for the ceiling."""


def told(lengths: Lengths, x: Floats, seed: int = 0) -> list[LengthScore]:
    """``x``: the entries' features. A document's prompts are left out together. Raises UsageError for few prompts."""
    entries, base = lengths.entries, lengths.baseline
    prompts = {e.group for e in entries}
    if len(prompts) < LEAST:
        raise UsageError(f"{len(prompts)} prompts cannot say what a predictor is worth; {LEAST} at least")
    plain = [at for at, e in enumerate(entries) if e.method == base]
    others = [at for at, e in enumerate(entries) if e.method != base and e.base is not None]
    changed = [at for at in others if entries[at].change is not None]
    found = _compare(
        "the baseline's length", entries, x, plain, _length,
        {"learned": _learned(lengths), "training median": _constant(_log_length),
         "prompt's length alone": _one(_tokens, _log_length)}, lengths.cap, seed,
    )  # fmt: skip
    if lengths.twice:
        found.append(_ceiling(lengths, seed))
    if others:
        nulls: dict[str, Fit] = {"learned": _learned(lengths), "training median": _constant(_log_length)}
        nulls |= {"prompt's length alone": _one(_tokens, _log_length), "full cache's length": _one(_base, _log_length)}
        nulls["no change"] = lambda known, a, out, b: np.repeat(_base(out)[:, None], len(LEVELS), 1)
        found += _compare("methods' lengths", entries, x, others, _length, nulls, lengths.cap, seed)
    if len({entries[at].group for at in changed}) >= LEAST:
        nulls = {"learned": _changes, "training median": _constant(_change)}
        nulls["no change"] = lambda known, a, out, b: np.zeros((len(out), len(LEVELS)))
        found += _compare("methods' change", entries, x, changed, _change, nulls, None, seed)
    return found


def _length(some: Sequence[Entry]) -> Floats:
    return np.array([e.length for e in some])


def _log_length(some: Sequence[Entry]) -> Floats:
    return np.log1p(_length(some))


def _tokens(some: Sequence[Entry]) -> Floats:
    return np.log1p([e.tokens for e in some])


def _base(some: Sequence[Entry]) -> Floats:
    return np.log1p([float(e.base or 0) for e in some])


def _change(some: Sequence[Entry]) -> Floats:
    return np.array([float(e.change or 0) for e in some])


def _learned(lengths: Lengths) -> Fit:
    def fit(known: Sequence[Entry], a: Floats, out: Sequence[Entry], b: Floats) -> Floats:
        return np.log1p(Predictor.learned(lengths, a, known).lengths(b, [e.method for e in out]))

    return fit


def _changes(known: Sequence[Entry], a: Floats, out: Sequence[Entry], b: Floats) -> Floats:
    fitted = Quantiles.learned(a, [e.method for e in known], _change(known), [e.group for e in known])
    return fitted(b, [e.method for e in out])


def _constant(figure: Callable[[Sequence[Entry]], Floats]) -> Fit:
    """Each method's quantiles, whatever the prompt."""

    def fit(known: Sequence[Entry], a: Floats, out: Sequence[Entry], b: Floats) -> Floats:
        by = {
            name: np.quantile(figure([e for e in known if e.method == name]), LEVELS)
            for name in {e.method for e in known}
        }
        return np.array([by[e.method] for e in out])

    return fit


def _one(feature: Callable[[Sequence[Entry]], Floats], figure: Callable[[Sequence[Entry]], Floats]) -> Fit:
    """Quantile regression on one feature and the method."""

    def fit(known: Sequence[Entry], a: Floats, out: Sequence[Entry], b: Floats) -> Floats:
        alone, asked = np.zeros_like(a), np.zeros_like(b)
        alone[:, 0], asked[:, 0] = feature(known), feature(out)
        fitted = Quantiles.learned(alone, [e.method for e in known], figure(known))
        return fitted(asked, [e.method for e in out])

    return fit


def _compare(
    what: str, entries: Sequence[Entry], x: Floats, at: Sequence[int], figure: Callable[[Sequence[Entry]], Floats],
    fits: dict[str, Fit], cap: int | None, seed: int,
) -> list[LengthScore]:  # fmt: skip
    """Every prompt is predicted once, by what was learned without it. Lengths are fitted as log(1 + length)."""
    some, mine = [entries[i] for i in at], x[list(at)]
    groups = np.array([e.group for e in some])
    predicted = {name: np.empty((len(some), len(LEVELS))) for name in fits}
    fold = np.zeros(len(some), int)
    split = learner("model_selection").GroupKFold(min(FOLDS, len(set(groups))), shuffle=True, random_state=seed)
    for number, (known, out) in enumerate(split.split(mine, groups=groups)):
        fold[out] = number
        for name, fit in fits.items():
            predicted[name][out] = fit([some[i] for i in known], mine[known], [some[i] for i in out], mine[out])
    if cap is not None:
        predicted = {name: np.clip(np.expm1(q), 0, cap) for name, q in predicted.items()}
    true = figure(some)
    drawn = {name: _Drawn.of(some, true, q, seed, fold) for name, q in predicted.items()}
    learned = drawn["learned"]
    return [
        LengthScore(
            what, name, len(some), len(set(groups)), _ends(d.concordance), _ends(d.loss),
            None if d is learned else float(np.quantile((learned.loss - d.loss)[1:], 0.975)) < 0,
        )
        for name, d in drawn.items()
    ]  # fmt: skip


def _ceiling(lengths: Lengths, seed: int) -> LengthScore:
    """One answer of the baseline as the prediction of another to the same prompt."""
    firsts, second, capped = zip(*lengths.twice, strict=True)
    some = [_again(e, length, cut) for e, length, cut in zip(firsts, second, capped, strict=True)]
    quantiles = np.repeat(np.array([e.length for e in firsts])[:, None], len(LEVELS), 1)
    drawn = _Drawn.of(some, _length(some), quantiles, seed)
    n = len({e.group for e in some})
    name = "another answer of its own (ceiling)"
    return LengthScore("the baseline's length", name, len(some), n, _ends(drawn.concordance), _ends(drawn.loss), None)


def _again(e: Entry, length: float, capped: bool) -> Entry:
    return Entry(e.sample, e.group, e.type, e.method, e.prompt, e.tokens, length, capped, None, False)


@dataclass(frozen=True)
class _Drawn:
    """Figures of all prompts, then of ``DRAWS`` resamples of them."""

    concordance: Floats
    loss: Floats

    @classmethod
    def of(
        cls, some: Sequence[Entry], true: Floats, quantiles: Floats, seed: int, fold: NDArray[np.int64] | None = None
    ) -> _Drawn:
        """Resamples depend on the prompts and the seed alone, so that those of two predictors are paired. Pairs are of
        one fold: a fold's training median is low where its own lengths are high, so that across folds a constant would
        tell less than nothing."""
        names = sorted({e.group for e in some})
        place = {name: i for i, name in enumerate(names)}
        at = np.array([place[e.group] for e in some])
        middle, capped = quantiles[:, LEVELS.index(0.5)], np.array([e.capped for e in some])
        right, known = np.zeros((2, len(names), len(names)))
        for method in {e.method for e in some}:
            mine = np.flatnonzero([e.method == method for e in some])
            counts = concordant(middle[mine], true[mine], capped[mine])
            if fold is not None:
                counts = tuple(count * (fold[mine][:, None] == fold[mine][None, :]) for count in counts)
            for total, count in zip((right, known), counts, strict=True):
                np.add.at(total, (at[mine][:, None], at[mine][None, :]), count)
        losses, ones = np.bincount(at, pinball(true, quantiles)), np.bincount(at).astype(float)
        n = len(names)
        weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), DRAWS).astype(float)
        weights = np.vstack([np.ones(n), weights])
        pairs = [((weights @ m) * weights).sum(axis=1) for m in (right, known)]
        with np.errstate(invalid="ignore", divide="ignore"):
            return cls(pairs[0] / pairs[1], weights @ losses / (weights @ ones))


def _ends(values: Floats) -> tuple[float, float, float]:
    """All NaN where no pair has a known order."""
    if np.isnan(values[0]):
        return math.nan, math.nan, math.nan
    low, high = np.nanquantile(values[1:], (0.025, 0.975))
    return float(values[0]), float(low), float(high)


def elsewhere(predictor: Predictor, lengths: Lengths, x: Floats, seed: int = 0) -> list[LengthScore]:
    """A predictor that was learned elsewhere, on a run it knows nothing of; methods that it does not know are left
    out. Raises UsageError where none is left."""
    known = [at for at, e in enumerate(lengths.entries) if e.method in predictor.length.methods]
    if not known:
        raise UsageError(f"this predictor knows {', '.join(predictor.length.methods)}, none of which is in the run")
    some = [lengths.entries[at] for at in known]
    quantiles = predictor.lengths(x[known], [e.method for e in some])
    drawn = _Drawn.of(some, _length(some), quantiles, seed)
    prompts = len({e.group for e in some})
    return [
        LengthScore(
            "all lengths", "learned elsewhere", len(some), prompts, _ends(drawn.concordance), _ends(drawn.loss), None
        )
    ]
