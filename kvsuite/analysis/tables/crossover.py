"""Tables and maps of `kvsuite crossover`: where a format of K and V is faster than bf16, and what fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kvsuite.analysis import kv_formats
from kvsuite.analysis.crossover import L2_MIB, BreakEven, Comparison, Resident, break_even, lines_cross
from kvsuite.analysis.crossover import Cell as Compared
from kvsuite.analysis.figure import Axis, Map, Tile
from kvsuite.analysis.kernel_times import Extended, Grid, How, Kernel, Modelled, Products, held_out, impossible
from kvsuite.analysis.table import Cell, Column, Note, Row, Table, infos
from kvsuite.errors import UsageError, unknown
from kvsuite.readers.aiconfigurator import Measured
from kvsuite.shapes import ModelShape

MODELLED, INTERPOLATED = "~", "i"
MARKS: dict[Resident, str] = {"": "", "one": "'", "both": "*"}
GROUPS: dict[Resident, str] = {"": "beyond the L2", "one": "compressed in the L2", "both": "both in the L2"}
LENGTHS = tuple(1024 * 2**k for k in range(8))
"""Of which the capacity is told."""
SHORTEST = 256
"""Tokens from which on lengths of the tables are shown unasked."""


@dataclass(frozen=True)
class Setting:
    """What is compared, and where it comes from."""

    model: str
    gpu: str
    engine: str
    method: str
    source: str
    memory: float
    """Bytes of the GPU."""
    bandwidth: float
    """Of its memory, bytes a ms."""

    @property
    def title(self) -> str:
        """In one line."""
        return f"{self.model} on {self.gpu} with {self.engine}: {self.method} K/V against bf16"


def compare(
    measured: Measured, model: str, shape: ModelShape, method: str, kernel: str | None, extended: bool
) -> tuple[Setting, Comparison, dict[str, Grid]]:
    """What is compared, of an engine's tables. Raises UsageError for a method or kernel that cannot be."""
    l2 = L2_MIB.get(measured.gpu, 0) * 2**20
    grids = {}
    for dtype, kernels in sorted(measured.attention.items()):
        name = _one(kernels, kernel, dtype)
        token = 2 * shape.kv_heads * shape.head_dim * (1 if dtype == kv_formats.FP8 else 2)
        grids[dtype] = Grid(name, kernels[name], token, l2)
    where = f"{measured.engine} {measured.version}"
    if kv_formats.FP8 not in grids and method == kv_formats.FP8:
        why = "; GPUs before compute capability 8.9 have no fp8" if measured.capability < 89 else ""
        raise UsageError(f"{where} was not measured with fp8 K/V on {measured.gpu}, only with {', '.join(grids)}{why}")
    other = kv_formats.kernel(method, grids, shape, extended)
    plain = grids[kv_formats.BF16]
    products = Products(measured.products, measured.bandwidth / 1000)
    rest = cache(lambda batch: products.ms(shape, batch))
    found = Comparison(shape, Extended(plain) if extended else plain, other, rest)
    setting = Setting(model, measured.gpu, where, method, measured.source, measured.memory, measured.bandwidth / 1000)
    return setting, found, grids


def _one(kernels: Mapping[str, object], wanted: str | None, dtype: str) -> str:
    """The kernel of a dtype. Raises UsageError where it must be chosen."""
    if len(kernels) == 1:
        return next(iter(kernels))
    if wanted is None:
        raise UsageError(
            f"{dtype} K/V was measured with {len(kernels)} kernels: choose --kernel {' or '.join(kernels)}"
        )
    if wanted is None or wanted not in kernels:
        raise unknown("kernel", wanted, kernels)
    return wanted


def cells(
    found: Comparison, grids: Mapping[str, Grid], batches: Sequence[int] | None, lengths: Sequence[int] | None
) -> list[Compared]:
    """Those that are asked for, else the tables' own. Raises UsageError for one outside what is known."""
    plain = grids[kv_formats.BF16]
    rows, columns = batches or sorted(plain.lines), lengths or sorted({n for _, n in plain.cells if n >= SHORTEST})
    known = {(b, n): cell for b in rows for n in columns if (cell := found.cell(b, n))}
    for batch in batches or ():
        for length in lengths or ():
            if (batch, length) not in known:
                raise UsageError(_outside(plain, batch, length))
    for at, asked in enumerate((batches or (), lengths or ())):
        if missing := set(asked) - {cell[at] for cell in known}:
            raise UsageError(_outside(plain, *((min(missing), columns[0]) if at == 0 else (rows[0], min(missing)))))
    return list(known.values())


def _outside(plain: Grid, batch: int, length: int) -> str:
    low, high = min(plain.lines), max(plain.lines)
    said = f"batch {batch:,} × {length:,} tokens lies outside what was measured: batch {low:,}–{high:,}"
    if low <= batch <= high:
        line = plain.lines[min(b for b in plain.lines if b >= batch)]
        said += f", at this one {min(line):,}–{max(line):,} tokens; --extrapolate shows a stated model there"
    return said


def tables(setting: Setting, found: Comparison, grids: Mapping[str, Grid], cells: Sequence[Compared]) -> list[Table]:
    """All of them; ``grids``: the engine's measured kernels by K/V dtype."""
    steps = any(cell.steps for cell in cells)
    shown = [_summary(setting, found, cells)]
    shown += [_table(cells, "attention", "Attention alone: its speed, × bf16's", [])]
    if steps:
        what = "Attention and the matrix products of all layers and the output, without norms, sampling and host time."
        shown += [_table(cells, "step", "The whole decode step: its speed, × bf16's", [what])]
    shown += [_break_even(found, grids, cells), _capacity(setting, found)]
    shown += [Table("notes", "How to read this", notes=_notes(setting, found, grids, cells, steps))]
    return shown


def maps(cells: Sequence[Compared]) -> list[Map]:
    """Attention alone, and the whole step where it is known."""
    return [
        m
        for kind, title in (("attention", "Attention alone"), ("step", "Whole decode step"))
        if (m := _map(cells, kind, title))
    ]


def as_json(setting: Setting, found: Comparison, cells: Sequence[Compared]) -> dict[str, Any]:
    """Every cell as numbers, for a program."""
    return {
        "model": setting.model, "gpu": setting.gpu, "engine": setting.engine, "method": setting.method,
        "source": setting.source, "kernels": [found.plain.name, found.other.name],
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


def _summary(setting: Setting, found: Comparison, cells: Sequence[Compared]) -> Table:
    """The groups of cells, those that the L2 does not hold first."""
    rows = []
    for resident, name in GROUPS.items():
        group = [cell for cell in cells if cell.resident == resident]
        if not group:
            continue
        steps = [cell.step_speed for cell in group if cell.step_speed is not None]
        rows.append(
            Row(
                (name,),
                {
                    "cells": Cell(len(group)),
                    "faster": Cell(sum(cell.speed > 1 for cell in group), of=len(group)),
                    "attention": _spread([cell.speed for cell in group]),
                    "step": _spread(steps),
                },
            )
        )
    columns = [
        Column("faster", "faster"),
        Column("attention", "attention, median (range)", "×", "range"),
        Column("step", "whole step, median (range)", "×", "range"),
    ]
    note = Note(f"Kernels: {found.plain.name} (bf16), {found.other.name} ({setting.method}).")
    return Table("summary", setting.title, ("cells, K/V of a layer",), columns, rows, [note])


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


def _break_even(found: Comparison, grids: Mapping[str, Grid], cells: Sequence[Compared]) -> Table:
    both = (grids[kv_formats.BF16], grids[kv_formats.FP8]) if isinstance(found.other, (Grid, Extended)) else None
    rows = []
    for batch in sorted({cell.batch for cell in cells}):
        mine = [cell for cell in cells if cell.batch == batch]
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
    notes = [
        "The same for the whole step, whose other parts take equally long. In parentheses: the cells on either side."
    ]
    if both is not None:
        notes.append(
            "Lines: through each format's cells beyond the L2, also below them, as an estimate of what a model sees, "
            "whose layers do not find their K and V in the L2."
        )
    return Table("break-even", "Faster from which length on, tokens", ("batch",), columns, rows, infos(notes))


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


def _capacity(setting: Setting, found: Comparison) -> Table:
    kernels: dict[str, Kernel] = {"plain": found.plain, "other": found.other}
    kernels = {name: Extended(k) if isinstance(k, Grid) else k for name, k in kernels.items()}
    rows = []
    for length in LENGTHS:
        fits = {name: found.fits(kernel, setting.memory, length) for name, kernel in kernels.items()}
        cells = {name: Cell(number) for name, number in fits.items()}
        rates = {name: found.rate(kernel, fits[name], length) for name, kernel in kernels.items() if fits[name]}
        for name, rate in rates.items():
            if rate is not None:
                cells[f"{name}:rate"] = Cell(f"{MODELLED if rate[1] == 'modelled' else ''}{rate[0]:,.0f}")
        if fits["plain"]:
            cells["more"] = Cell(fits["other"] / fits["plain"])
            if (one := rates.get("plain")) and (other := rates.get("other")):
                cells["gain"] = Cell(marked(other[0] / one[0], max(one[1], other[1], key=_weakness)))
        rows.append(Row((_short(length),), cells))
    columns = [
        Column("plain", "bf16, sequences"),
        Column("other", f"{setting.method}, sequences"),
        Column("more", "×", "×", beside=True),
        Column("plain:rate", "bf16 tok/s"),
        Column("other:rate", f"{setting.method} tok/s"),
        Column("gain", "× "),
    ]
    weights = 2 * found.shape.parameters
    note = (
        f"{setting.memory / 2**30:,.1f} GiB, of which the weights take {weights / 2**30:,.1f}; all the rest is counted "
        "for K and V, so an engine, which needs memory of its own, holds fewer. tok/s: with so many sequences at once."
    )
    return Table("capacity", "Sequences that fit, by length", ("length",), columns, rows, [Note(note)])


def _weakness(how: How) -> int:
    return ("measured", "interpolated", "modelled").index(how)


def _notes(
    setting: Setting, found: Comparison, grids: Mapping[str, Grid], cells: Sequence[Compared], steps: bool
) -> list[Note]:
    notes = [f"Source: {setting.source}, as others measured them; nothing was timed here."]
    l2 = next(iter(grids.values())).l2
    if l2:
        notes.append(
            f"{MARKS['both']} cache-resident: one layer's K and V fit into the L2 of {l2 / 2**20:.0f} MiB, where a "
            f"model would not find them; {MARKS['one']} the compressed alone do, which flatters it."
        )
    else:
        notes.append("The size of this GPU's L2 is not known here: cache-resident cells are not told apart.")
    if any(cell.how == "interpolated" for cell in cells):
        notes.append(f"{INTERPOLATED} interpolated between measured cells of its own kind.")
    notes.append(_errors(grids.values()))
    if any(cell.how == "modelled" for cell in cells):
        notes += _model(grids)
    if not steps:
        notes.append("The whole step is not shown: this engine's matrix products were not measured there.")
    warnings = [w for grid in grids.values() if (w := _too_fast(grid, setting.bandwidth))]
    used = [kernel.name for kernel in (found.plain, found.other) if isinstance(kernel, (Grid, Extended))]
    if len(set(used)) > 1:
        warnings.append(f"bf16 and {setting.method} are two different kernels here: {' and '.join(used)}.")
    return [*infos(notes), *(Note(text, "warning") for text in warnings)]


def _errors(grids: Iterable[Grid]) -> str:
    """What interpolation errs by."""
    said = []
    for axis, name in ((0, "batch"), (1, "length")):
        errors = [error for grid in grids for error, _ in held_out(grid, 0 if axis == 0 else 1)]
        if errors:
            said.append(f"one {name}: {100 * np.median(errors):.1f} % ({100 * np.quantile(errors, 0.9):.0f} %)")
    return f"Interpolated cells err by (90 % of them by less than), leaving out {', '.join(said)}."


def _model(grids: Mapping[str, Grid]) -> list[str]:
    """What modelled figures are, and how far the model is off where something was measured."""
    dtype, base = next((dtype, grids[dtype]) for dtype in (kv_formats.FP8, kv_formats.BF16) if dtype in grids)
    rate = Modelled("", base, lambda n: n * base.token_bytes).bandwidth * 1000 / 1e12
    said = [
        f"{MODELLED} modelled, not measured: the time of {base.name} ({dtype}) for its shortest contexts, and bytes "
        f"over the {rate:.2f} TB/s that it achieves beyond the L2; an eviction is a measured kernel at the length that is "
        "left. What selecting, packing and unpacking cost is not counted: so much is gained at best."
    ]
    if dtype == kv_formats.FP8:
        plain = grids[kv_formats.BF16]
        model = Modelled("", plain, lambda n: n * base.token_bytes)
        both = [cell for cell in base.beyond() if cell in plain.cells]
        guessed = [plain.cells[cell] / guess.ms for cell in both if (guess := model.at(*cell))]
        real = [plain.cells[cell] / base.cells[cell] for cell in both]
        if real:
            said.append(
                f"The same model on bf16's kernel puts fp8 at {np.median(guessed):.2f} × where {np.median(real):.2f} × "
                "was measured (medians beyond the L2)."
            )
    return said


def _too_fast(grid: Grid, bandwidth: float) -> str:
    most = max((times for _, times in impossible(grid, bandwidth)), default=0.0)
    if not most:
        return ""
    count = len(list(impossible(grid, bandwidth)))
    return f"{grid.name}: {count} cells beyond the L2 show up to {most:.2f} × the memory's bandwidth: doubt them."
