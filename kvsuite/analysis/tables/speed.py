"""How fast the methods of a run are: decode and prefill cell by cell, and the core's promises."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from kvsuite.analysis.latency import BreakEven
from kvsuite.analysis.shortfall import timed
from kvsuite.analysis.speed import REFERENCE, SpeedRow, attention_alone, break_evens, scaled, speed_rows
from kvsuite.analysis.table import Cell, Column, Note, Row, Table, infos
from kvsuite.analysis.tables.shared import dtype_notes, failed, layers, missing, setting
from kvsuite.records import OUT_OF_MEMORY, Agreement, Run, Timing

MIB = 2**20
ATTENTION = "attention"
"""Of decoding, the caches' part."""
FEW = 6
"""Batches and lengths that stand side by side as columns; more of them are a map, batch by length."""


def phases(run: Run) -> list[Table]:
    """Decode, what attention took of it, and prefill, as far as they were timed."""
    timings = [r for r in run.records if isinstance(r, Timing)]
    decode, prefill = ([t for t in timings if t.phase == phase] for phase in ("decode", "prefill"))
    parts = {"decode": decode, ATTENTION: attention_alone(decode), "prefill": prefill}
    return [_phase(phase, cells, run) for phase, cells in parts.items() if cells]


Place = tuple[int, int]
"""Batch and length."""


def _phase(phase: str, cells: Sequence[Timing], run: Run) -> Table:
    rows = speed_rows(cells)
    by = {(r.method, r.width, r.length): r for r in rows}
    places = sorted({(r.width, r.length) for r in rows})
    heads, columns, where = _laid_out(places)
    done, asked = timed(run)
    absent = Cell(state="missing" if done < asked else "ok")

    def full(place: Place) -> Cell:
        """Its own cell; where that was not timed, its rounds in turn with the methods."""
        if (own := by.get(("full", *place))) is not None:
            return state(own) if own.rate is None else Cell(shown(own.rate, place[0]))
        beside = [r.baseline_rate for r in rows if (r.width, r.length) == place and r.baseline_rate is not None]
        return Cell(shown(statistics.median(beside), place[0])) if beside else absent

    def shown(rate: float, width: int) -> float:
        return 1000 * width / rate if phase == ATTENTION else rate

    def listed(key: str, name: str, unit: str, cells: Mapping[Place, Cell]) -> list[Row]:
        found: dict[tuple[str, ...], dict[str, Cell]] = {}
        for place, cell in cells.items():
            row, column = where[place]
            found.setdefault(row, {})[column] = cell
        return [Row((key, *row), own, (name, *row), unit) for row, own in found.items()]

    methods = dict.fromkeys([*(r.method for r in rows), *(run.facts["methods"] if done < asked else [])])
    unit, of = ("ms", "of its step") if phase == ATTENTION else ("tok/s", "of the limit")
    drawn = listed(f"full, {unit}", f"full, {unit}", unit, {place: full(place) for place in places})
    if shares := _of_step(run) if phase == ATTENTION else _reached(by, places):
        drawn += listed(f"full, % {of}", f"full, % {of}", "%", shares)
    for method in methods:
        speeds = {place: absent if (r := by.get((method, *place))) is None else _speed(r) for place in places}
        drawn += listed(method, f"{method}, ×", "×", speeds)
    shows = [Column(key, key, shows="range") for key in columns]
    return Table(phase, f"{phase} · {setting(run)}", heads, shows, drawn, _notes(phase, rows, run))


def _notes(phase: str, rows: Sequence[SpeedRow], run: Run) -> list[Note]:
    notes = [*missing(run), *_meaning(phase, rows), *layers(run)]
    if phase == "decode":
        notes += infos(by_what(rows, run.facts["environment"]["gpu"]))
        notes += _break_evens([r for r in run.records if isinstance(r, Timing) and not run.is_control(r.method)])
    notes += dtype_notes(run)
    if any(r.method == "transformers" for r in rows):
        notes.append(
            Note("transformers is its own DynamicCache under SDPA, the same sequences: a row beside, not the baseline.")
        )
    return [*notes, *failed([(f"{r.method} b{r.width} l{r.length}", r.error) for r in rows if r.failed])]


def _laid_out(places: Sequence[Place]) -> tuple[tuple[str, ...], list[str], dict[Place, tuple[tuple[str, ...], str]]]:
    """Heads, columns, and for each place what its row is called beside the method, and its column. A place is a
    column; where there are many batches and lengths, batches are rows and lengths columns."""
    widths, lengths = (sorted({place[at] for place in places}) for at in (0, 1))
    if len(places) > FEW and min(len(widths), len(lengths)) > 1:
        return ("method", "batch"), [str(n) for n in lengths], {(w, n): ((str(w),), str(n)) for w, n in places}
    where: dict[Place, tuple[tuple[str, ...], str]] = {(w, n): ((), f"{w} · {n}") for w, n in places}
    return ("batch · length",), [column for _, column in where.values()], where


def _reached(by: Mapping[tuple[str, int, int], SpeedRow], places: Sequence[Place]) -> dict[Place, Cell]:
    """How much of this machine's limit the baseline reached; nothing where that was not measured."""
    shares = {place: r.of_limit for place in places if (r := by.get(("full", *place))) is not None}
    return {place: Cell(100 * share) for place, share in shares.items() if share is not None}


def _of_step(run: Run) -> dict[Place, Cell]:
    """How much of the baseline's steps its cache took."""
    own = [r for r in run.records if isinstance(r, Timing) and r.phase == "decode" and r.method == "full"]
    return {
        (t.width, t.length): Cell(100 * sum(t.attention_seconds) / sum(t.seconds))
        for t in map(scaled, own)
        if t.attention_seconds
    }


def _meaning(phase: str, rows: Sequence[SpeedRow]) -> list[Note]:
    said = []
    if rounds := max(r.rounds for r in rows):
        said.append(
            f"Speed as a multiple of full's, which ran in turn with it ({rounds} pairs of rounds), and its 95 % "
            "t-interval. The row of full against itself is the noise of this machine."
        )
    if any(r.speedup is None and not r.failed for r in rows):
        said.append("not measured: fewer than two pairs of rounds ran (--benchmark-disable, --kv-rounds).")
    if any(r.of_limit is not None for r in rows):
        said.append(
            "The limit: weights once, and K and V, over the bandwidth that this machine read in this run, or "
            "operations over the rate of a large product then, whichever takes longer."
        )
    if phase == ATTENTION:
        said.append(
            "What the caches take of a decoding step, all layers: storing its tokens, attending, evicting; the rest is "
            "the same for all."
        )
    if phase == "prefill":
        said.append(
            "A prefill with what the method observes, and its compression. One prefill serves all methods of a run."
        )
    return infos(said)


def state(row: SpeedRow) -> Cell:
    """Why a row has no speed."""
    if row.error.startswith(OUT_OF_MEMORY):
        return Cell("OOM", state="failed")
    return Cell(state="failed" if row.failed else "not measured")


def _speed(row: SpeedRow) -> Cell:
    return state(row) if row.speedup is None else Cell.estimated(row.speedup)


def by_what(rows: Sequence[SpeedRow], gpu: str | None) -> list[str]:
    """What stored and attended, where the records say it; a method without a kernel is not to be ranked by its
    speed."""
    paths = {r.method: r.path for r in rows if r.path and r.method != "transformers"}
    slow = sorted(method for method, path in paths.items() if path.endswith(REFERENCE))
    if not paths:
        return []
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.method in slow and row.refusal and row.method not in reasons.setdefault(row.refusal, []):
            reasons[row.refusal].append(row.method)
    names = {why: "all methods" if len(who) == len(paths) else ", ".join(who) for why, who in reasons.items()}
    because = [f"{who} on {'gpu' if gpu else 'cpu'}: reference, because {why}." for why, who in names.items()]
    but = f", but PyTorch (not to be ranked by speed) for {', '.join(slow)}" if slow else ""
    backends = {path.rpartition("/")[2] for path in paths.values()}
    if len(slow) == len(paths):
        said = "Attention is the PyTorch reference, no kernel: quantized caches are unpacked at every step."
    elif "cpu" in backends:
        said = f"Steps and attention are C++, compiled for this CPU{but}."
    elif gpu is None:
        said = "There is no GPU: an interpreter ran the kernels that the records name, so these are no speeds."
    else:
        said = f"Steps and attention are Triton kernels{but}."
    return [said, *because]


def _break_evens(timings: Sequence[Timing]) -> list[Note]:
    """From which context on a method's step is the faster one, width by width."""
    notes = []
    for width in sorted({t.width for t in timings}):
        found = {method: _break_even(x) for (method, own), x in break_evens(timings).items() if own == width}
        said = "; ".join(f"{method} {words}" for method, words in found.items() if method != "transformers")
        if said:
            notes.append(f"A step is faster than full's, by the line through the lengths, at batch {width}: {said}.")
    return infos(notes)


def _break_even(found: BreakEven) -> str:
    if found.length is None:
        return {"everywhere": "at every length", "nowhere": "at no length"}[found.faster]
    bounds = [f"{low:,.0f} to {'∞' if high == math.inf else f'{high:,.0f}'}" for low, high in found.pieces]
    where = f"{found.length:,.0f} tokens ({' or '.join(bounds)})"
    return f"from {where} on" if found.faster == "longer" else f"up to {where}"


def timings(run: Run) -> list[Table]:
    """Every timed cell by itself."""
    rows = []
    for row in speed_rows([r for r in run.records if isinstance(r, Timing)]):
        key = (row.method, row.phase, str(row.width), str(row.length))
        if row.speedup is None:
            rows.append(Row(key, {"rate": state(row), "speed": state(row)}))
            continue
        sizes = {"read": row.nbytes_read or None, "allocated": row.allocated or None, "peak": row.peak}
        held = {key: Cell(None if size is None else size / MIB) for key, size in sizes.items()}
        held |= {"held": Cell(row.nbytes / MIB), "checked": Cell(row.checked)}
        limit = {} if row.of_limit is None else {"limit": Cell(100 * row.of_limit)}
        rows.append(Row(key, {"rate": Cell(row.rate), "speed": Cell.estimated(row.speedup), **held, **limit}))
    if not rows:
        return []
    columns = [Column("rate", "tok/s", "tok/s"), Column("speed", "× full", "×"), Column("speed", "95 %", "×", "ends")]
    columns += [Column("held", "MiB", "MiB"), Column("read", "read", "MiB")]
    for name in ("allocated", "peak"):
        known = any(row.cells.get(name, Cell()).value is not None for row in rows)
        columns += [Column(name, name, "MiB")] if known else []
    columns += [Column("checked", "checked", "tolerances")]
    columns += [Column("limit", "of limit", "%")] if any("limit" in row.cells for row in rows) else []
    note = (
        "MiB: what all sequences hold; read: what one step of them reads; allocated: what their caches have reserved, "
        "free pages included; peak: the most that the device had given out while the cell was made, filled and checked "
        "(of a prefill: activations, K and V in full precision and observations too), above what it had before; "
        "checked: largest error of the attention output over what the cache holds, in units of what rounding explains; "
        "limit: the least time that its bytes or operations take at the bandwidth and rate measured here, over its own."
    )
    heads = ("method", "phase", "batch", "length")
    return [Table("timings", "every timed cell", heads, columns, rows, [*missing(run), Note(note)], detail=True)]


WIDER, PREFILLS = "× the tok/s of width 1", "× the prefill alone"


def promises(run: Run) -> list[Table]:
    """What many methods cost beside one prefill, what width is worth, and how often the same tokens came."""
    timings = [r for r in run.records if isinstance(r, Timing) and r.phase in ("shared prefill", "width")]
    rows = []
    for row in speed_rows(timings):
        name, cell = f"{row.phase}: {row.method}", state(row)
        if row.speedup is not None:
            low, mean, high = row.speedup.low, row.speedup.mean, row.speedup.high
            if row.phase == "width":
                name = f"decoding at width {row.width}, {row.length} tokens"
                low, mean, high, unit = (*(x * row.width for x in (low, mean, high)), WIDER)
            else:
                name = f"prefill of {row.length} tokens for {row.method}"
                low, mean, high, unit = 1 / high, 1 / mean, 1 / low if low else math.inf, PREFILLS
            cell = Cell(mean, low, high, unit=unit)
        rows.append(Row((f"{row.phase}: {row.method}",), {"measured": cell}, (name,)))
    for a in (r for r in run.records if isinstance(r, Agreement)):
        cell = Cell(a.same, of=a.n, unit="with the same tokens")
        if a.status == "failed" or not a.n:
            cell = Cell(state="failed")
        rows.append(Row((f"{a.task}: {a.method} and {a.other}",), {"measured": cell}))
    columns = [Column("measured", "measured")]
    return [Table("promises", "the core's promises", ("what",), columns, rows)] if rows else []
