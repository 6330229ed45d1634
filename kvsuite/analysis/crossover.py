"""Where reading fewer bytes of K and V makes a decode step faster than bf16's, and what fits: pure arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvsuite.analysis.kernel_times import Estimate, Grid, How, Kernel
from kvsuite.shapes import ModelShape

Resident = Literal["", "one", "both"]
"""Whose K and V the L2 holds: nobody's, the compressed alone, or both."""

L2_MIB = {
    "a100_sxm": 40, "h100_sxm": 50, "h200_sxm": 50, "b200_sxm": 126, "b300_sxm": 126, "gb200": 126, "gb300": 126,
    "l40s": 96, "rtx_pro_6000_server": 128, "b60": 18,
}  # fmt: skip
"""L2 of each GPU as its vendor states it. What kernels achieve falls to the memory's bandwidth at these sizes."""


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

    @property
    def how(self) -> How:
        """What the speed rests on: the weaker of both."""
        return max(self.plain.how, self.other.how, key=("measured", "interpolated", "modelled").index)

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
        return self.rest + self.layers * self.plain.ms, self.rest + self.layers * self.other.ms

    @property
    def step_speed(self) -> float | None:
        """Of a whole step, × bf16's."""
        return None if self.steps is None else self.steps[0] / self.steps[1]


@dataclass(frozen=True)
class Comparison:
    """A format against bf16 on one engine and GPU."""

    shape: ModelShape
    plain: Kernel
    other: Kernel
    rest: Callable[[int], float | None]
    """ms of a step's matrix products by batch; None where they are unknown."""

    def cell(self, batch: int, length: int) -> Cell | None:
        """Both formats there; None where one is unknown."""
        plain, other = self.plain.at(batch, length), self.other.at(batch, length)
        if plain is None or other is None:
            return None
        return Cell(batch, length, plain, other, self.rest(batch), self.shape.layers)

    def rate(self, kernel: Kernel, batch: int, length: int) -> tuple[float, How] | None:
        """Tokens a second of a batch, and what they rest on."""
        attention, rest = kernel.at(batch, length), self.rest(batch)
        if attention is None or rest is None:
            return None
        return 1000 * batch / (rest + self.shape.layers * attention.ms), attention.how

    def fits(self, kernel: Kernel, memory: float, length: int) -> int:
        """Sequences of this length whose K and V, with the weights in bf16, fit into the memory: an upper bound."""
        free = memory - 2 * self.shape.parameters
        return max(0, int(free // (self.shape.layers * kernel.footprint(1, length))))


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
