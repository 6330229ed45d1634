"""What a run's forced documents show: every arm's divergence from the baseline beyond noise, and its perplexity; and by
how much it makes the reference answers of tasks less likely."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from kvsuite.analysis.divergence import Divergence, Positions, divergence
from kvsuite.analysis.resample import DRAWS, Design, Floats
from kvsuite.analysis.shortfall import expected
from kvsuite.analysis.stats import Estimate, Ratio, estimate
from kvsuite.analysis.verdict import Effect, Named, effect
from kvsuite.margins import Margins
from kvsuite.readers.run import Documents, documents
from kvsuite.records import Forced, Run
from kvsuite.tasks.reference import PREFIX

LOST = 1.0
"""Nats a token that a reference answer may fall where it was never seen to, at least: what is lost altogether in one
prompt of a hundred is in few samples of a hundred."""


@dataclass(frozen=True)
class Seen:
    """What an arm did to the documents that the baseline and the control read, too."""

    documents: int
    divergence: Divergence


@lru_cache(maxsize=2)  # several tables ask for the same run
def divergences(run: Run, task: str = "") -> dict[str, Seen]:
    """By arm, in order, on one task or on all running text. Of several controls one is the floor of the methods, and
    the next is its own."""
    read = {arm: _chosen(own, task) for arm, own in documents(run).items()}
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
    texts, answers_asked = asked(run)
    for method, seen in divergences(run).items():
        if not run.is_control(method):
            n, by = seen.documents, seen.divergence
            kl = by.excess.get("kl", by.kl)
            found.append((method, effect("kl", kl, margins.kl, 1, n, compared=n, asked=texts)))
            text = effect("perplexity", by.perplexity, margins.perplexity, 1, n, True, compared=n, asked=texts)
            found.append((method, text))
    read = documents(run)
    base = read.pop(run.baseline, {})
    answers = references({arm: (own, base) for arm, own in read.items()}, margins, answers_asked)
    return found + [(arm, e) for arm, e in answers if not run.is_control(arm)]


def asked(run: Run) -> tuple[int, int]:
    """The documents of running text, and the reference answers, that every arm was to read."""
    wanted = expected(run, "divergence")
    answers = sum(n for task, n in wanted.items() if task.startswith(PREFIX))
    return sum(wanted.values()) - answers, answers


def _chosen(read: Documents, task: str) -> Documents:
    """Those of one task, or all running text."""
    return {key: r for key, r in read.items() if (key[0] == task if task else not key[0].startswith(PREFIX))}


def references(
    arms: Mapping[str, tuple[Documents, Documents]], margins: Margins, asked: int, draws: int = DRAWS
) -> list[Named]:
    """The endpoint *reference* of every arm, from its documents and those it is held against: by how much a token of a
    reference answer is more likely in its log, the mean over answers. Where fewer than ten answers fell by half of the
    largest fall that any arm shows, others could."""
    moved: dict[str, list[tuple[Forced, float]]] = {}
    for arm, (mine, base) in arms.items():
        shared = [key for key in base if key[0].startswith(PREFIX) and key in mine]
        both = [(base[key], mine[key]) for key in shared if len(mine[key].logs) == len(base[key].logs) > 0]
        moved[arm] = [(one, float(np.mean(other.logs) - np.mean(one.logs))) for one, other in both]
    worst = max([LOST, *(-change for own in moved.values() for _, change in own)])
    found = []
    for arm, own in moved.items():
        if own:
            change: Floats = np.array([x for _, x in own])
            design = Design.of([r.task for r, _ in own], [r.cluster or r.sample for r, _ in own])
            ratio = Ratio(change, large=np.abs(change) >= worst / 2, room=(worst, worst), skewed=True)
            seen, n = estimate(design, [ratio], draws=draws)[0], len(own)
            found.append((arm, effect("reference", seen, margins.reference, -1, n, compared=n, asked=max(asked, n))))
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
    """The later documents of running text against the earlier ones that are the same, of ``asked`` at least; None where
    there are none."""
    one, other = _chosen(one, ""), _chosen(other, "")
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
