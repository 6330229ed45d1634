"""``kvsuite why``: what caches had lost of the samples that methods broke, beside those that they did not."""

from __future__ import annotations

import math
from dataclasses import replace

from kvsuite.analysis.causes import DROPPED, ROUNDED, Cause, Contrast
from kvsuite.analysis.causes import causes as found_causes
from kvsuite.analysis.stats import LEVEL, Interval
from kvsuite.analysis.table import Cell, Column, Note, Row, Table, errors, infos
from kvsuite.records import Loss, Run

NAMES = DROPPED | ROUNDED
EXPLAINED = (
    "Of samples that the baseline answers well, looked at once more after the run. Heads: kv heads of all layers, when "
    "the answer begins. Attention: the uncompressed cache's, over the baseline's answer, to tokens that the method's "
    "cache no longer holds when it is fed that answer. Error: √(Σ(K̂ - K)² / ΣK²) of what is held. 95 %: of documents; "
    "p: that they fell into the groups by chance, of permutations, not adjusted. A figure that goes with the damage "
    "need not be its cause."
)


def causes(run: Run) -> list[Table]:
    """One table a task; nothing where no losses were measured."""
    found = found_causes(run)
    failed = {(r.task, f"{r.method}: {r.error}") for r in run.records if isinstance(r, Loss) and r.status != "ok"}
    tables = []
    for task in dict.fromkeys(cause.task for cause in found):
        mine = [cause for cause in found if cause.task == task]
        rows = [_row(cause, contrast) for cause in mine for contrast in cause.contrasts]
        columns = [Column("broken", "broken", "%"), Column("broken", "95 %", "%", "ends")]
        columns += [Column("intact", "unbroken", "%"), Column("intact", "95 %", "%", "ends")]
        columns += [Column("difference", "difference", "points"), Column("difference", "95 %", "points", "ends")]
        columns += [Column("difference", "p", shows="p")]
        said = [*infos([sentence(cause) for cause in mine]), Note(EXPLAINED)]
        said += errors([f"FAILED {error}" for at, error in sorted(failed) if at == task])
        title = f"{task} · what the caches had lost where answers broke"
        tables.append(Table(f"causes:{task}", title, ("method", "share"), columns, rows, said))
    return tables


def _row(cause: Cause, contrast: Contrast) -> Row:
    cells = {name: _cell(getattr(contrast, name)) for name in ("broken", "intact", "difference")}
    cells["difference"] = replace(cells["difference"], p=contrast.p)
    of = f"{cause.method} ({cause.broken} broken, {cause.intact} not)"
    return Row((cause.method, contrast.key), cells, (of, NAMES[contrast.key]))


def _cell(found: Interval | None) -> Cell:
    return Cell() if found is None else Cell(100 * found.mean, 100 * found.low, 100 * found.high)


def sentence(cause: Cause) -> str:
    """The finding of one method."""
    total, main = cause.broken + cause.intact, cause.main
    said = f"{cause.method} broke {cause.broken} of {total}"
    if not cause.broken or main is None or main.broken is None:
        return f"{said}."
    said += f": {NAMES[main.key]} {_percent(main.broken)}"
    if main.intact is None:
        return f"{said}; none is left unbroken to compare with."
    said += f", in the other {cause.intact} {_percent(main.intact)}"
    return f"{said}{'' if main.p is not None and main.p < LEVEL else ', which may be chance'} (p = {main.p:.2g})."


def _percent(x: Interval) -> str:
    if not (math.isfinite(x.low) and math.isfinite(x.high)):
        return f"{100 * x.mean:.0f} %"
    return f"{100 * x.mean:.0f} % ({100 * x.low:.0f}–{100 * x.high:.0f})"
