"""What a run's forced documents show: every arm's divergence from the baseline beyond noise, and its perplexity."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from kvsuite.analysis.divergence import Divergence, Positions, divergence
from kvsuite.analysis.shortfall import expected
from kvsuite.analysis.verdict import Named, effect
from kvsuite.margins import Margins
from kvsuite.records import Forced, Run

Documents = dict[tuple[str, str], Forced]
"""By task and sample."""


@dataclass(frozen=True)
class Seen:
    """What an arm did to the documents that the baseline and the control read, too."""

    documents: int
    divergence: Divergence


@lru_cache(maxsize=2)  # several tables ask for the same run
def divergences(run: Run) -> dict[str, Seen]:
    """By arm, in order. Of several controls one is the floor of the methods, and the next is its own."""
    read = _read(run)
    base = read.pop(run.baseline, {})
    noises = [arm for arm in read if run.is_control(arm)]
    found = {}
    for arm, mine in read.items():
        floor = next((other for other in noises if other != arm), "")
        theirs = read.get(floor, {})
        shared = [key for key in mine if key in base and (key in theirs or not theirs)]
        if shared:
            control = _positions(shared, theirs, base) if theirs else None
            found[arm] = Seen(len(shared), divergence(_positions(shared, mine, base), control))
    return found


def acted(run: Run) -> bool:
    """Whether a control's logits are known to differ from the baseline's: its noise acted, also where no answer
    changed."""
    return any(any(r.kl) for arm, own in _read(run).items() if run.is_control(arm) for r in own.values())


def effects(run: Run, margins: Margins) -> list[Named]:
    """Endpoints of all methods before their verdicts: KL beyond the control's, and perplexity."""
    found: list[Named] = []
    asked = sum(expected(run, "divergence").values())
    for method, seen in divergences(run).items():
        if not run.is_control(method):
            n, by = seen.documents, seen.divergence
            kl = by.excess.get("kl", by.kl)
            found.append((method, effect("kl", kl, margins.kl, 1, n, compared=n, asked=asked)))
            text = effect("perplexity", by.perplexity, margins.perplexity, 1, n, True, compared=n, asked=asked)
            found.append((method, text))
    return found


def _read(run: Run) -> dict[str, Documents]:
    """Whole documents by arm."""
    found: dict[str, Documents] = {}
    for r in run.records:
        if isinstance(r, Forced) and r.status == "ok":
            found.setdefault(r.method, {})[r.task, r.sample] = r
    return found


def _positions(keys: Iterable[tuple[str, str]], mine: Documents, base: Documents) -> Positions:
    pairs = [(task, mine[task, sample], base[task, sample]) for task, sample in keys]
    return Positions(
        prompt=[a.cluster or a.sample for _, a, _ in pairs for _ in a.kl],
        kl=np.array([x for _, a, _ in pairs for x in a.kl]),
        flip=np.array([float(x) for _, a, _ in pairs for x in a.flips]),
        loss=np.array([x - y for _, a, b in pairs for x, y in zip(b.logs, a.logs, strict=True)]),
        dataset=[task for task, a, _ in pairs for _ in a.kl],
    )
