"""How long requests take end to end: the lengths of a run's answers, joined one by one with its measured speed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvsuite.analysis.length import Beside, Pairs, cost_interval
from kvsuite.analysis.resample import Floats
from kvsuite.analysis.speed import SpeedRow, speed_rows
from kvsuite.analysis.stats import Interval
from kvsuite.records import Answer, Run, Timing, is_control, is_reference

QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True)
class Pace:
    """One method's speed at one width, by length of context; between measured lengths it is interpolated, beyond them
    that of the nearest."""

    prefill: Mapping[int, float]
    """Tokens → seconds of prefilling one, compression included."""
    step: Mapping[int, float]
    """Tokens in the cache → seconds of a step."""

    def seconds(self, prompt: int, tokens: int) -> float:
        """Of a request: the prefill gives the first token, every other takes a step."""
        steps = prompt + np.arange(1.0, max(tokens, 1))
        return prompt * float(_at(self.prefill, np.array([float(prompt)]))[0]) + float(_at(self.step, steps).sum())


def _at(known: Mapping[int, float], lengths: Floats) -> Floats:
    places = sorted(known)
    return np.asarray(np.interp(lengths, places, [known[x] for x in places]))


def paces(run: Run) -> tuple[int, dict[str, Pace]]:
    """The smallest width that was timed, and every method's speed there; empty without both prefill and decode. The
    baseline's is the median of all its rounds, a method's a multiple of it, since both ran in turn."""
    rows = speed_rows([r for r in run.records if isinstance(r, Timing) and r.method != "transformers"])
    by = {phase: [r for r in rows if r.phase == phase and r.speedup is not None] for phase in ("prefill", "decode")}
    width = min((r.width for r in by["decode"]), default=0)
    by["decode"] = [r for r in by["decode"] if r.width == width]
    found = {}
    for method in dict.fromkeys([run.baseline, *(r.method for r in by["decode"])]):
        times = [_times(rows, method, run.baseline) for rows in by.values()]
        if all(times):
            found[method] = Pace(times[0], {length: width * each for length, each in times[1].items()})
    return width, found


def _times(rows: Sequence[SpeedRow], method: str, base: str) -> dict[int, float]:
    """Tokens of context → seconds a token, of one phase at one width."""
    rates: dict[int, list[float]] = {}
    for row in rows:
        if row.baseline_rate:
            rates.setdefault(row.length, []).append(row.baseline_rate)
    faster = {row.length: row.speedup.mean for row in rows if row.method == method and row.speedup is not None}
    known = rates if method == base else {length: rates[length] for length in faster if length in rates}
    return {length: 1 / statistics.median(some) / faster.get(length, 1.0) for length, some in known.items()}


@dataclass(frozen=True)
class Requests:
    """One arm's requests beside the baseline's to the same prompts."""

    mean: Interval
    """Σ seconds / Σ seconds, with the interval of the answers' lengths."""
    quantiles: dict[str, float]
    """Each as a multiple of the baseline's."""
    slower: int
    """Requests that take longer than the baseline's of noise that no arm shares, of ``pairs``."""
    pairs: int
    seconds: Floats
    """(n,), of its own requests."""


def requests(arm: Beside, paces: Mapping[str, Pace], base: str) -> Requests | None:
    """None where the arm's speed was not measured. A control, or the cache at another temperature, is as fast as the
    baseline."""
    own = base if arm.method not in paces and (is_control(arm.method) or is_reference(arm.method)) else arm.method
    if not arm.pairs or own not in paces or base not in paces:
        return None
    mine, theirs = _joined(arm.pairs, paces[own], paces[base])
    apart = _joined(arm.apart, paces[own], paces[base])
    caps = np.array([paces[own].seconds(a.prompt_tokens, a.cap) for a, _ in arm.pairs])
    each = theirs.sum() / sum(b.length for _, b in arm.pairs)  # an interval of costs knows a token's weight
    prompts = [a.cluster or a.sample for a, _ in arm.pairs]
    return Requests(
        cost_interval(mine / each, theirs / each, np.maximum(caps, theirs) / each, prompts),
        {name: float(np.quantile(mine, q) / np.quantile(theirs, q)) for name, q in QUANTILES.items()},
        int((apart[0] > apart[1]).sum()),
        len(arm.apart),
        mine,
    )


def of_arms(arms: Sequence[Beside], paces: Mapping[str, Pace], base: str) -> dict[str, Requests]:
    """By name, those of all arms whose speed is known, but of the baseline beside itself."""
    found = {arm.name: requests(arm, paces, base) for arm in arms if arm.method != base or arm.control}
    return {name: known for name, known in found.items() if known is not None}


def _joined(pairs: Pairs, mine: Pace, base: Pace) -> tuple[Floats, Floats]:
    """(n,) each: seconds of an arm's requests, and of the baseline's."""
    return np.array([_of(a, mine) for a, _ in pairs]), np.array([_of(b, base) for _, b in pairs])


def _of(answer: Answer, pace: Pace) -> float:
    return pace.seconds(answer.prompt_tokens, answer.length)
