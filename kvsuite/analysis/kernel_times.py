"""What the kernels of a decode step take, from tables that others measured: pure arithmetic.

A table has an attention kernel's time by batch and length. Its cells are taken as they are; between cells the time is
interpolated; outside nothing is known. A benchmark runs one layer over and over. K and V that fit into the GPU's L2
cache are then read from there, which no model with more layers would see: such cells are *cache-resident*. They are
interpolated by themselves, and so are the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import numpy as np

from kvsuite.shapes import ModelShape

How = Literal["measured", "interpolated", "modelled"]


def weaker(one: How, other: How) -> How:
    """What a ratio of two times rests on."""
    return max(one, other, key=("measured", "interpolated", "modelled").index)


@dataclass(frozen=True)
class Estimate:
    """A time in ms, and what it rests on."""

    ms: float
    how: How
    resident: bool


class Kernel(Protocol):
    """One format's attention in one layer."""

    @property
    def name(self) -> str:
        """Of the kernel."""

    def at(self, batch: int, length: int) -> Estimate | None:
        """The time of a step; None outside what is known."""

    def footprint(self, batch: int, length: int) -> float:
        """Bytes of K and V that a step reads in one layer."""


@dataclass(frozen=True)
class Grid:
    """A measured kernel: ms by (batch, length)."""

    name: str
    cells: Mapping[tuple[int, int], float]
    token_bytes: float
    """Of one token's K and V in one layer."""
    l2: float
    """Bytes."""

    def footprint(self, batch: int, length: int) -> float:
        """Bytes of K and V that a step reads in one layer."""
        return batch * length * self.token_bytes

    def resident(self, batch: int, length: int) -> bool:
        """Whether the L2 holds them."""
        return self.footprint(batch, length) <= self.l2

    @cached_property
    def lines(self) -> dict[int, dict[int, float]]:
        """ms by length, of each batch."""
        found: dict[int, dict[int, float]] = {}
        for (batch, length), ms in sorted(self.cells.items()):
            found.setdefault(batch, {})[length] = ms
        return found

    def at(self, batch: int, length: int) -> Estimate | None:
        """The table's own entry; else a line between two of a batch's lengths, and between batches at that length."""
        resident = self.resident(batch, length)
        if (batch, length) in self.cells:
            return Estimate(self.cells[batch, length], "measured", resident)
        if batch in self.lines:
            ms = between(self.lines[batch], length, lambda x: self.resident(batch, x))
        else:
            known = {b: between(line, length, lambda x, b=b: self.resident(b, x)) for b, line in self.lines.items()}  # type: ignore[misc]
            across = {b: ms for b, ms in known.items() if ms is not None}
            ms = between(across, batch, lambda x: self.resident(x, length))
        return None if ms is None else Estimate(ms, "interpolated", resident)

    def beyond(self) -> dict[tuple[int, int], float]:
        """The cells that the L2 does not hold."""
        return {cell: ms for cell, ms in self.cells.items() if not self.resident(*cell)}


def between(points: Mapping[int, float], x: int, group: Callable[[int], bool]) -> float | None:
    """The value at ``x`` of a straight line through two points (by x) of its own group: its neighbours, else the
    nearest two on one side, else the neighbours of either group. None outside the points."""
    if x in points:
        return points[x]
    if not points or not min(points) < x < max(points):
        return None
    one, other = _neighbours([p for p in sorted(points) if group(p) == group(x)], x) or (
        max(p for p in points if p < x),
        min(p for p in points if p > x),
    )
    return points[one] + (points[other] - points[one]) * (x - one) / (other - one)


def _neighbours(places: Sequence[int], x: int) -> tuple[int, int] | None:
    below, above = [p for p in places if p < x], [p for p in places if p > x]
    if below and above:
        return below[-1], above[0]
    if len(places) < 2:
        return None
    return (below[-2], below[-1]) if below else (above[0], above[1])


def held_out(grid: Grid, axis: Literal[0, 1]) -> list[tuple[float, bool]]:
    """Relative errors of interpolated cells, and whether the L2 held them: each batch (axis 0) or length (1) is left
    out once, and predicted from the others where it lies between them."""
    found = []
    for left_out in {cell[axis] for cell in grid.cells}:
        rest = replace(grid, cells={cell: ms for cell, ms in grid.cells.items() if cell[axis] != left_out})
        for cell, ms in grid.cells.items():
            if cell[axis] == left_out and (guess := rest.at(*cell)):
                found.append((abs(guess.ms / ms - 1), guess.resident))
    return found


def impossible(grid: Grid, bandwidth: float) -> Iterator[tuple[tuple[int, int], float]]:
    """Cells beyond the L2 that would need more than the memory's bandwidth (bytes a ms), and how many times as much."""
    for cell, ms in grid.beyond().items():
        if (times := grid.footprint(*cell) / ms / bandwidth) > 1:
            yield cell, times


@dataclass(frozen=True)
class Modelled:
    """A kernel that nobody measured, as a measured one that reads other bytes: ``base``'s time at its shortest length,
    and bytes over the bandwidth that it achieves."""

    name: str
    base: Grid
    bytes_of: Callable[[int], float]
    """Bytes of one sequence's K and V in one layer, by its length."""

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a ms: the median of each batch's longest cell beyond the L2, of any cell where there is none."""
        longest = {cell[0]: cell for cell in sorted(self.base.beyond() or self.base.cells)}
        rates = [
            self.base.footprint(*cell) / (self.base.cells[cell] - self._floor(cell[0]))
            for cell in longest.values()
            if self.base.cells[cell] > self._floor(cell[0])
        ]
        return float(np.median(rates))

    def footprint(self, batch: int, length: int) -> float:
        """Bytes of K and V that a step reads in one layer."""
        return batch * self.bytes_of(length)

    def at(self, batch: int, length: int) -> Estimate | None:
        """At any length; None outside the measured batches."""
        if not min(self.base.lines) <= batch <= max(self.base.lines):
            return None
        held = self.footprint(batch, length)
        return Estimate(self._floor(batch) + held / self.bandwidth, "modelled", held <= self.base.l2)

    def _floor(self, batch: int) -> float:
        shortest = {b: next(iter(line.values())) for b, line in self.base.lines.items()}
        ms = between(shortest, batch, lambda _: True)
        assert ms is not None
        return ms


def model_of(base: Grid) -> Modelled:
    """A measured kernel's own model."""
    return Modelled(base.name, base, lambda length: length * base.token_bytes)


@dataclass(frozen=True)
class Shorter:
    """A measured kernel over the tokens that an eviction leaves."""

    name: str
    base: Kernel
    tokens: Callable[[int], int]

    def footprint(self, batch: int, length: int) -> float:
        """Bytes of K and V that a step reads in one layer."""
        return self.base.footprint(batch, self.tokens(length))

    def at(self, batch: int, length: int) -> Estimate | None:
        """The kernel's time at the length that is left."""
        found = self.base.at(batch, self.tokens(length))
        return None if found is None else replace(found, how="modelled")


@dataclass(frozen=True)
class Extended:
    """A measured kernel, and its model where nothing was measured."""

    base: Grid

    @property
    def name(self) -> str:
        """Of the kernel."""
        return self.base.name

    def footprint(self, batch: int, length: int) -> float:
        """Bytes of K and V that a step reads in one layer."""
        return self.base.footprint(batch, length)

    def at(self, batch: int, length: int) -> Estimate | None:
        """Measured or interpolated inside, modelled outside; None outside the measured batches."""
        return self.base.at(batch, length) or model_of(self.base).at(batch, length)


@dataclass(frozen=True)
class Products:
    """The matrix products of a step, from measured ones: ms by (n, k), then by m."""

    cells: Mapping[tuple[int, int], Mapping[int, float]]
    bandwidth: float
    """Of the memory, bytes a ms: no product is counted as faster than its weights can be read. Benchmarks repeat one
    product, so an L2 may hold weights that it would not hold in a model."""

    def ms(self, shape: ModelShape, batch: int) -> float | None:
        """All products of a step of ``batch`` tokens; None where one lies outside what was measured."""
        found = [(self.one(batch, n, k), 2 * n * k / self.bandwidth, times) for n, k, times in shape.matrices()]
        if any(ms is None for ms, _, _ in found):
            return None
        return sum(times * max(ms, least) for ms, least, times in found if ms is not None)

    def one(self, m: int, n: int, k: int) -> float | None:
        """One product, along straight lines in m, then n, then k. Wider ones than any that was measured lie on the line
        through the widest two: an output embedding."""
        by_k = {}
        for inner in sorted({k for _, k in self.cells}):
            line = {}
            for outer in sorted({n for n, k in self.cells if k == inner}):
                ms = between(self.cells[outer, inner], m, lambda _: True)
                if ms is not None:
                    line[outer] = ms
            ms = between(line, n, lambda _: True) if line and n <= max(line) else _onwards(line, n)
            if ms is not None:
                by_k[inner] = ms
        return between(by_k, k, lambda _: True)


def _onwards(line: Mapping[int, float], x: int) -> float | None:
    if len(line) < 2:
        return None
    one, other = sorted(line)[-2:]
    return line[other] + (line[other] - line[one]) * (x - other) / (other - one)
