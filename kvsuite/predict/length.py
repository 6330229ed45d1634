"""How long an answer will be: from the prompt and the method to quantiles of its length, and of the change that the
method makes to it.

Lengths are of tokens, at most the run's cap. A quantile of min(length, cap) is min(the length's quantile, cap), so that
quantile regression on capped lengths is right below the cap, and a quantile at the cap says no more than *at least*.
Where a prompt was answered several times the median of its lengths is learned. The change of a method is the logarithm
of its length over the baseline's to the same prompt, where neither was capped.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvsuite.analysis.resample import Floats, Mask
from kvsuite.errors import UsageError, unknown
from kvsuite.predict import files, learner
from kvsuite.predict.prompts import COUNTED, Embed, features
from kvsuite.predict.types import Classifier
from kvsuite.records import Answer, Run, is_reference
from kvsuite.typed import Shape

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the quantiles that are predicted."""
MEANINGS = 8
"""Principal components of the embeddings that are used."""
PENALTIES = (0.01, 0.03, 0.1)
"""Of the coefficients' sizes: tried on training prompts alone."""
INNER = 3
"""Folds of the training prompts on which they are tried."""
FAR = 700.0
"""A logarithm whose number Python cannot hold."""
KIND = "length predictor 1"
_QUANTILES = {"methods": list[str]}
SHAPE: Shape = {
    "model": str, "fingerprint": str, "cap": int, "length": _QUANTILES, "change": (_QUANTILES,),
    "types": ({"types": list[str]},),
}  # fmt: skip
"""Of its file, but for the arrays."""


@dataclass(frozen=True)
class Entry:
    """What one arm answered to one prompt."""

    sample: str
    group: str
    """The document it was made of, else the sample: what is left out as a whole."""
    type: str
    method: str
    prompt: str
    tokens: int
    """Of the prompt."""
    length: float
    """Median over repeats of min(tokens of the answer, cap)."""
    capped: bool
    base: float | None
    """The baseline's length, to the same prompt; None where it is not there."""
    base_capped: bool

    @property
    def change(self) -> float | None:
        """log(length / the baseline's); None where one was capped or empty."""
        if self.base is None or self.capped or self.base_capped or not min(self.length, self.base) > 0:
            return None
        return float(np.log(self.length / self.base))


@dataclass(frozen=True)
class Lengths:
    """All that a run says of the lengths of answers to chats."""

    model: str
    fingerprint: str
    cap: int
    baseline: str
    entries: list[Entry]
    twice: list[tuple[Entry, float, bool]]
    """Entries of the baseline, by its first answer, with the length of another one to the same prompt and whether that
    was capped: what nobody can predict."""

    @classmethod
    def of(cls, run: Run) -> Lengths:
        """Raises UsageError where a run has no answers to chats with their prompts, or several caps."""
        there = [
            r for r in run.records
            if isinstance(r, Answer) and r.kind in ("answer", "served") and r.status == "ok"
            and r.evaluation == "length" and r.prompt and not is_reference(r.method)
        ]  # fmt: skip
        caps = sorted({a.cap for a in there})
        if len(caps) != 1:
            many = f"answers with caps {', '.join(map(str, caps))}, which cannot be compared"
            raise UsageError(f"{run.folder} holds {many if caps else 'no answers to chats with their prompts'}")
        arms: dict[tuple[str, str, str], list[Answer]] = {}
        for a in there:
            arms.setdefault((a.method, a.task, a.sample), []).append(a)
        lengths = {key: (_median(some), _capped(some)) for key, some in arms.items()}
        entries = []
        for (method, task, sample), some in arms.items():
            base, base_capped = lengths.get((run.baseline, task, sample), (None, False))
            entries.append(_entry(some[0], *lengths[method, task, sample], base, base_capped))
        twice = [
            (_entry(a, a.length, _capped([a]), None, False), float(b.length), _capped([b]))
            for key, some in arms.items() if key[0] == run.baseline and len(some) > 1
            for a, b in [sorted(some, key=lambda a: a.repeat)[:2]]
        ]  # fmt: skip
        facts = run.facts["model"]
        return cls(str(facts["name"]), str(facts["fingerprint"]), caps[0], run.baseline, entries, twice)


def _median(some: Sequence[Answer]) -> float:
    return float(statistics.median(a.length for a in some))


def _capped(some: Sequence[Answer]) -> bool:
    return sum(a.finish == "length" for a in some) * 2 > len(some)


def _entry(a: Answer, length: float, capped: bool, base: float | None, base_capped: bool) -> Entry:
    return Entry(
        a.sample, a.cluster or a.sample, a.type, a.method, a.prompt, a.prompt_tokens, length, capped, base, base_capped
    )


@dataclass(frozen=True)
class Quantiles:
    """A linear model of quantiles of what is counted and the embeddings' principal components, by method a start."""

    methods: tuple[str, ...]
    middle: Floats
    """(features,), subtracted; then ``turned``, (features, k), makes standardized inputs of them."""
    turned: Floats
    weights: Floats
    """(levels, k), the same for all methods."""
    start: Floats
    """(methods, levels)"""

    @classmethod
    def learned(cls, x: Floats, methods: Sequence[str], y: Floats, groups: Sequence[str] | None = None) -> Quantiles:
        """From (n, features) prompts, their methods and figures. The penalty is chosen on folds of ``groups``; without
        them it is the least. Methods are not penalized: without weights this is each method's own quantiles."""
        names = tuple(dict.fromkeys(methods))
        of = np.array([names.index(method) for method in methods])
        middle, turned = _turn(x)
        inputs = (x - middle) @ turned
        centered = y - np.array([np.median(y[of == at]) for at in range(len(names))])[of]
        penalty = PENALTIES[0] if groups is None else _penalty(inputs, centered, groups)
        weights = np.array([_fit(inputs, centered, level, penalty).coef_ for level in LEVELS])
        left = y[:, None] - inputs @ weights.T
        start = [[np.quantile(left[of == m, at], level) for at, level in enumerate(LEVELS)] for m in range(len(names))]
        return cls(names, middle, turned, weights, np.array(start))

    def __call__(self, x: Floats, methods: Sequence[str]) -> Floats:
        """(n, levels), rising. Raises UsageError for a method that was not learned, and for features that were not."""
        if strange := set(methods) - set(self.methods):
            raise unknown("method of this predictor", min(strange), self.methods)
        if x.shape[1] != len(self.middle):
            raise UsageError(f"this predictor knows {len(self.middle)} features of a prompt, not {x.shape[1]}")
        start = self.start[[self.methods.index(method) for method in methods]]
        with np.errstate(all="ignore"):
            found = np.sort((x - self.middle) @ self.turned @ self.weights.T + start, axis=1)
        if not (np.abs(found) < FAR).all():
            raise UsageError("this predictor gives no logarithm of a length")
        return found

    def as_json(self) -> dict[str, Any]:
        """Numbers and names."""
        arrays = {name: getattr(self, name).tolist() for name in ("middle", "turned", "weights", "start")}
        return {"methods": list(self.methods), **arrays}

    @classmethod
    def of(cls, said: dict[str, Any]) -> Quantiles:
        """What `as_json` gave. Raises UsageError where its arrays do not fit."""
        sizes = {"m": len(said["methods"]), "l": len(LEVELS)}
        return cls(
            tuple(said["methods"]), *files.arrays(said, sizes, middle="f", turned="fk", weights="lk", start="ml")
        )


def _turn(x: Floats) -> tuple[Floats, Floats]:
    """What centers features, and what makes inputs of them: counts over their spread, and as many principal components
    of the embeddings as there are prompts to tell them by."""
    middle, k = x.mean(axis=0), len(COUNTED)
    spread = x[:, :k].std(axis=0)
    counts = np.diag(np.divide(1, spread, out=np.zeros(k), where=spread > 1e-9))
    _, sizes, axes = np.linalg.svd(x[:, k:] - middle[k:], full_matrices=False)
    few = min(MEANINGS, int((sizes > 1e-6).sum()))
    scale = np.sqrt(len(x)) / sizes[:few]
    turned = np.zeros((x.shape[1], k + few))
    turned[:k, :k], turned[k:, k:] = counts, axes[:few].T * scale
    return middle, turned


def _fit(inputs: Floats, y: Floats, level: float, penalty: float) -> Any:
    regressor = learner("linear_model").QuantileRegressor(quantile=level, alpha=penalty, solver="highs")
    return regressor.fit(inputs, y)


def _penalty(inputs: Floats, y: Floats, groups: Sequence[str]) -> float:
    """The one with the least pinball loss of the median on groups left out."""
    folds = min(INNER, len(set(groups)))
    if folds < 2:
        return PENALTIES[-1]
    split = learner("model_selection").GroupKFold(folds)
    losses = [
        np.mean([np.abs(y[out] - _fit(inputs[known], y[known], 0.5, p).predict(inputs[out])).mean()
                 for known, out in split.split(inputs, y, groups)])
        for p in PENALTIES
    ]  # fmt: skip
    return PENALTIES[int(np.argmin(losses))]


@dataclass(frozen=True)
class Predictor:
    """Learned from one run; of that run's model alone."""

    model: str
    fingerprint: str
    cap: int
    length: Quantiles
    """Of log(1 + length)."""
    change: Quantiles | None
    """Of log(length / the baseline's); None where no two answers were short of the cap."""
    types: Classifier | None = None
    """Tells the type of a prompt's task; None where all were of one type."""

    @classmethod
    def learned(cls, lengths: Lengths, x: Floats, entries: Sequence[Entry]) -> Predictor:
        """From entries and their prompts' features (n, features)."""
        changed = [at for at, e in enumerate(entries) if e.change is not None and e.method != lengths.baseline]
        return cls(
            lengths.model, lengths.fingerprint, lengths.cap,
            _learned(x, entries, np.log1p([e.length for e in entries])),
            _learned(x[changed], [entries[at] for at in changed], np.array([entries[at].change for at in changed]))
            if changed else None,
        )  # fmt: skip

    def lengths(self, x: Floats, methods: Sequence[str]) -> Floats:
        """(n, levels) tokens, at most the cap."""
        return np.clip(np.expm1(self.length(x, methods)), 0, self.cap)

    def changes(self, x: Floats, methods: Sequence[str]) -> Floats:
        """(n, levels) ratios to the baseline's length. Raises UsageError where none could be learned."""
        if self.change is None:
            raise UsageError("this predictor knows no change: no answer and its baseline's were both short of the cap")
        return np.exp(self.change(x, methods))

    def ask(self, prompt: str, tokens: int, embed: Embed) -> list[dict[str, Any]]:
        """For a prompt of so many tokens, by method: quantiles of the length and of its ratio to the baseline's, by
        level, and the type of task (None where that was not learned)."""
        x = features([prompt], [tokens], embed)
        kind = None if self.types is None else self.types(x)[0]
        found = []
        for method in self.length.methods:
            known = self.change is not None and method in self.change.methods
            change = self.changes(x, [method])[0] if known else None
            found.append(
                {
                    "method": method,
                    "type": kind,
                    "length": _by_level(self.lengths(x, [method])[0]),
                    "change": None if change is None else _by_level(change),
                }
            )
        return found

    def save(self, file: Path) -> None:
        """As JSON."""
        learned = {
            "model": self.model, "fingerprint": self.fingerprint, "cap": self.cap, "levels": LEVELS,
            "length": self.length.as_json(), "change": self.change.as_json() if self.change else None,
            "types": self.types.as_json() if self.types else None,
        }  # fmt: skip
        files.write(file, KIND, learned)

    @classmethod
    def load(cls, file: Path) -> Predictor:
        """What `save` wrote. Raises UsageError for another file, and for one of another version."""
        what = files.read(file, KIND, SHAPE)
        change = Quantiles.of(what["change"]) if what["change"] else None
        types = Classifier.of(what["types"]) if what["types"] else None
        return cls(what["model"], what["fingerprint"], what["cap"], Quantiles.of(what["length"]), change, types)

    def check(self, lengths: Lengths) -> None:
        """Raises UsageError where a run is of another model or cap."""
        mine, theirs = (self.model, self.fingerprint), (lengths.model, lengths.fingerprint)
        if mine != theirs:
            said = " and ".join(f"{name} ({print_[:8]})" for name, print_ in (mine, theirs))
            raise UsageError(f"this predictor and the run are of different models: {said}")
        if self.cap != lengths.cap:
            raise UsageError(f"this predictor knows lengths up to {self.cap} tokens, the run's cap is {lengths.cap}")


def _by_level(quantiles: Floats) -> dict[str, float]:
    return {f"{level:g}": float(q) for level, q in zip(LEVELS, quantiles, strict=True)}


def _learned(x: Floats, entries: Sequence[Entry], y: Floats) -> Quantiles:
    return Quantiles.learned(x, [e.method for e in entries], y, [e.group for e in entries])


def pinball(true: Floats, quantiles: Floats) -> Floats:
    """(n,): the pinball loss of (n, levels) predicted quantiles, mean over `LEVELS`; of the median alone it is half
    the absolute error."""
    off, levels = true[:, None] - quantiles, np.array(LEVELS)
    return np.asarray(np.maximum(levels * off, (levels - 1) * off).mean(axis=1))


def concordant(predicted: Floats, true: Floats, capped: Mask) -> tuple[Floats, Floats]:
    """(n, n) twice: Harrell's count of pairs (i, j) whose order is known, since i is the shorter and was not capped,
    and of these what was predicted in that order; half where both predictions are equal. Their sums' ratio is Harrell's
    concordance (1982, JAMA 247)."""
    known = (true[:, None] < true[None, :]) & ~capped[:, None]
    right = (predicted[:, None] < predicted[None, :]) + 0.5 * (predicted[:, None] == predicted[None, :])
    return known * right, known.astype(float)
