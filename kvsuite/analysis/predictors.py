"""What a predictor is worth: its accuracy on groups it has not seen, beside that of a predictor that knows nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kvsuite.analysis.resample import DRAWS, Design, Floats
from kvsuite.analysis.stats import Estimate, Ratio, estimate
from kvsuite.errors import UsageError

Predict = Callable[[Floats], Floats]
"""(n, k) features → (n,) figures."""
Train = Callable[[Floats, Floats], Predict]
"""(n, k) features and (n,) figures → what predicts."""
FOLDS = 5


def closeness(predicted: Floats, true: Floats) -> Floats:
    """(n,): the paper's accuracy of each prediction, 1 - |predicted - true| / true; below 0 where it is off by more
    than the figure itself. Raises UsageError for columns that do not fit and true figures that are not over 0.

    Half of the truth loses 50 points, twice the truth 100, so predictions of a speed and of the time it stands for have
    different accuracies: compare only those of the same figure on the same entries."""
    if predicted.shape != true.shape or true.ndim != 1 or not len(true):
        raise UsageError(f"there are {predicted.size} predictions of {true.size} figures")
    if not (np.isfinite(true).all() and (true > 0).all()):
        raise UsageError("a relative error needs true figures over 0")
    if not np.isfinite(predicted).all():
        raise UsageError("a prediction is not a number")
    return np.asarray(1 - np.abs(predicted - true) / true)


@dataclass(frozen=True)
class Worth:
    """A predictor beside a null predictor, on the same entries; accuracies as parts of 1, intervals 95 %."""

    n: int
    groups: int
    accuracy: Estimate
    null: Estimate
    gain: Estimate
    """Accuracy less the null's."""

    @property
    def better(self) -> bool:
        """Whether it surely says more than the null."""
        return self.gain.low > 0

    @property
    def verdict(self) -> str:
        """One sentence."""
        g = self.gain
        what = "better than the null" if self.better else "not better than the null"
        by = f"by {100 * g.mean:+.1f} points, 95 % from {100 * g.low:+.1f} to {100 * g.high:+.1f}"
        return f"accuracy {self.accuracy.mean:.1%}, the null's {self.null.mean:.1%}: {what} ({by})"


def worth(
    predicted: Floats, null: Floats, true: Floats, groups: Sequence[str], draws: int = DRAWS, seed: int = 0
) -> Worth:
    """Of predictions made without having seen the true figures. All (n,); ``groups`` names what belongs together (a
    prompt, a method, a machine) and is resampled as a whole. Raises UsageError as ``closeness`` does."""
    mine, theirs = closeness(predicted, true), closeness(null, true)
    if len(groups) != len(true):
        raise UsageError(f"there are {len(groups)} names of groups for {len(true)} figures")
    design = Design.of([""] * len(true), groups)
    top = (-np.inf, 1.0)
    ratios = [Ratio(mine, bounds=top), Ratio(theirs, bounds=top), Ratio(mine - theirs)]
    return Worth(len(true), sum(design.counts), *estimate(design, ratios, draws=draws, seed=seed))


def best_constant(x: Floats, y: Floats) -> Predict:
    """The null that knows nothing but the training figures: the one number with the highest mean accuracy on them.

    That is their median with weights 1 / figure, below the mean: against the mean, a predictor that merely aims low
    would look as if it knew something.
    """
    order = np.argsort(y)
    weights = np.cumsum(1 / y[order])
    value = float(y[order][np.searchsorted(weights, weights[-1] / 2)])
    return lambda new: np.full(len(new), value)


def training_mean(x: Floats, y: Floats) -> Predict:
    """The null that predicts the mean of the training figures."""
    value = float(y.mean())
    return lambda new: np.full(len(new), value)


def feature(column: int) -> Train:
    """The null that returns a feature as it is: the uncompressed model's figure, whatever the method."""
    return lambda x, y: lambda new: new[:, column]


def held_out(
    x: Floats,
    y: Floats,
    groups: Sequence[str],
    fit: Train,
    null: Train = best_constant,
    folds: int = FOLDS,
    draws: int = DRAWS,
    seed: int = 0,
) -> Worth:
    """Train on all groups but a fold's and predict that fold's, for each of ``folds``; the null likewise. ``x`` is
    (n, k), ``y`` and ``groups`` (n,). Raises UsageError for columns that do not fit, fewer groups than folds, and true
    figures that are not over 0.

    The interval is of the entries predicted; that other training data would have given another predictor is not in it.
    """
    if x.ndim != 2 or y.ndim != 1 or not len(x) == len(y) == len(groups):
        raise UsageError(f"features are {x.shape}, figures {y.shape}, groups {len(groups)}; each entry has one of each")
    closeness(y, y)
    names = np.array(groups, dtype=str)
    unique = np.unique(names)
    if not 2 <= folds <= len(unique):
        raise UsageError(f"{folds} folds cannot be made of {len(unique)} groups; at least 2 and one group each")
    shuffled = np.random.default_rng(seed).permutation(unique)
    predicted, nothing = np.empty(len(y)), np.empty(len(y))
    for fold in range(folds):
        out = np.isin(names, shuffled[fold::folds])
        for kind, column in ((fit, predicted), (null, nothing)):
            found = np.asarray(kind(x[~out], y[~out])(x[out]), dtype=float)
            if found.shape != (int(out.sum()),):
                raise UsageError(f"a predictor gave {found.shape} numbers for {int(out.sum())} entries")
            column[out] = found
    return worth(predicted, nothing, y, groups, draws, seed)
