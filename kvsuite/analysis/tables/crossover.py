"""Tables and maps of `kvsuite crossover`: where a format of K and V is faster than bf16, and what fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from kvsuite.analysis.crossover import BreakEven, Comparison, Resident, break_even, lines_cross
from kvsuite.analysis.crossover import Cell as Compared
from kvsuite.analysis.figure import Axis, Map, Tile
from kvsuite.analysis.kernel_times import Extended, Grid, How, Modelled, held_out, impossible, model_of, weaker
from kvsuite.analysis.kv_formats import BF16, FP8
from kvsuite.analysis.table import Cell, Column, Note, Row, Table, infos

MODELLED, INTERPOLATED = "~", "i"
MARKS: dict[Resident, str] = {"": "", "one": "'", "both": "*"}
KINDS: dict[Resident, str] = {"": "beyond the L2", "one": "compressed in the L2", "both": "both in the L2"}
LENGTHS = tuple(1024 * 2**k for k in range(8))
"""Of which the capacity is told."""


def title(found: Comparison) -> str:
    """What is compared, in one line."""
    method = found.method if _has_rows(found) else f"{found.method} (modelled)"
    return f"{found.model} on {found.measured.gpu} with {found.engine}: {method} K/V against bf16"


def tables(found: Comparison, cells: Sequence[Compared]) -> list[Table]:
    """All of them."""
    shown = [_summary(found, cells), _table(cells, "attention", "Attention alone: its speed, × bf16's", [])]
    if any(cell.steps for cell in cells):
        what = (
            "Attention and the matrix products of all layers and the output, without norms, sampling and host time. "
            "None is counted as faster than the memory is read, whatever the L2 did."
        )
        shown.append(_table(cells, "step", "The whole decode step: its speed, × bf16's", [what]))
    notes = Table("notes", "How to read this", notes=_notes(found, cells))
    return [*shown, _break_even(found, cells), _capacity(found), notes]


def maps(cells: Sequence[Compared]) -> list[Map]:
    """Attention alone, and the whole step where it is known."""
    return [
        m
        for kind, title in (("attention", "Attention alone"), ("step", "Whole decode step"))
        if (m := _map(cells, kind, title))
    ]


def as_json(found: Comparison, cells: Sequence[Compared]) -> dict[str, Any]:
    """Every cell as numbers, for a program."""
    return {
        "model": found.model, "gpu": found.measured.gpu, "engine": found.engine, "method": found.method,
        "source": found.measured.source, "kernels": [found.plain.name, found.other.name],
        "cells": [
            {
                "batch": c.batch, "length": c.length, "how": c.how, "in_l2": c.resident,
                "attention_ms": [c.plain.ms, c.other.ms], "attention_speed": c.speed,
                "step_ms": c.steps, "step_speed": c.step_speed,
            }
            for c in cells
        ],
    }  # fmt: skip


def marked(ratio: float, how: How, resident: Resident = "") -> str:
    """A ratio with the marks of what it rests on."""
    before, behind = MODELLED if how == "modelled" else "", INTERPOLATED if how == "interpolated" else ""
    return f"{before}{ratio:.2f}{behind}{MARKS[resident]}"


def _speed(cell: Compared, kind: str) -> float | None:
    return cell.speed if kind == "attention" else cell.step_speed


def _summary(found: Comparison, cells: Sequence[Compared]) -> Table:
    """The kinds of cells, those that the L2 does not hold first; of a measured format the modelled ones last."""
    guessed = [cell for cell in cells if _has_rows(found) and cell.how == "modelled"]
    kinds = {name: [c for c in cells if c.resident == kind and c not in guessed] for kind, name in KINDS.items()}
    rows = []
    for name, mine in (kinds | {"modelled": guessed}).items():
        if mine:
            shown = {
                "faster": Cell(sum(cell.speed > 1 for cell in mine), of=len(mine)),
                "attention": _spread([cell.speed for cell in mine]),
                "step": _spread([cell.step_speed for cell in mine if cell.step_speed is not None]),
            }
            rows.append(Row((name,), shown))
    columns = [
        Column("faster", "faster"),
        Column("attention", "attention", "×", "range"),
        Column("step", "whole step", "×", "range"),
    ]
    notes = [
        "A cell is a batch and a length. Faster: cells in which it is; then the median speed, × bf16's, and the range.",
        f"Kernels: {found.plain.name} for bf16, {found.other.name if _has_rows(found) else 'none measured'} for "
        f"{found.method}.",
    ]
    return Table("summary", title(found), ("K/V of one layer",), columns, rows, infos(notes))


def _has_rows(found: Comparison) -> bool:
    return isinstance(found.other, (Grid, Extended))


def _spread(ratios: Sequence[float]) -> Cell:
    return Cell(float(np.median(ratios)), min(ratios), max(ratios)) if ratios else Cell()


def _table(cells: Sequence[Compared], kind: str, title: str, notes: Sequence[str]) -> Table:
    lengths = sorted({cell.length for cell in cells})
    rows: dict[int, dict[str, Cell]] = {}
    for cell in cells:
        ratio = _speed(cell, kind)
        if ratio is not None:
            rows.setdefault(cell.batch, {})[str(cell.length)] = Cell(marked(ratio, cell.how, cell.resident))
    columns = [Column(str(n), _short(n)) for n in lengths]
    listed = [Row((str(batch),), found) for batch, found in sorted(rows.items())]
    return Table(kind, title, ("batch",), columns, listed, infos(notes))


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else f"{length:,}"


def _map(cells: Sequence[Compared], kind: str, title: str) -> Map | None:
    lengths, batches = (sorted({getattr(cell, part) for cell in cells}) for part in ("length", "batch"))
    tiles = []
    for cell in cells:
        ratio = _speed(cell, kind)
        if ratio is not None:
            where = lengths.index(cell.length), batches.index(cell.batch)
            mark = MARKS[cell.resident] + (INTERPOLATED if cell.how == "interpolated" else "")
            tiles.append(Tile(*where, ratio, mark, bool(cell.resident), cell.how != "modelled"))
    if not tiles:
        return None
    x = Axis("tokens in the cache", "tokens", rows=tuple(map(_short, lengths)))
    return Map(kind, title, x, Axis("batch", rows=tuple(map(str, batches))), tiles)


def _break_even(found: Comparison, cells: Sequence[Compared]) -> Table:
    both = (found.grids[BF16], found.grids[FP8]) if _has_rows(found) else None
    rows = []
    for batch in sorted({cell.batch for cell in cells}):
        mine = found.of_batch(batch)
        line = None if both is None else lines_cross(*both, batch)
        rows.append(
            Row(
                (str(batch),),
                {
                    "beyond": Cell(_crossing(break_even([cell for cell in mine if not cell.resident]))),
                    "all": Cell(_crossing(break_even(mine))),
                    "lines": Cell(_line(line)),
                },
            )
        )
    columns = [
        Column("beyond", "cells beyond the L2"),
        Column("all", "all cells"),
        *([] if both is None else [Column("lines", "lines (model)")]),
    ]
    notes = ["Of attention; the other parts of a step take equally long. In parentheses: the cells on either side."]
    if both is not None:
        notes.append(
            "Lines: through each format's cells beyond the L2, also below them, as an estimate of what a model sees, "
            "whose layers do not find their K and V in the L2."
        )
    return Table("break-even", "Not slower from which length on, tokens", ("batch",), columns, rows, infos(notes))


def _crossing(found: BreakEven | None) -> str:
    if found is None:
        return ""
    if found.slower is None:
        return f"all ({found.faster:,} and longer)"
    if found.length is None:
        return f"none (up to {found.slower:,})"
    return f"{found.length:,.0f} ({found.slower:,}–{found.faster:,})"


def _line(length: float | None) -> str:
    if length is None:
        return ""
    return "none" if length == float("inf") else "all" if length == 0 else f"{MODELLED}{length:,.0f}"


def _capacity(found: Comparison) -> Table:
    rows = []
    for length in LENGTHS:
        fits = [found.fits(kernel, length) for kernel in found.beyond]
        rates = [found.rate(kernel, n, length) if n else None for kernel, n in zip(found.beyond, fits, strict=True)]
        cells = {name: Cell(n) for name, n in zip(("plain", "other"), fits, strict=True)}
        for name, rate in zip(("plain rate", "other rate"), rates, strict=True):
            cells[name] = Cell("" if rate is None else f"{MODELLED if rate[1] == 'modelled' else ''}{rate[0]:,.0f}")
        if fits[0]:
            cells["more"] = Cell(fits[1] / fits[0])
        if (one := rates[0]) and (other := rates[1]):
            cells["gain"] = Cell(marked(other[0] / one[0], weaker(one[1], other[1])))
        rows.append(Row((_short(length),), cells))
    columns = [
        Column("plain", "bf16"),
        Column("other", found.method),
        Column("more", "×", "×", beside=True),
        Column("plain rate", "bf16 tok/s"),
        Column("other rate", f"{found.method} tok/s"),
        Column("gain", "tok/s ×", beside=True),
    ]
    memory, weights = found.measured.memory / 2**30, 2 * found.shape.parameters / 2**30
    note = (
        f"{memory:,.1f} GiB, of which the weights take {weights:,.1f}; all the rest is counted for K and V, so an "
        "engine, which needs memory of its own, holds fewer. tok/s: with so many sequences at once."
    )
    return Table("capacity", "Sequences that fit, by length", ("length",), columns, rows, [Note(note)])


def _notes(found: Comparison, cells: Sequence[Compared]) -> list[Note]:
    grids = found.grids.values()
    notes = [f"Source: {found.measured.source}, as others measured it; nothing was timed here."]
    l2 = found.grids[BF16].l2
    if l2:
        notes.append(
            f"{MARKS['both']} cache-resident: one layer's K and V fit into the L2 of {l2 / 2**20:.0f} MiB, where a "
            f"model would not find them; {MARKS['one']} the compressed alone do, which flatters it."
        )
    else:
        notes.append("The size of this GPU's L2 is not known here: cache-resident cells are not told apart.")
    if any(cell.how == "interpolated" for cell in cells):
        notes.append(f"{INTERPOLATED} interpolated between measured cells of its own kind.")
    notes += [_errors(grids), *_model(found)]
    if not any(cell.steps for cell in cells):
        notes.append("The whole step is not shown: this engine's matrix products were not measured there.")
    warnings = [said for grid in grids if (said := _too_fast(grid, found.bandwidth))]
    if _has_rows(found) and found.other.name != found.plain.name:
        warnings.append(f"bf16 and {found.method} are two kernels here: {found.plain.name} and {found.other.name}.")
    return [*infos(notes), *(Note(text, "warning") for text in warnings)]


def _errors(grids: Iterable[Grid]) -> str:
    """What interpolation errs by."""
    found: dict[str, list[float]] = {"one batch": [], "one length": []}
    for grid in grids:
        found["one batch"] += [error for error, _ in held_out(grid, 0)]
        found["one length"] += [error for error, _ in held_out(grid, 1)]
    said = [
        f"{name} {100 * np.median(errors):.1f} % (90 % of the cells {100 * np.quantile(errors, 0.9):.0f} % at most)"
        for name, errors in found.items() if errors
    ]  # fmt: skip
    return f"Cells that are left out are predicted from the others within a median of: {', '.join(said) or 'unknown'}."


def _model(found: Comparison) -> list[str]:
    """What modelled figures are, and how far the model is off where something was measured."""
    rates = ", ".join(f"{model_of(grid).bandwidth / 1e9:.2f} TB/s ({dtype})" for dtype, grid in found.grids.items())
    said = [
        f"{MODELLED} modelled, not measured: a kernel's time for its shortest contexts, and bytes over the bandwidth "
        f"that it achieves beyond the L2: {rates}. A format without rows is taken to be read as fp8 is, or as bf16 "
        "where there is no fp8; an eviction is a kernel at the length that is left. What selecting, packing and "
        "unpacking cost is not counted."
    ]
    if FP8 in found.grids:
        plain, other = found.grids[BF16], found.grids[FP8]
        model = Modelled("", plain, model_of(other).bytes_of)
        both = [cell for cell in other.beyond() if cell in plain.cells]
        guessed = [plain.cells[cell] / guess.ms for cell in both if (guess := model.at(*cell))]
        if both:
            real = np.median([plain.cells[cell] / other.cells[cell] for cell in both])
            said.append(
                f"The same model on bf16's kernel puts fp8 at {np.median(guessed):.2f} × where {real:.2f} × was "
                "measured (medians beyond the L2)."
            )
    return said


def _too_fast(grid: Grid, bandwidth: float) -> str:
    most = max((times for _, times in impossible(grid, bandwidth)), default=0.0)
    if not most:
        return ""
    count = len(list(impossible(grid, bandwidth)))
    return f"{grid.name}: {count} cells beyond the L2 show up to {most:.2f} × the memory's bandwidth: doubt them."
