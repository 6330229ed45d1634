"""The figures of Gao et al. (MLSys 2025, arXiv 2503.24000) under their own names: Algorithm 1's negative samples, D.

They are here to be compared with, not to decide by: nothing in them tells an effect from noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvsuite.analysis.resample import Design, Floats, Mask, eligible
from kvsuite.analysis.samples import Broken

RULE = Broken()
THETAS = (0.01, 0.02, 0.04, 0.08, 0.10, 0.16, 0.24, 0.32)
ALL_SETS = 5
"""Methods up to which every set of them is counted; of more, the pairs and the whole."""


@dataclass(frozen=True)
class Negatives:
    """Algorithm 1: which samples a method scores too low on, among those its baseline is good at."""

    eligible: Mask
    """(n,): benign, that is at least the dataset's mean (the paper's text, the dataset builder) or median (the figure's
    script), and over 0."""
    negative: dict[str, Mask]
    """Method → (n,): eligible and below (1 - θ) × baseline (``<`` in the paper's text, ``<=`` in its code)."""


def negatives(design: Design, base: Floats, methods: Mapping[str, Floats], rule: Broken = RULE) -> Negatives:
    """The negative samples of every method."""
    allowed = eligible(design, base, rule.benign)
    return Negatives(allowed, {method: allowed & rule.fell(base, score) for method, score in methods.items()})


def swapped(design: Design, base: Floats, score: Floats, rule: Broken = RULE) -> tuple[int, int]:
    """Algorithm 1 with the roles exchanged: how many samples the *baseline* fails on that the method is good at, of how
    many. It shows asymmetry, not noise."""
    found = negatives(design, score, {"": base}, rule)
    return int(found.negative[""].sum()), int(found.eligible.sum())


def sets(negative: Mapping[str, Mask]) -> dict[str, int]:
    """Sets of methods by intersection, ``A&B`` (the paper's rule: all fail), and union, ``A|B``."""
    names = list(negative)
    sizes = range(2, len(names) + 1) if len(names) <= ALL_SETS else (2, len(names))
    found = {}
    for size in sizes:
        for some in itertools.combinations(names, size):
            masks = [negative[name] for name in some]
            found["&".join(some)] = int(np.logical_and.reduce(masks).sum())
            found["|".join(some)] = int(np.logical_or.reduce(masks).sum())
    return found


def sweep(
    design: Design,
    base: Floats,
    methods: Mapping[str, Floats],
    thetas: Sequence[float] = THETAS,
    rule: Broken = RULE,
) -> dict[float, Negatives]:
    """The negative samples for every θ."""
    return {theta: negatives(design, base, methods, replace(rule, theta=theta)) for theta in thetas}


def by_type(found: Negatives, types: Sequence[str]) -> dict[str, dict[str, int]]:
    """Task type → eligible, and each method's negatives. ``types`` names the type of every sample."""
    names = np.array(types)
    counted = {}
    for name in dict.fromkeys(types):
        mine = names == name
        counts = {method: int((mask & mine).sum()) for method, mask in found.negative.items()}
        counted[name] = {"eligible": int((found.eligible & mine).sum()), **counts}
    return counted


def d(base_tokens: Floats, tokens: Floats) -> Floats:
    """(n,): the paper's D = (L_full - L_comp) / L_full. It is asymmetric: -50 % is 1.5 times longer, 50 % half as
    long."""
    return np.asarray((base_tokens - tokens) / base_tokens)


def d_shares(base_tokens: Floats, tokens: Floats, threshold: float = 0.5) -> tuple[float, float]:
    """The shares with D ≤ -threshold (longer) and D ≥ threshold (shorter). With no effect at all and a spread of log
    lengths of 0.7 they are 28 % and 16 %."""
    found = d(base_tokens, tokens)
    return float((found <= -threshold).mean()), float((found >= threshold).mean())
