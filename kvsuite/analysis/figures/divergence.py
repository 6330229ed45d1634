"""How far every arm's next-token distribution is from the baseline's: over documents, and along them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from kvsuite.analysis.figure import Axis, Band, Figure, Point, Series, stand_for, thinned
from kvsuite.analysis.forced import divergences
from kvsuite.analysis.table import Note, Table
from kvsuite.records import Forced, Run
from kvsuite.tasks.reference import PREFIX

LEAST = 1e-6
"""Nats below which a document's divergence is drawn there."""
BINS = 16
"""Stretches of a continuation, at most."""


def documents(run: Run, tables: Mapping[str, Table]) -> list[Figure]:
    """The mean of every document, the mean of all with its interval, and the control's."""
    columns, seen = _columns(run), divergences(run)
    arms = [arm for arm in seen if arm in columns]
    if not arms:
        return []
    series, floors = [], [seen[arm].divergence.kl for arm in arms if run.is_control(arm)]
    for at, arm in enumerate(arms):
        control, kl = run.is_control(arm), seen[arm].divergence.kl
        means = thinned(max(float(np.mean(kl_)), LEAST) for kl_ in columns[arm])
        series.append(Series(arm, arm, [Point(x, at) for x in means], "dots", control))
        mean = Point(max(kl.mean, LEAST), at, max(kl.low, LEAST), max(kl.high, LEAST))
        series.append(Series(arm, arm, [mean], "points", control))
    bands = [Band("noise", max(floors[0].low, LEAST), max(floors[0].high, LEAST))] if floors else []
    n = max(len(columns[arm]) for arm in arms)
    notes = [Note(f"{stand_for(n, 'document')} Filled: the mean of all, with its 95 % interval.")]
    x = Axis("KL divergence from the uncompressed cache, nats", "nats", log=True)
    y = Axis("method", rows=tuple(arms))
    return [Figure("divergence:documents", "Drift, document by document", x, y, series, bands, notes=notes)]


def positions(run: Run, tables: Mapping[str, Table]) -> list[Figure]:
    """The mean over documents of each stretch of their continuations."""
    columns = {arm: own for arm, own in _columns(run).items() if arm in divergences(run)}
    length = max((len(kl) for own in columns.values() for kl in own), default=0)
    if length < BINS:
        return []
    edges = np.linspace(0, length, BINS + 1).round().astype(int)
    series = []
    for arm, own in columns.items():
        points = []
        for first, end in pairwise(edges):
            here = [x for kl in own for x in kl[first:end]]
            if here and (mean := float(np.mean(here))) > 0:
                points.append(Point((first + end) / 2, max(mean, LEAST)))
        if points:
            series.append(Series(arm, arm, points, "line", run.is_control(arm)))
    if not series:
        return []
    said = f"Means over documents of {edges[1]} positions each, without intervals: they show where drift grows."
    x = Axis("forced tokens behind the document", "tokens", shown=(0.0,))
    y = Axis("KL divergence, nats", "nats", log=True)
    return [Figure("divergence:positions", "Drift along the text", x, y, series, notes=[Note(said)])]


def _columns(run: Run) -> dict[str, list[list[float]]]:
    """By arm, without the baseline, the KL of every whole document at each position."""
    found: dict[str, list[list[float]]] = {}
    for r in run.records:
        if not isinstance(r, Forced) or r.task.startswith(PREFIX):
            continue
        if r.status == "ok" and r.kl and r.method != run.baseline:
            found.setdefault(r.method, []).append(r.kl)
    return found
