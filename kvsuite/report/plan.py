"""``kvsuite plan``: how many prompts, and minutes, decide a margin, from the noise of a run of one's own."""

from __future__ import annotations

import math
from datetime import timedelta

import numpy as np

from kvsuite.analysis.effects import Part, compare
from kvsuite.analysis.runs import noise
from kvsuite.analysis.stats import FEW
from kvsuite.analysis.verdict import Effect
from kvsuite.errors import UsageError
from kvsuite.margins import Margins
from kvsuite.records import Run
from kvsuite.report.table import Table

NOTES = [
    "prompts: with so many, a method without an effect is found within its margin 4 times of 5. A method that changes "
    "more than noise does needs more: measure it, and look at what it needs itself. time: answering them once with "
    "full and once with one method, at this run's speed. broken needs two controls (jitter and jitter:seed=1)."
]


def plan(run: Run, margins: Margins) -> Table:
    """Prompts and time by kind of noise and endpoint. Raises UsageError for a run without a control."""
    rows, silent = [], []
    for part in noise(run):
        for row in compare([part], margins):
            for e in row.effects:
                if e.lacking:
                    silent.append(
                        f"partial: {row.method}, {e.endpoint}: only {e.lacking[0]} of {e.lacking[1]} samples are there."
                    )
                if 0 < e.estimate.se < math.inf:
                    rows.append(_cells(row.method, e, part))
                    few = round(e.estimate.share * e.n)
                    if few < FEW:
                        said = f"from {few} large changes; half or twice as many prompts is possible"
                        silent.append(f"{row.method}, {e.endpoint}: {said}.")
                else:
                    silent.append(f"{row.method} changed no {e.endpoint}: no floor measured.")
    if not rows and not silent:
        raise UsageError(f"{run.folder} has no control to plan from: run full and jitter (or a second seed) first")
    name = run.facts["model"]["name"]
    columns = ["noise", "endpoint", "margin, %", "spread, %", "prompts", "time"]
    return Table(f"to decide a margin · {name}", columns, rows, [*NOTES, *silent], keys=2)


def _cells(method: str, e: Effect, part: Part) -> list[str]:
    margin = abs(e.limit - (1 if e.ratio else 0))
    spread = e.estimate.se * math.sqrt(e.n)
    if math.isinf(e.needed):
        return [method, e.endpoint, f"{100 * margin:g}", f"{100 * spread:.3g}", "-", "-"]
    share = e.n / len(part.base)
    prompts = math.ceil(e.needed / share)
    seconds = prompts * sum(float(np.nanmean(arm.seconds)) for arm in (part.base, part.methods[method]))
    duration = str(timedelta(seconds=round(seconds)))
    return [method, e.endpoint, f"{100 * margin:g}", f"{100 * spread:.3g}", f"{prompts:,}", duration]
