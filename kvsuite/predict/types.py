"""Which type of task a prompt is: qa, summarization, few-shot, synthetic, code or chat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvsuite.analysis.resample import Design, Floats
from kvsuite.analysis.stats import Estimate, Ratio, estimate
from kvsuite.errors import UsageError
from kvsuite.predict import files, learner
from kvsuite.records import Answer, Run


@dataclass(frozen=True)
class Typed:
    """One prompt whose type is known."""

    prompt: str
    tokens: int
    type: str
    group: str
    """The document it was made of, else the sample."""


def typed(run: Run) -> list[Typed]:
    """Each prompt of a run once, whoever answered it."""
    found = {
        (r.task, r.sample): Typed(r.prompt, r.prompt_tokens, r.type, r.cluster or r.sample)
        for r in run.records
        if isinstance(r, Answer) and r.prompt and r.type
    }
    return list(found.values())


@dataclass(frozen=True)
class Classifier:
    """Logistic regression on what `prompts.features` sees."""

    types: tuple[str, ...]
    middle: Floats
    spread: Floats
    weights: Floats
    """(types, features)"""
    start: Floats
    """(types,)"""

    @classmethod
    def learned(cls, x: Floats, types: Sequence[str]) -> Classifier:
        """From (n, features) prompts. Raises UsageError for prompts that are all of one type."""
        names = sorted(set(types))
        if len(names) < 2:
            raise UsageError(f"all prompts are of type {names[0]}: there is nothing to tell apart")
        middle, spread = x.mean(axis=0), x.std(axis=0)
        spread[spread < 1e-9] = 1
        fit = learner("linear_model").LogisticRegression(max_iter=1000).fit((x - middle) / spread, list(types))
        weights, start = fit.coef_, fit.intercept_
        if len(names) == 2:  # scikit-learn has one row then, for the second type
            weights, start = np.vstack([-weights, weights]) / 2, np.concatenate([-start, start]) / 2
        return cls(tuple(map(str, fit.classes_)), middle, spread, weights, start)

    def __call__(self, x: Floats) -> list[str]:
        """The most likely type of each of (n, features) prompts."""
        scores = (x - self.middle) / self.spread @ self.weights.T + self.start
        return [self.types[at] for at in scores.argmax(axis=1)]

    def as_json(self) -> dict[str, Any]:
        """Numbers and names."""
        return {"types": self.types} | {n: getattr(self, n).tolist() for n in ("middle", "spread", "weights", "start")}

    @classmethod
    def of(cls, said: dict[str, Any]) -> Classifier:
        """What `as_json` gave. Raises UsageError where its arrays do not fit."""
        middle, spread, weights, start = files.arrays(
            said, {"t": len(said["types"])}, middle="f", spread="f", weights="tf", start="t"
        )
        if not spread.all():
            raise UsageError("a saved predictor's spread is 0")
        return cls(tuple(said["types"]), middle, spread, weights, start)


@dataclass(frozen=True)
class Accuracy:
    """Shares of prompts whose type was told right, with 95 % intervals of their documents."""

    n: int
    groups: int
    learned: Estimate
    null: Estimate
    """The most frequent type among the prompts that were learned from."""
    gain: Estimate


def held_out(x: Floats, known: Sequence[Typed], folds: int = 5) -> Accuracy:
    """Every prompt is told by what was learned without its document. ``x``: (n, features)."""
    types, groups = np.array([k.type for k in known]), np.array([k.group for k in known])
    mine, null = np.zeros(len(known)), np.zeros(len(known))
    split = learner("model_selection").GroupKFold(min(folds, len(set(groups))))
    for rest, out in split.split(x, types, groups):
        mine[out] = np.array(Classifier.learned(x[rest], list(types[rest]))(x[out])) == types[out]
        values, counts = np.unique(types[rest], return_counts=True)
        null[out] = values[counts.argmax()] == types[out]
    design = Design.of([""] * len(known), list(groups))
    ratios = [Ratio(mine, bounds=(0, 1)), Ratio(null, bounds=(0, 1)), Ratio(mine - null, bounds=(-1, 1))]
    return Accuracy(len(known), len(set(groups)), *estimate(design, ratios, draws=2000))
