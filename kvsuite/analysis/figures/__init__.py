"""The figures of a run, one kind a file. What was not measured has no figure."""

from __future__ import annotations

from collections.abc import Mapping

from kvsuite.analysis.figure import Figure, Map
from kvsuite.analysis.figures import capacity, divergence, latency, lengths, maps, regressed, speed, tradeoff
from kvsuite.analysis.table import Table
from kvsuite.records import Run

KINDS = (
    tradeoff.divergence, tradeoff.quality, speed.figures, maps.figures, divergence.documents, divergence.positions,
    regressed.figures, lengths.figures, tradeoff.length, latency.figures, latency.requests, capacity.figures,
)  # fmt: skip
"""In the order in which they are read."""


def figures(run: Run, tables: Mapping[str, Table]) -> list[Figure | Map]:
    """All that can be drawn; ``tables`` are those of the same run by key, so that nothing is estimated twice."""
    return [figure for kind in KINDS for figure in kind(run, tables)]
