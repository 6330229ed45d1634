"""What a run's forced documents show: every arm's divergence from the baseline beyond noise, and its perplexity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from kvsuite.analysis.divergence import Divergence, Positions, divergence
from kvsuite.analysis.shortfall import expected
from kvsuite.analysis.stats import Estimate
from kvsuite.analysis.verdict import Effect, Named, effect
from kvsuite.margins import Margins
from kvsuite.readers.run import Documents, documents
from kvsuite.records import Run


@dataclass(frozen=True)
class Seen:
    """What an arm did to the documents that the baseline and the control read, too."""

    documents: int
    divergence: Divergence


@lru_cache(maxsize=2)  # several tables ask for the same run
def divergences(run: Run) -> dict[str, Seen]:
    """By arm, in order. Of several controls one is the floor of the methods, and the next is its own."""
    read = documents(run)
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
    return any(any(r.kl) for arm, own in documents(run).items() if run.is_control(arm) for r in own.values())


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


@dataclass(frozen=True)
class Shift:
    """What became of the documents of one arm in another, or of an arm in a later run."""

    before: Documents
    asked: int
    """Documents that were to be compared."""
    divergence: Divergence
    """The later arm's own KL and flips from its baseline; *excess*: less the earlier's of the same position;
    perplexity: as a multiple of the earlier's."""

    @property
    def same(self) -> bool:
        """Whether nothing changed at all."""
        d = self.divergence
        return not (self.kl.mean or self.kl.se) and not d.perplexity.se and d.perplexity.mean == 1

    @property
    def kl(self) -> Estimate:
        """The change of the KL."""
        return self.divergence.excess.get("kl", self.divergence.kl)

    def mean(self, column: Literal["kl", "flips"]) -> float:
        """The earlier arm's, over all positions."""
        return float(np.mean([x for r in self.before.values() for x in getattr(r, column)]))

    def effects(self, margins: Margins) -> Iterator[Effect]:
        """Endpoints before their verdicts; nothing where nothing changed. Two baselines have no KL."""
        n, d = len(self.before), self.divergence
        if self.same:
            return
        if d.kl.mean or self.mean("kl"):
            yield effect("kl", self.kl, margins.kl, 1, n, compared=n, asked=self.asked)
        yield effect("perplexity", d.perplexity, margins.perplexity, 1, n, True, compared=n, asked=self.asked)


def shift(one: Documents, other: Documents, asked: int = 0) -> Shift | None:
    """The later documents against the earlier ones that are the same, of ``asked`` at least; None where there are
    none."""
    shared = [key for key in one if key in other and len(one[key].kl) == len(other[key].kl)]
    if not shared:
        return None
    found = divergence(_positions(shared, other, one), _positions(shared, one, one))
    return Shift({key: one[key] for key in shared}, max(asked, len(one.keys() | other.keys())), found)


def _positions(keys: Iterable[tuple[str, str]], mine: Documents, base: Documents) -> Positions:
    pairs = [(task, mine[task, sample], base[task, sample]) for task, sample in keys]
    return Positions(
        prompt=[a.cluster or a.sample for _, a, _ in pairs for _ in a.kl],
        kl=np.array([x for _, a, _ in pairs for x in a.kl]),
        flip=np.array([float(x) for _, a, _ in pairs for x in a.flips]),
        loss=np.array([x - y for _, a, b in pairs for x, y in zip(b.logs, a.logs, strict=True)]),
        dataset=[task for task, a, _ in pairs for _ in a.kl],
    )
