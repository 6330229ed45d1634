"""What a throughput predictor is worth: its errors on unseen cells, beside those of predictors that know less."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from kvsuite.analysis.kernel_times import Grid
from kvsuite.analysis.predictors import Worth, worth
from kvsuite.predict.cells import Cell, Stage, merged, rate
from kvsuite.predict.throughput import Answer, Predictor, places

DRAWS = 2000


@dataclass(frozen=True)
class Guess:
    """A cell that was left out, what was predicted for it, and what the nulls say, tokens per second."""

    cell: Cell
    answer: Answer
    blind: float
    """The uncompressed cache's figure there, whatever the method."""
    nearest: float
    """The method's own figure at the nearest cell that was not left out, in octaves of batch and length."""
    mean: float
    """The mean of the method's figures that were not left out."""


def guesses(train: Sequence[Cell], test: Sequence[Cell], extrapolate: bool = False) -> tuple[list[Guess], list[str]]:
    """Predictions of ``test``, and why some of its cells have none. Of a model without uncompressed cells in ``train``
    those of ``test`` are given, and are not predicted."""
    known = {(c.setting, c.model, c.stage) for c in train if c.plain}
    given = [c for c in test if c.plain and (c.setting, c.model, c.stage) not in known]
    predictor, found, refused = Predictor([*train, *given]), list[Guess](), dict[str, None]()
    asked = merged(c for c in test if c not in given)
    for cell, answer in predictor.answers(asked, extrapolate):
        if isinstance(answer, str):
            refused[answer] = None
            continue
        same = [c for c in predictor.cells if (c.method, c.stage) == (cell.method, cell.stage)]
        mean = statistics.mean(c.rate for c in same)
        found.append(Guess(cell, answer, _blind(predictor.cells, cell), _nearest(same, cell).rate, mean))
    return found, list(refused)


def left_out(cells: Sequence[Cell], by: str, extrapolate: bool = False) -> tuple[list[Guess], list[str]]:
    """Each batch, length or model (``by``) left out in turn and predicted from the others; of a model its uncompressed
    cells are given."""
    found, refused = list[Guess](), dict[str, None]()
    for value in sorted({getattr(c, by) for c in cells}):
        out = [c for c in cells if getattr(c, by) == value]
        rest = [c for c in cells if getattr(c, by) != value]
        if rest:
            some, why = guesses(rest, out, extrapolate)
            found += some
            refused |= dict.fromkeys(why)
    return found, list(refused)


def _blind(cells: Sequence[Cell], cell: Cell) -> float:
    """Measured there, else interpolated, else the nearest."""
    plain = [c for c in cells if c.plain and (c.setting, c.model, c.stage) == (cell.setting, cell.model, cell.stage)]
    grid = Grid("uncompressed", {(c.batch, c.length): c.seconds for c in plain}, 1, 0)
    estimate = grid.at(cell.batch, cell.length)
    if estimate is None:
        return _nearest(plain, cell).rate
    return rate(cell.stage, cell.batch, cell.length, estimate.ms)


def _nearest(cells: Sequence[Cell], cell: Cell) -> Cell:
    (here,) = places([(cell.batch, cell.length)])
    away = np.abs(places([(c.batch, c.length) for c in cells]) - here).sum(axis=1)
    return cells[int(np.argmin(away))]


@dataclass(frozen=True)
class Score:
    """A method in one stage. Errors are of tokens per second, parts of the true figure, mean (``mape``) or median."""

    method: str
    stage: Stage
    left_out: str
    """What was: a batch, a length, a model, or the files to be tested on."""
    n: int
    mape: float
    null_mape: float
    """Of the uncompressed figure, whatever the method."""
    nearest_mape: float
    mean_mape: float
    median: float
    coverage: float
    """The share of cells within the 90 % interval."""
    worth: Worth
    """Beside that null."""
    basis: str

    @property
    def beats_null(self) -> bool:
        """Whether it surely errs less than the uncompressed figure does."""
        return self.worth.better


def scores(found: Iterable[Guess], what: str, group: Callable[[Guess], tuple[str, Stage]] | None = None) -> list[Score]:
    """By method and stage, or by what ``group`` says."""
    groups: dict[tuple[str, Stage], list[Guess]] = {}
    for guess in found:
        groups.setdefault(group(guess) if group else (guess.cell.method, guess.cell.stage), []).append(guess)
    return [_score(method, stage, what, some) for (method, stage), some in groups.items()]


def _score(method: str, stage: Stage, what: str, some: Sequence[Guess]) -> Score:
    true, mine, blind, nearest, mean = np.array(
        [(g.cell.rate, g.answer.rate, g.blind, g.nearest, g.mean) for g in some]
    ).T
    errors = np.abs(mine / true - 1)
    cells = [f"{g.cell.model} {g.cell.batch} {g.cell.length}" for g in some]
    inside = [g.answer.low <= g.cell.seconds <= g.answer.high for g in some]
    off = [float(np.abs(null / true - 1).mean()) for null in (blind, nearest, mean)]
    return Score(
        method, stage, what, len(some), float(errors.mean()), off[0], off[1], off[2], float(np.median(errors)),
        float(np.mean(inside)), worth(mine, blind, true, cells, DRAWS),
        "; ".join(dict.fromkeys(g.answer.basis for g in some if g.answer.basis)),
    )  # fmt: skip
