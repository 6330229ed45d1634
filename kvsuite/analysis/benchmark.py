"""The negative benchmark: samples that compression breaks, chosen so that being chosen does not break them.

Samples on which a baseline did well and methods did badly are, in part, those on which the baseline was lucky and the
methods were not. So who chooses is not who is scored, in two ways: jurors are of other families than the candidate, and
the scores that count are of a second replicate. A baseline that was scored .68 on the samples it helped to choose is
scored .54 there once more, with methods that do nothing at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvsuite.analysis.resample import DRAWS, Design, Floats, Mask, eligible
from kvsuite.analysis.samples import Broken, same_answers, scored
from kvsuite.analysis.stats import Estimate, Ratio, estimate
from kvsuite.columns import Arm
from kvsuite.errors import UsageError

RULE = Broken()


def family(method: str) -> frozenset[str]:
    """What a method's name is made of, without its settings: of each part (``a + b``) what stands before the first ':'
    or '-' and a digit. ``KIVI-2`` and ``kivi:bits=4`` are {kivi}, ``h2o:heavy=64 + kivi:bits=2`` is {h2o, kivi}."""
    return frozenset(re.split(r":|-(?=\d)", part, maxsplit=1)[0].strip().casefold() for part in method.split("+"))


@dataclass(frozen=True)
class Selection:
    """The samples that a candidate is to be scored on."""

    candidate: str
    jurors: tuple[str, ...]
    """Methods that chose: none shares a family with the candidate."""
    quorum: int
    """How many of them had to fall on a sample."""
    base: Arm
    """The baseline's first replicate, all samples."""
    chosen: Mask
    """(n,)"""

    @property
    def places(self) -> list[int]:
        """The chosen samples' places in the arm."""
        return [int(at) for at in np.flatnonzero(self.chosen)]


@dataclass(frozen=True)
class Votes:
    """Which methods fell by θ on which samples of replicate 1, of those where the baseline is benign."""

    base: Arm
    fell: Mapping[str, Mask]
    """Method → (n,)"""

    @classmethod
    def of(cls, base: Arm, methods: Mapping[str, Arm], rule: Broken = RULE) -> Votes:
        """Arms are aligned. Raises UsageError for arms that do not fit and samples without a score."""
        for arm in (base, *methods.values()):
            _fits(base, arm)
        allowed = eligible(Design.of(base.dataset, base.cluster), base.score, rule.benign)
        return cls(base, {name: allowed & rule.fell(base.score, arm.score) for name, arm in methods.items()})

    def take(self, at: Sequence[int]) -> Votes:
        """Those on the samples at these places, in this order."""
        places = np.asarray(at, dtype=np.intp)
        return Votes(self.base.take(at), {name: fell[places] for name, fell in self.fell.items()})

    def select(self, candidate: str, quorum: int | None = None, families: Mapping[str, str] | None = None) -> Selection:
        """The samples on which ``quorum`` of the methods of other families fell, or all. ``families`` says the family
        of methods whose names do not (``family``). Raises UsageError for too few methods."""
        jurors = others(self.fell, candidate, families)
        needed = len(jurors) if quorum is None else quorum
        if not jurors:
            raise UsageError(f"no method of another family than {candidate} is there to choose its samples")
        if not 1 <= needed <= len(jurors):
            said = f"{len(jurors)} methods of another family than {candidate}, {', '.join(jurors)}"
            raise UsageError(f"a quorum of {needed} cannot be had from {said}")
        count = np.sum([self.fell[name] for name in jurors], axis=0)
        return Selection(candidate, jurors, needed, self.base, count >= needed)


def others(methods: Iterable[str], candidate: str, families: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The methods that share no family with a candidate."""
    known = {name.casefold(): {given.casefold()} for name, given in (families or {}).items()}

    def belongs(name: str) -> frozenset[str]:
        return frozenset(known.get(name.casefold(), family(name)))

    return tuple(name for name in methods if not belongs(name) & belongs(candidate))


def select(
    base: Arm,
    methods: Mapping[str, Arm],
    candidate: str,
    rule: Broken = RULE,
    quorum: int | None = None,
    families: Mapping[str, str] | None = None,
) -> Selection:
    """Choose on replicate 1: the baseline is benign and ``quorum`` of the jurors, or all, fell by θ. Arms are aligned.

    ``methods`` are compressions, without controls, which would hardly ever fall; the candidate may be among them.
    Raises UsageError as `Votes` does.
    """
    jurors = others(methods, candidate, families)
    return Votes.of(base, {name: methods[name] for name in jurors}, rule).select(candidate, quorum, families)


def _fits(base: Arm, arm: Arm) -> None:
    if arm.keys != base.keys:
        raise UsageError(f"{arm.source} and {base.source} do not have the same samples in the same order")
    if not scored(arm):
        raise UsageError(f"{arm.source} has a sample without a score, which cannot be chosen or scored")


@dataclass(frozen=True)
class Scored:
    """A candidate on the samples that others chose. Figures are None where none was chosen."""

    candidate: str
    n: int
    """Samples chosen."""
    notes: tuple[str, ...]
    """What must be known to read it: that none was chosen, that there is no control, or one without noise."""
    drop: Estimate | None = None
    """M − B, mean, both of replicate 2, with its 95 % interval: what the method does. Below 0 is worse."""
    method: Estimate | None = None
    """M."""
    base: Estimate | None = None
    """B of replicate 2."""
    selecting: float | None = None
    """B of replicate 1, with the luck of having been chosen: never to be compared with."""
    control: Estimate | None = None
    """A fresh control's score, and that less B: what noise does on the same samples. None without a control."""
    floor: Estimate | None = None


def score(
    selection: Selection, base: Arm, method: Arm, control: Arm | None = None, draws: int = DRAWS, seed: int = 0
) -> Scored:
    """Score on replicate 2: ``base``, ``method`` and ``control`` (the baseline once more, by noise alone) answered all
    the samples anew. Raises UsageError for arms that do not fit and samples without a score."""
    for arm in (base, method, *([control] if control else [])):
        _fits(selection.base, arm)
    notes = _notes(selection, base, control)
    at = selection.places
    if not at:
        return Scored(selection.candidate, 0, ("no sample was chosen", *notes))
    b, m = (arm.take(at).score for arm in (base, method))
    columns = [Ratio(m, bounds=(0, 1)), Ratio(b, bounds=(0, 1)), _difference(m, b)]
    if control is not None:
        c = control.take(at).score
        columns += [Ratio(c, bounds=(0, 1)), _difference(c, b)]
    few = base.take(at)
    design = Design.of(few.dataset, few.cluster)
    mine, theirs, drop, *noise = estimate(design, columns, draws=draws, seed=seed)
    again, floor = noise or (None, None)
    selecting = float(selection.base.score[at].mean())
    return Scored(selection.candidate, len(at), notes, drop, mine, theirs, selecting, again, floor)


def _difference(one: Floats, other: Floats) -> Ratio:
    return Ratio(one - other, bounds=(-1, 1))


def _notes(selection: Selection, base: Arm, control: Arm | None) -> tuple[str, ...]:
    notes = []
    if same_answers(selection.base, base):
        notes.append("replicate 2 of the baseline is its replicate 1: the luck of having been chosen is still in it")
    if control is None:
        notes.append("no control: what noise does on these samples is not known")
    elif same_answers(base, control):
        notes.append("no floor measured: the control gave the baseline's very answers")
    return tuple(notes)
