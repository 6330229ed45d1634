"""How unlikely an answer's tokens are to the uncompressed baseline, which was given them behind the prompt: what a
model says itself is likely to it, whatever the words, and garbage is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvsuite.analysis.resample import Floats, Mask
from kvsuite.analysis.texts import thirds
from kvsuite.columns import Key

Logs = Mapping[Key, Sequence[float]]
"""By sample, the log-probability of every token of an answer, nats."""
SHORT = 8
"""Tokens from which an answer tells anything: an answer to a needle has some 15."""
PART = 16
"""Tokens from which a part of one does."""
TIMES, LEAST = 2.0, 4.0
"""A part is unlikely at so many times the nats a token of the baseline's upper quartile, and at so many at least.
Chosen before any fault was planted; what they find: ``python -m suites.checks.signs``."""


def surprise(logs: Logs, keys: Sequence[Key]) -> Floats:
    """(n, 3): nats a token at the start, in the middle and at the end of every answer, as `thirds`; NaN where there is
    none, or too little."""
    found = np.full((len(keys), 3), np.nan)
    for at, key in enumerate(keys):
        own = np.asarray(logs.get(key, ()), np.float64)
        parts = np.array_split(-own, min(max(len(own) // PART, 1), 3)) if len(own) >= SHORT else []
        means = [float(part.mean()) for part in parts]
        if means:
            found[at] = thirds(means, np.nan)
    return found


def unlikely(base: Floats, *arms: Floats) -> list[Mask]:
    """(n, 3) for the baseline and for each arm: where they are far more surprising than the baseline's own are."""
    known = base[~np.isnan(base)]
    edge = max(TIMES * float(np.quantile(known, 0.75)), LEAST) if len(known) else np.inf
    return [np.nan_to_num(arm) > edge for arm in (base, *arms)]
