"""``kvsuite plan``: how many prompts, and minutes, decide a margin, from the noise of a run of one's own."""

from __future__ import annotations

import math
import statistics

from kvsuite.analysis.costs import sample_seconds
from kvsuite.analysis.effects import Part, compare
from kvsuite.analysis.length import OTHER_SEED
from kvsuite.analysis.runs import noise
from kvsuite.analysis.speed import blocks_needed, log_speeds
from kvsuite.analysis.stats import FEW
from kvsuite.analysis.table import Cell, Column, Note, Row, Table, errors, infos
from kvsuite.analysis.tables.decision import EVALUATIONS, UNITS
from kvsuite.analysis.verdict import Effect
from kvsuite.errors import UsageError
from kvsuite.margins import Margins
from kvsuite.records import Run, Timing

NOTE = Note(
    "spread: of one sample. prompts: with so many, a method without an effect is found within its margin 4 times of 5. "
    "A method that changes more than noise does needs more: measure it, and look at what it needs itself. time: "
    "answering them once with full and once with one method, at this run's speed. broken needs two controls (jitter "
    "and jitter:seed=1)."
)


def plan(run: Run, margins: Margins) -> Table:
    """Prompts and time by kind of noise and endpoint. Raises UsageError for a run without a control."""
    rows, silent = [], []
    for part in noise(run):
        for row in compare([part], margins):
            for e in row.effects:
                if e.lacking:
                    of = "only {} of {} samples are there".format(*e.lacking)
                    silent += errors([f"partial: {row.method}, {e.endpoint}: {of}."])
                if 0 < e.estimate.se < math.inf:
                    rows.append(Row((row.method, e.endpoint), _cells(run, row.method, e, part)))
                    few = round(e.estimate.share * e.n)
                    if few < FEW:
                        said = f"from {few} large changes; half or twice as many prompts is possible"
                        silent += infos([f"{row.method}, {e.endpoint}: {said}."])
                else:
                    silent += infos([f"{row.method} changed no {e.endpoint}: no floor measured."])
    if not rows and not silent:
        raise UsageError(f"{run.folder} has no control to plan from: run full and jitter (or a second seed) first")
    columns = [Column("margin", "margin, %", "%"), Column("spread", "spread, %", "%")]
    columns += [Column("prompts", "prompts"), Column("time", "time", "s", "clock")]
    title = f"to decide a margin · {run.facts['model']['name']}"
    return Table("plan", title, ("noise", "endpoint"), columns, rows, [NOTE, *silent])


def blocks(run: Run, margins: Margins) -> list[Table]:
    """Of every method's decode speed: the blocks that a pilot, this run, asks for; nothing where nothing was timed."""
    rows = []
    for t in (r for r in run.records if isinstance(r, Timing) and r.phase == "decode" and r.status == "ok"):
        logs = log_speeds(t)
        if t.method != run.baseline and len(logs) > 1 and len(set(logs)) > 1:
            cells = {"rounds": Cell(len(logs)), "spread": Cell(100 * statistics.stdev(logs))}
            cells["blocks"] = Cell(blocks_needed(logs, margins.speed)) if margins.speed else Cell()
            rows.append(Row((t.method, f"{t.width} · {t.length}"), cells))
    columns = [Column("rounds", "blocks here", "samples"), Column("spread", "spread, %", "%")]
    columns.append(Column("blocks", "blocks", "samples"))
    note = (
        f"blocks: new ones (--kv-rounds) with which the speed's interval reaches ±{margins.speed:.0%} at most, 4 times "
        "of 5. Few blocks tell little of the spread, and ask for more."
    )
    title = "to know a decode step's speed"
    return [Table("blocks", title, ("method", "batch · length"), columns, rows, [Note(note)])] if rows else []


def _cells(run: Run, method: str, e: Effect, part: Part) -> dict[str, Cell]:
    found = {"margin": Cell(100 * e.margin), "spread": Cell(100 * e.estimate.se * math.sqrt(e.n))}
    if math.isinf(e.needed):
        return found
    share = e.n / len(part.base)
    prompts = math.ceil(e.needed / share)
    other = (run.baseline, 1) if method.endswith(OTHER_SEED) else (method, 0)
    seconds = sample_seconds(run, EVALUATIONS[UNITS[e.endpoint]], {(run.baseline, 0), other})
    return found | {"prompts": Cell(prompts), "time": Cell(prompts * seconds)}
