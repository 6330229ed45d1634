"""For how many tokens servers have room."""

from __future__ import annotations

from collections.abc import Mapping

from kvsuite.analysis.figure import Axis, Figure, Point, Series
from kvsuite.analysis.table import Cell, Note, Table
from kvsuite.records import Run


def figures(run: Run, tables: Mapping[str, Table]) -> list[Figure]:
    """What every server says of itself; nothing where none does."""
    if "servers" not in tables:
        return []
    known: list[tuple[str, int]] = []
    for row in tables["servers"].rows:
        room = row.cells.get("room", Cell()).value
        if isinstance(room, int):
            known.append((row.key[0], room))
    if not known:
        return []
    series = [
        Series(arm, arm, [Point(room, at)], "bars", arm == run.baseline or run.is_control(arm))
        for at, (arm, room) in enumerate(known)
    ]
    x = Axis("tokens that fit into the cache", "tokens", shown=(0.0,))
    note = Note("As each server says of itself. Compare servers that were given equal memory.")
    return [
        Figure("capacity", "Capacity", x, Axis("server", rows=tuple(arm for arm, _ in known)), series, notes=[note])
    ]
