"""Whether a speed-up measured on plain transformers survives on kernels made for the cache (the paper's O1)."""

from __future__ import annotations

from collections.abc import Sequence

from kvsuite.analysis.speed import log_speeds, speed_rows
from kvsuite.analysis.table import Cell, Column, Row, Table, infos
from kvsuite.analysis.tables.shared import failed, setting
from kvsuite.analysis.tables.speed import state
from kvsuite.analysis.trimmed import log_change
from kvsuite.modes import MODES, PAGED, mode_of
from kvsuite.records import Run, Timing

TITLES = {"decode": "decoding", "prefill": "prefill"}


def modes(run: Run) -> list[Table]:
    """Every method's speed-up over `full` in each mode, cell by cell, of decoding and of prefills; nothing where no
    other mode was timed."""
    timings = [(*mode_of(r.phase), r) for r in run.records if isinstance(r, Timing)]
    tables = []
    for what in TITLES:
        by = {(mode, t.method, t.width, t.length): t for phase, mode, t in timings if phase == what}
        if there := [mode for mode in MODES if any(key[0] == mode for key in by)]:
            tables.append(_table(run, what, by, there))
    return tables


def _table(run: Run, what: str, by: Known, there: Sequence[str]) -> Table:
    places = list(dict.fromkeys((width, length) for mode, _, width, length in by if mode != PAGED))
    methods = list(dict.fromkeys(t.method for t in by.values() if t.method != run.baseline))
    ours = [method for method in methods if method != "transformers"]
    rows = [Row((run.baseline, f"{w} · {n}"), _rates(by, run.baseline, there, w, n), unit="tok/s") for w, n in places]
    rows += [Row((m, f"{w} · {n}"), _speeds(by, m, there, w, n), unit="×") for m in methods for w, n in places]
    columns = [Column(mode, mode, shows="range") for mode in (*there, PAGED)]
    columns += [Column(f"{mode} over", f"{mode} ÷ {PAGED}", shows="range") for mode in there]
    said = [
        f"In each mode a method's speed is a multiple of {run.baseline}'s in that mode, which ran in turn with it; "
        "the 95 % t-interval in brackets.",
        MEANS[what],
        *(_verdict(mode, [row.cells[f"{mode} over"] for row in rows if row.key[0] in ours]) for mode in there),
    ]
    others = [t for (mode, *_), t in by.items() if mode != PAGED]
    failures = [(f"{r.phase} {r.method} b{r.width} l{r.length}", r.error) for r in speed_rows(others) if r.failed]
    title = f"{TITLES[what]} by mode · {setting(run)}"
    key = "modes" if what == "decode" else f"{what} modes"
    return Table(key, title, ("method", "batch · length"), columns, rows, [*infos(said), *failed(failures)])


Known = dict[tuple[str, str, int, int], Timing]
"""By mode, method, batch and length."""
MEANS = {
    "decode": "eager, sdpa and flash-attn are transformers' attention over the same caches, unpacked at every step; "
    "paged are kvsuite's kernels. transformers is its own DynamicCache under that attention (with paged: sdpa).",
    "prefill": "The prompt attends by transformers' attention of that name (paged: torch's), which gives a method the "
    "weights that it observes where it computes them (eager); then the method's cache is filled.",
}


def _rates(by: Known, base: str, there: Sequence[str], width: int, length: int) -> dict[str, Cell]:
    """The baseline's own tokens a second."""
    own = {mode: by.get((mode, base, width, length)) for mode in (*there, PAGED)}
    rows = {mode: speed_rows([t])[0] for mode, t in own.items() if t is not None}
    return {mode: state(row) if row.rate is None else Cell(row.rate) for mode, row in rows.items()}


def _speeds(by: Known, method: str, there: Sequence[str], width: int, length: int) -> dict[str, Cell]:
    cells, logs = {}, {}
    for mode in (*there, PAGED):
        if (timing := by.get((mode, method, width, length))) is None:
            continue
        [row] = speed_rows([timing])
        cells[mode] = state(row)
        if row.speedup is not None:
            cells[mode], logs[mode] = Cell.estimated(row.speedup), log_speeds(timing)
    over = {
        f"{mode} over": Cell.estimated(log_change(logs[PAGED], logs[mode])) if {mode, PAGED} <= {*logs} else Cell()
        for mode in there
    }
    return cells | over


def _verdict(mode: str, found: Sequence[Cell]) -> str:
    """In how many cells a mode promises more than the kernels keep, and in how many less."""
    known = [cell for cell in found if cell.low is not None and cell.high is not None]
    more = sum(cell.low is not None and cell.low > 1 for cell in known)
    less = sum(cell.high is not None and cell.high < 1 for cell in known)
    return (
        f"{mode} promises more than {PAGED} keeps in {more} of {len(known)} cells (the interval of their ratio is "
        f"above 1), less in {less}; the others are not told apart."
    )
