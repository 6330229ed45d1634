"""Which kinds of tasks the samples belong to that a method breaks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from kvsuite.analysis.effects import RULE, Part
from kvsuite.analysis.figure import Axis, Figure, Point, Series
from kvsuite.analysis.resample import Design, eligible
from kvsuite.analysis.runs import noise, parts
from kvsuite.analysis.samples import scored
from kvsuite.analysis.stats import wilson
from kvsuite.analysis.table import Note, Table
from kvsuite.records import Run


def figures(run: Run, tables: Mapping[str, Table]) -> list[Figure]:
    """Every method and control, task type by task type."""
    found = [x for part in (*parts(run), *noise(run)) if not part.floored for x in _counted(part)]
    arms, types = list(dict.fromkeys(arm for arm, *_ in found)), list(dict.fromkeys(kind for _, kind, *_ in found))
    if not found:
        return []
    series = []
    for kind in types:
        points = []
        for arm, own, lost, n in found:
            if own == kind:
                share = wilson(lost, n)
                point = Point(100 * share.mean, arms.index(arm), 100 * share.low, 100 * share.high, f"{lost} of {n}")
                points.append(point)
        series.append(Series(kind, kind, points, "bars"))
    said = (
        "Of the samples that the uncompressed cache answers at least as well as its mean: those that lost more than a "
        "tenth of their score, with Wilson's 95 % interval. Controls show what noise alone breaks."
    )
    x = Axis("samples regressed, %", "%", shown=(0.0, 10.0))
    y = Axis("method", rows=tuple(arms))
    return [Figure("regressed", "Regressed samples by task type", x, y, series, notes=[Note(said)])]


def _counted(part: Part) -> Iterator[tuple[str, str, int, int]]:
    """Method, task type, samples regressed, samples that could."""
    base = part.base
    if not scored(base):
        return
    allowed = eligible(Design.of(base.dataset, base.cluster), base.score, RULE.benign)
    kinds = np.array([base.types.get(dataset) or dataset for dataset in base.dataset])
    for name, arm in part.methods.items():
        fell = RULE.fell(base.score, arm.score)
        for kind in dict.fromkeys(kinds.tolist()):
            here = allowed & (kinds == kind)
            if here.any() and scored(arm):
                yield name, kind, int((fell & here).sum()), int(here.sum())
