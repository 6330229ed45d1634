"""``kvsuite negatives``: which samples methods break, beside what noise breaks, as JSON and as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvsuite.analysis import paper
from kvsuite.analysis.effects import Comparison, Part, compare, decided
from kvsuite.analysis.forced import acted
from kvsuite.analysis.resample import Design
from kvsuite.analysis.samples import Broken, same_answers
from kvsuite.analysis.stats import Interval, wilson
from kvsuite.analysis.table import Cell, Column, Row, Table, infos
from kvsuite.analysis.tables.verdicts import effect_row
from kvsuite.analysis.verdict import Effect
from kvsuite.columns import Arm, align
from kvsuite.errors import UsageError
from kvsuite.margins import Margins
from kvsuite.readers.run import arms
from kvsuite.records import Run

NOISE = "by noise"
"""The control among the counts of methods."""


@dataclass(frozen=True)
class Compared:
    """Aligned arms: what is counted. The control may be missing."""

    base: Arm
    methods: Mapping[str, Arm]
    control: Arm | None
    left_out: Sequence[str] = ()
    """What not all arms have."""
    noisy: bool = False
    """Whether the control's noise is known to have acted, even where it changed no answer."""

    @classmethod
    def of(cls, run: Run, allow_missing: bool = False) -> Compared:
        """A run's own scored tasks; its first control is the floor. Raises UsageError where there are none, and for
        arms that do not hold the same samples unless ``allow_missing``."""
        found = {method: arm for (method, repeat), arm in arms(run, "samples").items() if not repeat}
        if run.baseline not in found or len(found) == 1:
            raise UsageError(f"{run.folder} holds no scores of a baseline and methods")
        (base, *others), left_out = align([found.pop(run.baseline), *found.values()], allow_missing)
        known = dict(zip(found, others, strict=True))
        control = next((arm for method, arm in known.items() if run.is_control(method)), None)
        methods = {method: arm for method, arm in known.items() if not run.is_control(method)}
        return cls(base, methods, control, left_out, acted(run))

    @property
    def floored(self) -> bool:
        """Whether the control measured a floor."""
        return self.control is not None and (self.noisy or not same_answers(self.base, self.control))


@dataclass(frozen=True)
class Counts:
    """Algorithm 1's negative samples."""

    rule: Broken
    eligible: int
    n: int
    sets: dict[str, int]
    by_type: dict[str, dict[str, int]]
    """Task type → eligible, and of these each method's and the control's (``NOISE``) negatives."""
    sweep: dict[float, dict[str, int]]
    """θ → each method's negatives, and the control's."""


def counted(compared: Compared, rule: Broken) -> Counts:
    """The counts alone: nothing is resampled."""
    base, design = compared.base, Design.of(compared.base.dataset, compared.base.cluster)
    scores = {name: arm.score for name, arm in compared.methods.items()}
    found = paper.negatives(design, base.score, scores, rule)
    if compared.floored and compared.control is not None:
        scores[NOISE] = compared.control.score
    types = [base.types.get(dataset, "other") for dataset in base.dataset]
    by_type = paper.by_type(paper.negatives(design, base.score, scores, rule), types)
    swept = paper.sweep(design, base.score, scores, rule=rule)
    sweep = {theta: {m: int(mask.sum()) for m, mask in at.negative.items()} for theta, at in swept.items()}
    return Counts(rule, int(found.eligible.sum()), len(base), paper.sets(found.negative), by_type, sweep)


@dataclass(frozen=True)
class Negatives(Counts):
    """All that is known of one baseline and its candidates."""

    rows: list[Comparison]
    """By the rule asked for."""
    judged: list[Comparison]
    """By the endpoint's own rule, which verdicts are made by; empty where it is the same."""
    swapped: dict[str, tuple[int, int]]
    """Method → samples that only the baseline fails on, and of how many."""
    notes: list[str]
    """What must be known to read it: what was left out, which control there was."""


def negatives(compared: Compared, rule: Broken, margins: Margins) -> Negatives:
    """Algorithm 1 and what its numbers are worth. Raises UsageError for samples without a score."""
    base, methods, control = _scored(compared.base, compared.methods, compared.control)
    for arm in (base, *methods.values(), *([control] if control else [])):
        for (dataset, sample), score in zip(arm.keys, arm.score, strict=True):
            if score != score:
                raise UsageError(f"{arm.files[dataset]}: sample {sample} of {dataset} has no score")
    compared = replace(compared, base=base, methods=methods, control=control)
    design, part = Design.of(base.dataset, base.cluster), Part(base, methods, control, acted=compared.noisy)
    return Negatives(
        **vars(counted(compared, rule)),
        rows=decided(compare([part], margins, rule), margins)[0],
        judged=decided(compare([part], margins), margins)[0] if rule != Broken() else [],
        swapped={name: paper.swapped(design, base.score, arm.score, rule) for name, arm in methods.items()},
        notes=[*compared.left_out, _control(compared)],
    )


def _scored(base: Arm, methods: Mapping[str, Arm], control: Arm | None) -> tuple[Arm, Mapping[str, Arm], Arm | None]:
    """Without the datasets that have no score in any arm: chats, whose answers are not scored."""
    arms = [base, *methods.values(), *([control] if control else [])]
    known = {d for arm in arms for d, score in zip(arm.dataset, arm.score, strict=True) if score == score}
    at = [i for i, d in enumerate(base.dataset) if d in known]
    if not at:
        raise UsageError(f"{base.source}: there are no scores in it")
    if len(at) == len(base):
        return base, methods, control
    return base.take(at), {m: arm.take(at) for m, arm in methods.items()}, control.take(at) if control else None


def _control(compared: Compared) -> str:
    base, control = compared.base, compared.control
    if control is None:
        return (
            "No control: what noise alone breaks is not known, so nothing is within margin. "
            "Compare with the uncompressed model once more, with other noise (--control)."
        )
    if not compared.floored:
        return (
            "No floor measured: the control gave the baseline's very scores, so nothing is within margin. A control "
            "needs noise (another seed, batch size, order of requests)."
        )
    changed = int((control.score != base.score).sum())
    return (
        f"The control, noise alone, changed {changed:,} of {len(base):,} scores. Excess: samples broken beyond those "
        "it breaks; share of the eligible, in datasets where it changed anything."
    )


def as_json(found: Negatives) -> dict[str, Any]:
    """The figures, for a program."""
    verdicts = {row.method: row.verdict for row in found.judged or found.rows}
    methods = {}
    for row in found.rows:
        broken, quality = row.effect("broken"), _quality(row)
        net = row.finding("net harm")
        methods[row.method] = {
            "negatives": row.negatives,
            "swapped": found.swapped[row.method][0],
            "swapped_eligible": found.swapped[row.method][1],
            "excess": broken.estimate.mean if broken else None,
            "interval": _ends(broken.estimate) if broken else None,
            "net_harm_p": net.p if net else None,
            "mean_difference": quality.estimate.mean,
            "mean_interval": _ends(quality.estimate),
            "verdict": verdicts[row.method],
        }
    return {
        "eligible": found.eligible,
        "theta": found.rule.theta,
        "methods": methods,
        "sets": found.sets,
        "by_type": {k: {m: n for m, n in counts.items() if m != NOISE} for k, counts in found.by_type.items()},
    }


def _quality(row: Comparison) -> Effect:
    effect = row.effect("quality")
    assert effect is not None  # every sample has a score
    return effect


def _ends(interval: Interval) -> list[float] | None:
    ends = [interval.low, interval.high]
    return ends if all(abs(x) < float("inf") for x in ends) else None


def tables(found: Negatives) -> list[Table]:
    """The same for a person: each method, sets and task types, other thresholds."""
    rule = found.rule
    edge = (
        f"the baseline's score less {rule.theta:g}"
        if rule.absolute
        else f"{1 - rule.theta:.0%} of the baseline's score"
    )
    how = f"{rule.benign} rule, {'at most' if rule.inclusive else 'below'} {edge}"
    counts = Table(
        "negatives",
        f"negative samples · {found.eligible} of {found.n} are eligible · {how}",
        ("method",),
        [Column(key, key) for key in ("negative", "by noise", "swapped")]
        + [Column("net harm", "net harm p", shows="p")],
        [Row((row.method,), _counts(found, row)) for row in found.rows],
        infos([COUNTED]),
    )
    columns = [Column("quality", "Δ score, points", "pt", "range"), Column("broken", "excess, %", "%", "range")]
    columns += [Column("quality", "score alone", shows="verdict"), Column("all", "verdict")]
    judged = [Row((row.method,), _judged(row)) for row in found.judged or found.rows]
    main = Table("verdicts", "against the baseline", ("method",), columns, judged, infos(_notes(found)), detail=True)
    types = [_type(kind, name, n) for kind, n in found.by_type.items() for name in n if name != "eligible"]
    shares = [Column("negative", "negative"), Column("share", "share, %", "%"), Column("share", "95 %", "%", "ends")]
    said = "95 %: Wilson's interval, as if samples were independent. by noise: what the control breaks."
    by_type = Table("types", "negative by task type", ("type", "method"), shares, types, infos([said]), detail=True)
    sets = [Row((name,), {"negative": Cell(n)}) for name, n in found.sets.items()]
    note = "A&B: both fail (the paper's rule for a set of methods); A|B: one at least."
    sets_table = Table("sets", "sets of methods", ("set",), [Column("negative", "negative")], sets, infos([note]))
    thetas = {f"{theta:.0%}": n for theta, n in found.sweep.items()}
    swept = [Row((m,), {theta: Cell(n[m]) for theta, n in thetas.items()}) for m in next(iter(thetas.values()))]
    by_theta = Table(
        "thetas", "negative by threshold θ", ("method",), [Column(theta, theta) for theta in thetas], swept
    )
    return [counts, main, by_type, *([sets_table] if sets else []), by_theta]


COUNTED = (
    "by noise: those the control breaks. swapped: what the baseline fails on when the method's scores are the "
    "reference: asymmetry, not noise. net harm p: exact sign test of samples that broke against samples that healed."
)
OTHER_RULE = "Verdicts use the endpoint's own rule: below 90 % of the baseline's score, eligible from the mean on."


def _type(kind: str, name: str, counts: Mapping[str, int]) -> Row:
    n, of = counts[name], counts["eligible"]
    cells = {"negative": Cell(n, of=of)}
    if of:
        share = wilson(n, of)
        cells["share"] = Cell(100 * share.mean, 100 * share.low, 100 * share.high)
    return Row((kind, name), cells)


def _counts(found: Negatives, row: Comparison) -> dict[str, Cell]:
    net = row.finding("net harm")
    count, of = found.swapped[row.method]
    return {
        "negative": Cell(row.negatives),
        "by noise": Cell(row.floor),
        "swapped": Cell(count, of=of),
        "net harm": Cell(p=net.p if net else None),
    }


def _judged(row: Comparison) -> dict[str, Cell]:
    cells = {e.endpoint: replace(effect_row("", e).cells["effect"], unit="") for e in row.effects}
    return cells | {"all": Cell(row.verdict)}


def _notes(found: Negatives) -> list[str]:
    open_ = [(row.method, e) for row in found.judged or found.rows for e in row.effects if e.verdict == "undecided"]
    said = [*found.notes, OTHER_RULE] if found.judged else found.notes
    return [*said, *(f"{method}, {e.endpoint}: {undecided(e)}" for method, e in open_)]


def undecided(e: Effect) -> str:
    """What this sample could have shown, and how many would decide."""
    shown = f"{e.visible:.1%}" if e.ratio or e.endpoint == "broken" else f"{100 * e.visible:.2g} points"
    if math.isinf(e.estimate.se):
        return f"undecided: {e.n:,} samples have no spread to judge by"
    said = f"undecided with {e.n:,} samples, which would have shown an effect of {shown} 4 times of 5"
    if e.needed == float("inf"):
        return f"{said}; no number of samples can find no effect within a margin of 0"
    return f"{said}; a harmless method is found harmless with about {e.needed:,.0f}, 4 times of 5"
