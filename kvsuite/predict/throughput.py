"""How fast a method is at a batch and length that nobody timed: physics, what is left learned, and an interval.

The time of the uncompressed cache is a sum of terms, each a cost over 0 by the batch b and the length n: of a prefill
the launch, the products (b·n) and attention (b·n²); of a decoding step the launch with the weights, the operations of
each sequence (b), and the bytes of K and V that are read (b·held). These costs are a model's own and are fitted to its
uncompressed cells. A method has the same terms, with the bytes that its name says, and its own costs as factors of the
model's uncompressed ones. The factors are the method's, whatever the model, as long as the machine and what computes
stay the same; so a model is predicted from its uncompressed cells alone. What the terms leave of log seconds is learned
by a Gaussian process over log b and log n.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from kvsuite.analysis.kv_formats import stored
from kvsuite.analysis.resample import Floats
from kvsuite.errors import UsageError, unknown
from kvsuite.methods.grammar import parse
from kvsuite.predict import files, learner
from kvsuite.predict.cells import Cell, Stage, checked, merged, rate
from kvsuite.shapes import SHAPES
from kvsuite.typed import amiss

ARTIFACT = {
    "KIVI-4": "kivi:bits=4",
    "GEAR-4": "int4",
    "H2O-16": "h2o:budget=512",
    "StreamingLLM-16": "streaming-llm:budget=512",
}
"""What the methods of the artifact's CSV hold, as methods of ours."""
LEVEL = 0.9
"""Of an answer's interval."""
LEAST = 4
"""Cells that a method, or an uncompressed model, needs for its three terms."""
NEW = ("batch", "length", "model")
"""What may be new of a cell that is asked for."""
ENOUGH = 10
"""Errors from which the reach of an interval is read."""
FAR = 100.0
"""Log seconds at which an interval ends, at the latest: more than a number holds are no figure."""
ROUGH = (1.5, 0.05)
"""The Gaussian process before it has learned: over how many octaves what is left stays alike, and the noise of log
seconds."""


@cache
def held(method: str, length: int) -> float:
    """How many uncompressed tokens take the bytes that ``method`` holds of a context of ``length``; ``length`` itself
    where the name is not one of ours or the artifact's."""
    try:
        known = parse(ARTIFACT.get(method, method))
        if known.codec.name in ("full", "jitter"):
            return float(known.tokens(length))
        shape, total = SHAPES["llama-2-7b"], 0.0
        for layer in range(shape.layers):
            specs = known.codec.at(layer, shape.layers).specs(shape)  # type: ignore[arg-type]  # codecs read head_dim
            total += stored(specs, known.tokens(length), shape.head_dim) / (4 * shape.head_dim)
        return total / shape.layers
    except UsageError:
        return float(length)


def terms(stage: Stage, method: str, cells: Sequence[tuple[int, int]]) -> Floats:
    """(n, 3): what each cost is multiplied with, at (batch, length)."""
    if stage == "prefill":
        return np.array([(1.0, b * n, b * n * n) for b, n in cells])
    return np.array([(1.0, b, b * held(method, n)) for b, n in cells])


def fitted(columns: Floats, seconds: Floats) -> Floats:
    """(3,) costs of at least 0 with the least squares of relative errors."""
    from scipy.optimize import nnls

    unit = columns.max(axis=0)
    unit[unit == 0] = 1
    found: Floats = nnls(columns / unit / seconds[:, None], np.ones(len(seconds)))[0] / unit
    return found


def units(stage: Stage, costs: Floats) -> Floats:
    """(3,): a model's uncompressed costs that a method's are factors of. Of a decoding step's sequences they are hardly
    known, where reading their bytes takes longer, so there it is the launch: both grow with the layers."""
    return costs if stage == "prefill" else np.array([costs[0], costs[0], costs[2]])


def places(cells: Sequence[tuple[int, int]]) -> Floats:
    """(n, 2): octaves of batch and length."""
    found: Floats = np.log2(np.array(cells, dtype=float))
    return found


@dataclass(frozen=True)
class Rest:
    """What is left of log seconds, learned over octaves of batch and length."""

    at: Floats
    left: Floats
    scale: tuple[float, float, float, float]
    """The spread of what is learned, over how many octaves of batch and of length it stays alike, the noise."""

    @classmethod
    def learned(cls, at: Floats, left: Floats, scale: Sequence[float] | None = None) -> Rest:
        """``scale``: given, or found by maximum likelihood."""
        if scale is None:
            gp = learner("gaussian_process").GaussianProcessRegressor(cls._kernel((0.05, ROUGH[0], ROUGH[0], ROUGH[1])))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a bound that is reached: nothing is left to be learned
                k = gp.fit(at, left).kernel_
            lengths = np.broadcast_to(k.k1.k2.length_scale, 2)
            scale = (math.sqrt(k.k1.k1.constant_value), *map(float, lengths), math.sqrt(k.k2.noise_level))
        return cls(at, left, tuple(scale))  # type: ignore[arg-type]

    @staticmethod
    def _kernel(scale: Sequence[float]) -> Any:
        spread, batch, length, noise = scale
        k = learner("gaussian_process").kernels
        similar = k.RBF([batch, length], (0.7, 8.0))
        return k.ConstantKernel(spread**2, (1e-5, 0.25)) * similar + k.WhiteKernel(noise**2, (1e-5, 0.1))

    @cached_property
    def _process(self) -> Any:
        gp = learner("gaussian_process").GaussianProcessRegressor(self._kernel(self.scale), optimizer=None)
        return gp.fit(self.at, self.left)

    def __call__(self, at: Floats) -> tuple[Floats, Floats]:
        """What is left at (n, 2) places, (n,), and its standard deviation, noise included."""
        mean, sd = self._process.predict(at, return_std=True)
        return mean, sd


@dataclass(frozen=True)
class Answer:
    """A time that was not measured."""

    stage: Stage
    batch: int
    length: int
    seconds: float
    low: float
    high: float
    """The 90 % interval of one measurement."""
    basis: str
    """Empty, or what makes it less than an interpolation."""

    @property
    def rate(self) -> float:
        """Tokens per second, all sequences."""
        return rate(self.stage, self.batch, self.length, self.seconds)


KIND = "throughput predictor 2"
"""Of its file."""
Key = tuple[str, str, str, Stage]
"""Setting, model, method, stage."""


class Predictor:
    """Learned from timed cells. ``scales`` and ``reach`` are given where it was learned before."""

    def __init__(
        self,
        cells: Iterable[Cell],
        scales: dict[str, Sequence[float]] | None = None,
        reach: dict[str, dict[str, float]] | None = None,
    ) -> None:
        self.cells = merged(cells)
        self._scales = dict(scales or {})
        self._groups: dict[Key, list[Cell]] = {}
        for c in self.cells:
            self._groups.setdefault((c.setting, c.model, c.method, c.stage), []).append(c)
        self._base = {(k[0], k[1], k[3]): k[2] for k, group in self._groups.items() if group[0].plain}
        self._costs: dict[tuple[str, str, Stage], tuple[Floats, Rest]] = {}
        self._factors: dict[tuple[str, str, Stage], tuple[Floats, Rest]] = {}
        self.reach = reach or {}

    def base(self, setting: str, model: str, stage: Stage) -> tuple[Floats, Rest]:
        """The costs of a model's uncompressed cache, and what they leave. Raises UsageError where it was not timed."""
        key = setting, model, stage
        if key not in self._costs:
            method = self._base.get(key)
            group = [] if method is None else self._groups[setting, model, method, stage]
            if len(group) < LEAST:
                raise UsageError(
                    f"{stage} of {model} needs {LEAST} timed cells of its uncompressed cache, not {len(group)}"
                )
            columns, seconds = terms(stage, str(method), _at(group)), np.array([c.seconds for c in group])
            costs = fitted(columns, seconds)
            self._costs[key] = costs, self._rest("|".join(key), group, np.log(seconds / (columns @ costs)))
        return self._costs[key]

    def factors(self, setting: str, method: str, stage: Stage) -> tuple[Floats, Rest]:
        """A method's costs as factors of any model's `units`, and what they leave. Raises UsageError
        where too little was timed."""
        key = setting, method, stage
        if key not in self._factors:
            groups = [
                g for k, g in self._groups.items() if (k[0], k[2], k[3]) == key and (k[0], k[1], stage) in self._base
            ]
            cells = [c for group in groups for c in group]
            if len(cells) < LEAST:
                raise UsageError(
                    f"{stage} with {method} needs {LEAST} timed cells beside uncompressed ones, not {len(cells)}"
                )
            known = [(group, *self.base(setting, group[0].model, stage)) for group in groups]
            columns = np.concatenate(
                [units(stage, costs) * terms(stage, method, _at(group)) for group, costs, _ in known]
            )
            beside = np.concatenate([rest(places(_at(group)))[0] for group, _, rest in known])
            seconds = np.array([c.seconds for c in cells]) / np.exp(beside)
            found = fitted(columns, seconds)
            self._factors[key] = found, self._rest("|".join(key), cells, np.log(seconds / (columns @ found)))
        return self._factors[key]

    def _rest(self, name: str, cells: Sequence[Cell], left: Floats) -> Rest:
        rest = Rest.learned(places(_at(cells)), left, self._scales.get(name))
        self._scales[name] = rest.scale
        return rest

    def ask(
        self,
        setting: str,
        model: str,
        method: str,
        stage: Stage,
        asked: Sequence[tuple[int, int]],
        extrapolate: bool = False,
    ) -> list[Answer]:
        """Answers at (batch, length). Raises UsageError where nothing was measured that they could rest on; with
        ``extrapolate`` also outside the measured range and, for a method, on another machine."""
        found = self._ask(setting, model, method, stage, asked, extrapolate)
        if refused := [answer for answer in found if isinstance(answer, str)]:
            raise UsageError(refused[0])
        return [answer for answer in found if isinstance(answer, Answer)]

    def answers(self, cells: Iterable[Cell], extrapolate: bool = False) -> Iterator[tuple[Cell, Answer | str]]:
        """For each cell the answer at its place, or why there is none."""
        groups: dict[Key, list[Cell]] = {}
        for c in cells:
            groups.setdefault((c.setting, c.model, c.method, c.stage), []).append(c)
        for key, group in groups.items():
            try:
                found: Sequence[Answer | str] = self._ask(*key, _at(group), extrapolate)
            except UsageError as error:
                found = [str(error)] * len(group)
            yield from zip(group, found, strict=True)

    def _ask(
        self, setting: str, model: str, method: str, stage: Stage, asked: Sequence[tuple[int, int]], extrapolate: bool
    ) -> list[Answer | str]:
        """Answers, or why a place has none. Raises UsageError where none has one."""
        costs, rest = self.base(setting, model, stage)
        at, columns = places(asked), terms(stage, method, asked)
        logs, sd = rest(at)
        here, basis = self._groups.get((setting, model, method, stage), []), ""
        own = here
        if self._base[setting, model, stage] == method:
            logs = logs + np.log(columns @ costs)
        else:
            source = self._setting(setting, method, stage, extrapolate)
            factors, left = self.factors(source, method, stage)
            more, sd = left(at)
            logs = logs + more + np.log(columns @ (units(stage, costs) * factors))
            same = [g for k, g in self._groups.items() if (k[0], k[2], k[3]) == (source, method, stage)]
            if source != setting:
                basis = f"extrapolated from {source}"
            elif not here:
                others = ", ".join(g[0].model for g in same)
                basis = f"carried over from {others}; the interval does not include what differs between models"
            own = [c for g in same for c in g]
        batches, lengths = {c.batch for c in here}, {c.length for c in here}
        answers: list[Answer | str] = []
        for (b, n), log, one in zip(asked, logs, sd, strict=True):
            spread = min(FAR, one * max(self._reach(stage, which) for which in _new(batches, lengths, b, n)))
            outside = _outside(own, b, n)
            if outside and not extrapolate:
                answers.append(f"{stage} with {method}: {outside}; --extrapolate answers all the same")
                continue
            said = "; ".join(x for x in (basis, f"extrapolated: {outside}" if outside else "") if x)
            answers.append(Answer(stage, b, n, math.exp(log), math.exp(log - spread), math.exp(log + spread), said))
        return answers

    def _setting(self, setting: str, method: str, stage: Stage, extrapolate: bool) -> str:
        """Where a method's factors are from."""
        there = sorted({k[0] for k in self._groups if (k[2], k[3]) == (method, stage)})
        if setting in there:
            return setting
        if not there:
            raise unknown(f"method timed in {stage}", method, {k[2] for k in self._groups if k[3] == stage})
        if not extrapolate:
            raise UsageError(
                f"{stage} with {method} was timed on {' and '.join(there)}, not on {setting}; --extrapolate takes it "
                "from there"
            )
        return there[0]

    def _reach(self, stage: Stage, which: str) -> float:
        """How many standard deviations hold 90 % of the errors where a batch, a length or a model (``which``) is new:
        of those left out one by one. Where fewer than `ENOUGH` errors of the kind are known, of all kinds."""
        if stage not in self.reach:
            found = self.reach[stage] = dict.fromkeys(NEW, 1.645)  # the normal distribution's, meanwhile
            asked = [c for c in self.cells if c.stage == stage]
            list(self.answers(asked))  # what is learned of all cells is not learned anew of most of them
            off = {one: self._errors(asked, stage, one) for one in NEW}
            for one, own in off.items():
                known = own if len(own) >= ENOUGH else [error for errors in off.values() for error in errors]
                if len(known) >= ENOUGH:
                    rank = min(len(known), math.ceil(LEVEL * (len(known) + 1)))
                    found[one] = sorted(known)[rank - 1]
        return self.reach[stage][which]

    def _errors(self, asked: Sequence[Cell], stage: Stage, which: str) -> list[float]:
        """Of each batch, length or model left out in turn, in standard deviations."""
        off = []
        for value in sorted({getattr(c, which) for c in asked}):
            out = [c for c in asked if getattr(c, which) == value and not (which == "model" and c.plain)]
            rest = Predictor([c for c in asked if c not in out], self._scales, {stage: dict.fromkeys(NEW, 1.0)})
            off += [
                abs(math.log(c.seconds / a.seconds)) / math.log(a.high / a.seconds)
                for c, a in rest.answers(out)
                if isinstance(a, Answer)
            ]
        return off

    def save(self, file: Path) -> None:
        """As JSON: the cells, and what was learned beyond them."""
        for stage in {c.stage for c in self.cells}:
            self._reach(stage, NEW[0])
        cells = [asdict(c) for c in self.cells]
        files.write(file, KIND, {"cells": cells, "scales": self._scales, "reach": self.reach})

    @classmethod
    def load(cls, file: Path) -> Predictor:
        """What `save` wrote. Raises UsageError for another file, and for one of another version of kvsuite."""
        what = files.read(
            file, KIND, {"cells": list, "scales": dict[str, list[float]], "reach": dict[str, dict[str, float]]}
        )
        for at, cell in enumerate(what["cells"]):
            if wrong := amiss(cell, get_type_hints(Cell) | {"stage": str}, whole=True):
                raise UsageError(f"{file}: cell {at}: {wrong}")
        for scale in what["scales"].values():
            if len(scale) != 4 or not all(1e-3 < x < 10 for x in scale):
                raise UsageError(f"{file}: a scale is of 4 numbers from 0.001 to 10, not {scale}")
        for reach in what["reach"].values():
            if wrong := amiss(reach, dict.fromkeys(NEW, float), whole=True):
                raise UsageError(f"{file}: reach: {wrong}")
        cells = [Cell(**{name: cell[name] for name in get_type_hints(Cell)}) for cell in what["cells"]]
        return cls([checked(cell, str(file)) for cell in cells], what["scales"], what["reach"])


def _at(cells: Sequence[Cell]) -> list[tuple[int, int]]:
    return [(c.batch, c.length) for c in cells]


def _new(batches: set[int], lengths: set[int], batch: int, length: int) -> list[str]:
    """What is new of a place, of `NEW`, beside the batches and lengths that were timed of its own model; of one that
    was timed, the least: a length."""
    if not batches:
        return ["model"]
    found = [name for name, new in (("batch", batch not in batches), ("length", length not in lengths)) if new]
    return found or ["length"]


def _outside(cells: Sequence[Cell], batch: int, length: int) -> str:
    """How a place lies outside what was timed; empty where it does not."""
    for name, value in (("batch", batch), ("length", length)):
        low, high = (end(getattr(c, name) for c in cells) for end in (min, max))
        if not low <= value <= high:
            return f"{name} {value:,} lies outside what was timed, {low:,} to {high:,}"
    return ""
