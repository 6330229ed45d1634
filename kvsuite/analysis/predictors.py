"""What predictions of unseen figures are worth, beside those of a predictor that knows less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvsuite.analysis.resample import DRAWS, Design, Floats
from kvsuite.analysis.stats import Estimate, Ratio, estimate
from kvsuite.errors import UsageError


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
