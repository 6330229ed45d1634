"""Tokens a second of every arm, from which a price of a machine makes a price of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from kvsuite.analysis.serving import served_rows
from kvsuite.analysis.speed import REFERENCE, speed_rows
from kvsuite.analysis.validity import unranked
from kvsuite.records import Run, Timing


@dataclass(frozen=True)
class Throughput:
    """What was measured at one load."""

    where: str
    """The load, in words."""
    machine: str
    """What has a price per hour."""
    rates: dict[str, float]
    """Tokens a second by arm, controls left out; empty where none is known."""


def throughput(run: Run) -> Throughput:
    """At the widest batch and its longest context, or the last load of servers. What ran without a kernel, and what
    cannot be believed, has no rate."""
    machine = "GPU" if run.facts.get("environment", {}).get("gpu") else "machine"
    if rows := [row for row in served_rows(run) if row.method not in unranked(run) and not run.is_control(row.method)]:
        last = rows[-1].cell
        rates = {row.method: row.figures["rate"] for row in rows if row.cell == last and "rate" in row.figures}
        return Throughput(f"decoding and prefill at {last}", machine, rates)
    timings = [r for r in run.records if isinstance(r, Timing) and r.phase == "decode" and r.method != "transformers"]
    cells = [row for row in speed_rows(timings) if row.rate and not row.path.endswith(REFERENCE)]
    cells = [row for row in cells if not run.is_control(row.method)]
    at = max(((row.width, row.length) for row in cells), default=(0, 0))
    rates = {row.method: row.rate for row in cells if (row.width, row.length) == at and row.rate is not None}
    return Throughput(f"decoding at batch {at[0]}, {at[1]:,} tokens of context", machine, rates)
