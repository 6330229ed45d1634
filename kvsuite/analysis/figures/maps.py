"""Where a method's steps and prefills are faster than the uncompressed cache's, and where slower: batch by length."""

from __future__ import annotations

from collections.abc import Mapping

from kvsuite.analysis.figure import Axis, Map, Tile
from kvsuite.analysis.table import Note, Row, Table
from kvsuite.records import Run

NOT_TOLD = "≈"


def figures(run: Run, tables: Mapping[str, Table]) -> list[Map]:
    """One map a method and phase, where its table is one of batches by lengths."""
    return [
        found
        for phase in ("decode", "prefill")
        if phase in tables and tables[phase].heads == ("method", "batch")
        for method in run.facts["methods"]
        if method != run.baseline and (found := _map(method, tables[phase]))
    ]


def _map(method: str, table: Table) -> Map | None:
    rows = [row for row in table.rows if row.key[0] == method]
    lengths = [column.key for column in table.columns]
    tiles = [tile for at, row in enumerate(rows) for tile in _tiles(at, row, lengths)]
    if not tiles:
        return None
    x = Axis("tokens of context", "tokens", rows=tuple(f"{int(n):,}" for n in lengths))
    y = Axis("batch", rows=tuple(row.key[1] for row in rows))
    notes = [
        Note(
            "Blue: faster than the uncompressed cache, which ran in turn with it; orange: slower. "
            f"Pale, with {NOT_TOLD}: the 95 % interval covers 1. The table has the intervals."
        )
    ]
    return Map(f"map:{table.key}:{method}", f"{method}: {table.key} speed, batch by length", x, y, tiles, notes)


def _tiles(at: int, row: Row, lengths: list[str]) -> list[Tile]:
    tiles = []
    for column, length in enumerate(lengths):
        cell = row.cells.get(length)
        if cell is not None and isinstance(cell.value, float) and cell.low is not None and cell.high is not None:
            unsure = cell.low <= 1 <= cell.high
            tiles.append(Tile(column, at, cell.value, NOT_TOLD if unsure else "", unsure))
    return tiles
