"""Where reading fewer bytes of K and V makes a decode step faster than bf16's, and what fits: pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np

from kvsuite.analysis.kernel_times import Estimate, Extended, Grid, How, Kernel, Products, weaker
from kvsuite.analysis.kv_formats import BF16, FP8, NotMeasured, kernel_of
from kvsuite.errors import UsageError, unknown
from kvsuite.readers.aiconfigurator import Measured
from kvsuite.shapes import SHAPES, ModelShape

SHORTEST = 256
"""Tokens from which on lengths of the tables are shown unasked."""

Resident = Literal["", "one", "both"]
"""Whose K and V the L2 holds: nobody's, the compressed alone, or both."""

L2_MIB = {
    "a100_sxm": 40, "h100_sxm": 50, "h200_sxm": 50, "b200_sxm": 126, "b300_sxm": 126, "gb200": 126, "gb300": 126,
    "l40s": 96, "rtx_pro_6000_server": 128, "b60": 18,
}  # fmt: skip
"""L2 of each GPU as it is published. On L40S and RTX PRO 6000 what kernels achieve falls to the memory's bandwidth at
these sizes (suites/peers/estimators.py)."""


@dataclass(frozen=True)
class Cell:
    """One batch and length: attention in one layer, and the whole step, with both formats."""

    batch: int
    length: int
    plain: Estimate
    other: Estimate
    rest: float | None
    """ms of the step's matrix products; None where they are unknown."""
    layers: int
    least: tuple[float, float]
    """ms in which the memory could be read, of each format's K and V in one layer: no layer of a whole step is counted
    as faster, since the L2 does not hold all layers."""

    @property
    def how(self) -> How:
        """What the speed rests on: the weaker of both."""
        return weaker(self.plain.how, self.other.how)

    @property
    def resident(self) -> Resident:
        """Whose K and V the L2 holds."""
        return "both" if self.plain.resident else "one" if self.other.resident else ""

    @property
    def speed(self) -> float:
        """Of attention, × bf16's."""
        return self.plain.ms / self.other.ms

    @property
    def steps(self) -> tuple[float, float] | None:
        """ms of a whole step: bf16's, and the other format's."""
        if self.rest is None:
            return None
        one, other = (max(e.ms, least) for e, least in zip((self.plain, self.other), self.least, strict=True))
        return self.rest + self.layers * one, self.rest + self.layers * other

    @property
    def step_speed(self) -> float | None:
        """Of a whole step, × bf16's."""
        return None if self.steps is None else self.steps[0] / self.steps[1]


@dataclass(frozen=True)
class Comparison:
    """A format of K and V against bf16 on one engine and GPU."""

    model: str
    method: str
    shape: ModelShape
    measured: Measured
    grids: Mapping[str, Grid]
    """The engine's measured kernels, by K/V dtype."""
    plain: Kernel
    other: Kernel
    beyond: tuple[Kernel, Kernel]
    """Both, with a model where nothing was measured."""

    @property
    def engine(self) -> str:
        """Its name and version."""
        return f"{self.measured.engine} {self.measured.version}"

    @property
    def bandwidth(self) -> float:
        """Of the memory, bytes a ms."""
        return self.measured.bandwidth / 1000

    @cached_property
    def _rest(self) -> Callable[[int], float | None]:
        products = Products(self.measured.products, self.bandwidth)
        return cache(lambda batch: products.ms(self.shape, batch))

    def cell(self, batch: int, length: int) -> Cell | None:
        """Both formats there; None where one is unknown."""
        plain, other = self.plain.at(batch, length), self.other.at(batch, length)
        if plain is None or other is None:
            return None
        least = self._least(self.plain, batch, length), self._least(self.other, batch, length)
        return Cell(batch, length, plain, other, self._rest(batch), self.shape.layers, least)

    def _least(self, kernel: Kernel, batch: int, length: int) -> float:
        """ms in which the memory can be read."""
        return kernel.footprint(batch, length) / self.bandwidth

    @property
    def lengths(self) -> list[int]:
        """Those of the tables, from 256 tokens on."""
        return sorted({length for _, length in self.grids[BF16].cells if length >= SHORTEST})

    def of_batch(self, batch: int) -> list[Cell]:
        """All lengths of the tables at which bf16 was measured, or can be interpolated, with this batch."""
        there = [length for length in self.lengths if self.grids[BF16].at(batch, length)]
        return [cell for length in there if (cell := self.cell(batch, length))]

    def cells(self, batches: Sequence[int] | None, lengths: Sequence[int] | None) -> list[Cell]:
        """Those that are asked for, else the tables' own. Raises UsageError for one outside what is known."""
        plain = self.grids[BF16]
        rows, columns = batches or sorted(plain.lines), lengths or self.lengths
        known = {(b, n): cell for b in rows for n in columns if (cell := self.cell(b, n))}
        asked = [(b, n) for b in batches or () for n in lengths or ()]
        asked += [(b, columns[0]) for b in batches or () if not any(b == cell[0] for cell in known)]
        asked += [(rows[0], n) for n in lengths or () if not any(n == cell[1] for cell in known)]
        for batch, length in asked:
            if (batch, length) not in known:
                raise UsageError(_outside(plain, batch, length))
        return list(known.values())

    def rate(self, kernel: Kernel, batch: int, length: int) -> tuple[float, How] | None:
        """Tokens a second of a batch, and what they rest on."""
        attention, rest = kernel.at(batch, length), self._rest(batch)
        if attention is None or rest is None:
            return None
        ms = max(attention.ms, self._least(kernel, batch, length))
        return 1000 * batch / (rest + self.shape.layers * ms), attention.how

    def fits(self, kernel: Kernel, length: int) -> int:
        """Sequences of this length whose K and V, with the weights in bf16, fit into the memory: an upper bound."""
        free = self.measured.memory - 2 * self.shape.parameters
        return max(0, int(free // (self.shape.layers * kernel.footprint(1, length))))


def _outside(plain: Grid, batch: int, length: int) -> str:
    low, high = min(plain.lines), max(plain.lines)
    said = f"batch {batch:,} × {length:,} tokens lies outside what was measured: batch {low:,}–{high:,}"
    if low <= batch <= high:
        line = plain.lines[min(b for b in plain.lines if b >= batch)]
        said += f", at this one {min(line):,}–{max(line):,} tokens; --extrapolate shows a stated model there"
    return said


def compare(
    measured: Measured, model: str, method: str = FP8, kernel: str | None = None, extended: bool = False
) -> Comparison:
    """What an engine's tables say of a method; ``kernel`` chooses where a dtype was measured with several, ``extended``
    allows a model where nothing was. Raises UsageError for a method or kernel that cannot be compared."""
    names = {name for kernels in measured.attention.values() for name in kernels}
    if kernel is not None and kernel not in names:
        raise unknown("kernel", kernel, names)
    shape, grids = SHAPES[model], {}
    for dtype, kernels in sorted(measured.attention.items()):
        name = next(iter(kernels)) if len(kernels) == 1 else kernel
        if name is None or name not in kernels:
            several = " or ".join(sorted(kernels))
            raise UsageError(f"{dtype} K/V was measured with {len(kernels)} kernels: choose --kernel {several}")
        token = 2 * shape.kv_heads * shape.head_dim * (1 if dtype == FP8 else 2)
        grids[dtype] = Grid(name, kernels[name], token, L2_MIB.get(measured.gpu, 0) * 2**20)
    plain = grids[BF16]
    try:
        other, beyond = (kernel_of(method, grids, shape, wide) for wide in (extended, True))
    except NotMeasured as error:
        old = "; GPUs before compute capability 8.9 have no fp8" if measured.capability < 89 else ""
        raise UsageError(f"{measured.engine} {measured.version} on {measured.gpu}: {error}{old}") from error
    wide = Extended(plain)
    return Comparison(model, method, shape, measured, grids, wide if extended else plain, other, (wide, beyond))


@dataclass(frozen=True)
class BreakEven:
    """From which length on a format is faster, in cells of one batch."""

    slower: int | None
    """The longest length at which it is slower; None where there is none."""
    faster: int | None
    """The shortest from which on it is not; None where there is none."""
    length: float | None
    """Where the line between both crosses 1."""


def break_even(cells: Sequence[Cell]) -> BreakEven | None:
    """Of one batch's cells; None where there is none."""
    if not cells:
        return None
    ordered = sorted(cells, key=lambda cell: cell.length)
    slow = [at for at, cell in enumerate(ordered) if cell.speed < 1]
    if not slow:
        return BreakEven(None, ordered[0].length, None)
    last = ordered[slow[-1]]
    if last is ordered[-1]:
        return BreakEven(last.length, None, None)
    first = ordered[slow[-1] + 1]
    part = np.log(last.speed) / (np.log(last.speed) - np.log(first.speed))
    return BreakEven(last.length, first.length, float(last.length * (first.length / last.length) ** part))


def lines_cross(plain: Grid, other: Grid, batch: int) -> float | None:
    """The length at which lines through a batch's cells beyond the L2 cross, also where that is below these cells: an
    estimate of what a model sees, which never finds its K and V in the L2. Fitted by least squares of relative errors.
    0 where the other format is faster at any length, infinite where it never is; None where a format has fewer than
    three such cells."""
    fits = []
    for grid in (plain, other):
        points = sorted((length, ms) for (b, length), ms in grid.beyond().items() if b == batch)
        if len(points) < 3:
            return None
        x, y = np.array(points).T
        fits.append(np.polyfit(x, y, 1, w=1 / y))
    (slope, start), (other_slope, other_start) = fits
    if other_start <= start:
        return 0.0 if other_slope <= slope else None
    return float((other_start - start) / (slope - other_slope)) if other_slope < slope else float("inf")
