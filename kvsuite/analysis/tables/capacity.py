"""How many sequences of a length fit into memory, method by method, and how fast so many were."""

from __future__ import annotations

from collections.abc import Sequence

from kvsuite.analysis.capacity import SequenceBytes, sequence_bytes
from kvsuite.analysis.speed import SpeedRow, speed_rows
from kvsuite.analysis.table import Cell, Column, Note, Row, Table
from kvsuite.analysis.tables.shared import setting
from kvsuite.errors import UsageError
from kvsuite.records import Run, Timing

GIB = 1 << 30


def capacity(run: Run, gib: float = 1.0, lengths: Sequence[int] = ()) -> list[Table]:
    """Of sequences of these lengths, unless given the longest that was measured. Nothing where fewer than two lengths
    were."""
    timings = [r for r in run.records if isinstance(r, Timing) and r.phase == "decode" and r.method != "transformers"]
    found, rows = sequence_bytes(timings), speed_rows(timings)
    if run.baseline not in found:
        return []
    asked = lengths or [max(length for one in found.values() for length in one.lengths)]
    drawn = [_row(method, one, found[run.baseline], rows, gib, n) for n in asked for method, one in found.items()]
    columns = [
        Column("fixed", "fixed, KiB", "KiB"), Column("token", "bytes a token"), Column("fits", f"fit in {gib:g} GiB"),
        Column("times", "× full", "×"), Column("width", "timed at"), Column("rate", "tok/s there", "tok/s"),
    ]  # fmt: skip
    late = {method: one.lengths[0] for method, one in found.items() if one.lengths[0] > min(t.length for t in timings)}
    notes = [
        "A sequence holds a fixed part and so many bytes per token, by the line through what caches held; pages, page "
        "tables and a method's own state are counted, weights are not.",
        "timed at: the largest batch at this length that fits and was timed.",
    ]
    if late:
        said = ", ".join(f"{method} from {length:,}" for method, length in late.items())
        notes.append(f"The line holds from a number of tokens on: {said}.")
    title = f"capacity · {setting(run)}"
    return [Table("capacity", title, ("method", "length"), columns, drawn, [Note(text) for text in notes])]


def _row(
    method: str, one: SequenceBytes, full: SequenceBytes, rows: Sequence[SpeedRow], gib: float, length: int
) -> Row:
    fits, base = one.sequences(gib * GIB, length), full.sequences(gib * GIB, length)
    timed = {r.width: r.rate for r in rows if r.method == method and r.length == length and r.rate and r.width <= fits}
    widest = max(timed, default=None)
    cells = {
        "fixed": Cell(round(one.fixed / 1024)), "token": Cell(round(one.token)), "fits": Cell(fits),
        "times": Cell(fits / base) if base else Cell(), "width": Cell(widest),
        "rate": Cell(None if widest is None else timed[widest]),
    }  # fmt: skip
    return Row((method, str(length)), cells)


def asked(run: Run, gib: float, lengths: Sequence[int]) -> list[Table]:
    """The same for a command. Raises UsageError where the run cannot tell."""
    if not gib > 0:
        raise UsageError(f"--memory {gib:g} is no memory")
    if not (found := capacity(run, gib, lengths)):
        raise UsageError(f"{run.folder} has no decoding of {run.baseline} at two lengths, from which capacity follows")
    return found
