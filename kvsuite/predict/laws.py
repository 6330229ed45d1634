"""What one method's server takes of time and memory, as a few coefficients: fitted to timed cells, or stated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvsuite.errors import UsageError, unknown
from kvsuite.predict.cells import Cell
from kvsuite.records import Run, Timing


@dataclass(frozen=True)
class Law:
    """One method on one kind of server."""

    method: str
    prefill: tuple[float, float, float]
    """Seconds of a prefill: constant, per token, per token²."""
    step: tuple[float, float, float]
    """Seconds of a decode step: constant, per sequence, per token in the caches of all sequences."""
    share: float = 1.0
    """Memory of a stored token, in tokens of the uncompressed cache."""
    budget: float = math.inf
    """The most tokens that are stored of a sequence."""
    off: float = 0.0
    """How far the laws are from the cells they were fitted to at worst, as a part of the time measured."""

    def prefill_seconds(self, tokens: int) -> float:
        """Of one prompt."""
        constant, linear, square = self.prefill
        return constant + tokens * (linear + square * tokens)

    def step_seconds(self, sequences: int, tokens: float) -> float:
        """Of one step; ``tokens`` are in the caches of all its sequences."""
        constant, each, token = self.step
        return constant + each * sequences + token * tokens

    def steps_seconds(self, steps: int, sequences: int, tokens: float) -> float:
        """Of so many steps in a row, each of which makes every cache a token longer."""
        return steps * (self.step_seconds(sequences, tokens) + self.step[2] * sequences * (steps - 1) / 2)

    def held(self, tokens: float) -> float:
        """Memory of a sequence of so many tokens, in tokens of the uncompressed cache."""
        return self.share * min(tokens, self.budget)


def fitted(cells: Sequence[Cell], run: Run | None = None) -> dict[str, Law]:
    """Of every method with both stages among ``cells``, which are of one model and machine; the uncompressed cache is
    first. Memory is known of a run alone: of the longest context timed, a method's bytes over the uncompressed ones'.
    Raises UsageError where the uncompressed cache was not timed in both stages, and for cells of several models.

    A step's cost is the least-squares fit, without negative parts and of relative errors, of a constant, a cost for
    each sequence (where several widths were timed) and one for each token in the caches (where several lengths were).
    """
    if several := sorted({c.model for c in cells})[1:]:
        raise UsageError(f"the times are of several models, {several[0]} among them: name one with --model")
    methods = dict.fromkeys(c.method for c in sorted(cells, key=lambda c: not c.plain))
    shares = _shares(run) if run else {}
    found = {}
    for method in methods:
        own = [c for c in cells if c.method == method]
        stages = [[c for c in own if c.stage == stage] for stage in ("prefill", "decoding")]
        if not all(stages):
            continue
        prefills, steps = stages
        (p, far), (s, off) = _fit(prefills, _prefill_columns(prefills)), _fit(steps, _step_columns(steps))
        found[method] = Law(method, p, s, shares.get(method, 1.0), off=max(far, off))
    plain = next((c.method for c in cells if c.plain), "")
    if plain not in found:
        raise UsageError("the uncompressed cache was not timed both prefilling and decoding, so nothing can be routed")
    return found


def _prefill_columns(cells: Sequence[Cell]) -> list[list[float]]:
    """Constant, tokens and tokens² of every cell; of two lengths without the constant, of one without tokens², too."""
    known = len({c.length for c in cells})
    return [[float(known > 2), c.batch * c.length, c.batch * float(c.length) ** 2 * (known > 1)] for c in cells]


def _step_columns(cells: Sequence[Cell]) -> list[list[float]]:
    widths, lengths = (len({getattr(c, name) for c in cells}) for name in ("batch", "length"))
    each = widths > 1 and lengths > 1
    return [[1.0, c.batch * float(each), c.batch * float(c.length) * (widths * lengths > 1)] for c in cells]


def _fit(cells: Sequence[Cell], columns: list[list[float]]) -> tuple[tuple[float, float, float], float]:
    """Coefficients, and the largest relative error."""
    from scipy.optimize import nnls

    seconds = np.array([c.seconds for c in cells])
    parts = np.array(columns) / seconds[:, None]
    scale = np.where(parts.any(0), np.abs(parts).max(0), 1.0)
    found, _ = nnls(parts / scale, np.ones(len(cells)))
    constant, linear, last = (float(x) for x in found / scale)
    return (constant, linear, last), float(np.abs(parts @ (found / scale) - 1).max())


def _shares(run: Run) -> dict[str, float]:
    timed = [r for r in run.records if isinstance(r, Timing) and r.status == "ok" and r.nbytes and r.phase == "decode"]
    longest: dict[str, float] = {}
    for t in sorted(timed, key=lambda t: t.length):
        base = [b.nbytes / b.width for b in timed if b.method == run.baseline and b.length == t.length]
        if base:
            longest[t.method] = t.nbytes / t.width / base[0]
    return longest


def law(laws: Mapping[str, Law], method: str) -> Law:
    """That of a method. Raises UsageError with the nearest known name."""
    if method not in laws:
        raise unknown("method that was timed", method, laws)
    return laws[method]


STATED = {
    law.method: law
    for law in (
        Law("fp16", (0.0162, 1.63e-4, 1.40e-8), (0.0332, 1.91e-5, 8.68e-7)),
        Law("kivi-4", (0.0173, 1.64e-4, 1.28e-8), (0.0330, 0.0, 8.34e-7), share=0.31),
        Law("gear-4", (0.0163, 1.64e-4, 1.44e-8), (0.0331, 0.0, 8.88e-7), share=0.35),
        Law("h2o-512", (0.0392, 1.81e-4, 1.28e-8), (0.0324, 4.45e-4, 3.61e-8), budget=512),
        Law("streaming-llm-512", (0.0167, 1.65e-4, 1.35e-8), (0.0326, 2.81e-4, 9.75e-8), budget=512),
    )
}
"""LLaMA-2-7B on an RTX A6000: `fitted` to the times of the paper's artifact (``a6000.csv``), which has batches up to 16
and lengths up to 4,000, within 12 % at worst. Memory is stated: 4 bits with a float16 scale and zero for 32 values are
5 of 16, GEAR's outliers and low rank some more, and a budget is one."""
