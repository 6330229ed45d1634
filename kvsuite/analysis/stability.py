"""Whether other jurors would have chosen the same samples: split-half stability of a negative benchmark."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from kvsuite.analysis.benchmark import Votes, family
from kvsuite.analysis.resample import Design, Floats, Mask, eligible
from kvsuite.analysis.samples import Broken


@dataclass(frozen=True)
class Stability:
    """How far one half of the jurors' families chooses what the other half does, mean over all halvings."""

    halvings: int
    eligible: int
    correlation: float
    """Pearson's, over eligible samples, of the shares of families that fell."""
    chosen: float
    """The share of the eligible on which a half falls as one."""
    again: float
    """Of the samples on which one half falls as one, the share on which the other does; ``chosen`` would be chance."""


def stability(votes: Votes, base: Floats, rule: Broken) -> Stability:
    """Of the choice: between halves of the jurors' families."""
    allowed = eligible(Design.of(votes.base.dataset, votes.base.cluster), base, rule.benign)
    parts: dict[frozenset[str], list[Mask]] = {}
    for name, fell in votes.fell.items():
        parts.setdefault(family(name), []).append(fell[allowed])
    means = np.array([np.mean(fell, axis=0) for fell in parts.values()])
    whole = np.array([np.all(fell, axis=0) for fell in parts.values()])
    found = []
    for half in _halves(len(means)):
        rest = [at for at in range(len(means)) if at not in half]
        one, other = means[list(half)].mean(0), means[rest].mean(0)
        correlation = float(np.corrcoef(one, other)[0, 1]) if one.std() and other.std() else float("nan")
        a, b = whole[list(half)].all(0), whole[rest].all(0)
        both, either = float((a & b).mean()), float((a.mean() + b.mean()) / 2)
        found.append((correlation, either, both / either if either else float("nan")))
    correlation, chosen, again = (float(x) for x in np.nanmean(np.array(found), axis=0))
    return Stability(len(found), int(allowed.sum()), correlation, chosen, again)


def _halves(n: int) -> list[tuple[int, ...]]:
    """All ways to halve ``n`` families, each once; of an odd number one half has one more."""
    found = list(itertools.combinations(range(n), n // 2))
    return [half for half in found if n % 2 or 0 in half]
