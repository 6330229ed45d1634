"""Speed as ratios: of paired rounds per cell, of two load tests; how many blocks it takes, and goodput."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from kvsuite.analysis.latency import BreakEven, break_even, fit
from kvsuite.analysis.resample import DRAWS, Design, Floats
from kvsuite.analysis.stats import LEVEL, Estimate, Interval, Ratio, estimate
from kvsuite.analysis.trimmed import TRIMMED, UNTRIMMED, log_ratio_interval
from kvsuite.analysis.verdict import POWER
from kvsuite.errors import UsageError
from kvsuite.readers.base import Load
from kvsuite.records import Timing

OURS = "kvsuite.cache."
"""Where the classes live whose answers are scored; a timing of another one is transformers' own, a row beside."""
REFERENCE = ("/reference", "/unfused")
"""How the path of a method ends that PyTorch computed, as it is and as it was called."""


@dataclass(frozen=True)
class SpeedRow:
    """One cell. ``speedup`` > 1 is faster than the baseline, which ran in turn with it. Where it did not fail and has
    no speed, fewer than two rounds ran: it was not measured."""

    method: str
    phase: str
    width: int
    length: int
    failed: bool
    error: str
    rate: float | None = None
    """Tokens per second, all sequences, median round."""
    baseline_rate: float | None = None
    """Of the baseline, in the same rounds."""
    speedup: Estimate | None = None
    rounds: int = 0
    nbytes: int = 0
    nbytes_read: int = 0
    allocated: int = 0
    peak: int | None = None
    checked: float | None = None
    path: str = ""
    """Codec, and the backend: ``kivi/reference`` is PyTorch."""
    refusal: str = ""
    """Why another backend was not taken."""
    of_limit: float | None = None
    """The share of this machine's limit that it reached: seconds that its bytes and operations take at least, over
    those it took. None where the machine was not measured."""


def speed_rows(timings: Sequence[Timing]) -> list[SpeedRow]:
    """One row per timed cell, in order. Raises UsageError for a timing of our cache that was never checked."""
    rows = []
    for timing in timings:
        t = scaled(timing)
        failed = t.status == "failed"
        if not failed and t.cache.startswith(OURS) and not (t.checked is not None and t.checked <= 1):
            raise UsageError(f"{t.method} was timed at width {t.width} without its output being checked")
        row = SpeedRow(t.method, t.phase, t.width, t.length, failed, t.error, path=t.path, refusal=t.refusal)
        if not failed:
            row = replace(row, nbytes=t.nbytes, nbytes_read=t.nbytes_read, checked=t.checked)
            row = replace(row, allocated=t.allocated, peak=t.peak)
        if not failed and len(logs := log_speeds(t)) > 1:
            rate, beside = (t.tokens / statistics.median(seconds) for seconds in (t.seconds, t.baseline_seconds))
            row = replace(row, rate=rate, baseline_rate=beside, speedup=log_ratio_interval(logs), rounds=len(logs))
            row = replace(row, of_limit=_of_limit(timing))
        rows.append(row)
    return rows


def attention_alone(timings: Sequence[Timing]) -> list[Timing]:
    """The decoding cells with what the caches took of each round in place of its seconds, where that was recorded."""
    return [
        replace(
            t,
            seconds=[s * t.scale for s in t.attention_seconds],
            baseline_seconds=[s * t.scale for s in t.baseline_attention_seconds],
            scale=1.0, moved=0,
        )
        for t in timings if t.phase == "decode" and t.attention_seconds
    ]  # fmt: skip


def break_evens(timings: Sequence[Timing]) -> dict[tuple[str, int], BreakEven]:
    """By method and width: from which context on, or up to which, a decode step takes less time than the baseline's,
    which ran in turn with it; where two lengths or more were timed."""
    lines: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for t in timings:
        if t.phase == "decode" and t.status != "failed" and t.method != "full":
            whole = scaled(t)
            pairs = zip(whole.seconds, whole.baseline_seconds, strict=False)  # a run may end between the two
            own = [(t.length, (mine - base) * t.width / t.tokens) for mine, base in pairs]
            lines.setdefault((t.method, t.width), []).extend(own)
    return {
        who: break_even(fit([x for x, _ in points], [y for _, y in points], 1))
        for who, points in lines.items()
        if len({length for length, _ in points}) > 1 and len(points) > 2
    }


def log_speeds(timing: Timing) -> list[float]:
    """By round, the logarithm of its speed as a multiple of the baseline's. None where rounds have no partner, as with
    ``--benchmark-disable``: which belongs to which is then not known."""
    timing = scaled(timing)
    if len(timing.seconds) != len(timing.baseline_seconds):
        return []
    return [math.log(b / a) for a, b in zip(timing.seconds, timing.baseline_seconds, strict=True)]


def scaled(timing: Timing) -> Timing:
    """A timing of some of a model's layers as one of all of them, round by round: what they take grows with their
    number, the rest (embedding, output, the choice of a token), the median of the same rounds, does not."""
    if timing.scale == 1 or timing.status == "failed":
        return timing
    rest = statistics.median(timing.rest_seconds)
    mine, base = (
        [rest + (seconds - rest) * timing.scale for seconds in side]
        for side in (timing.seconds, timing.baseline_seconds)
    )
    sizes = {key: round(getattr(timing, key) * timing.scale) for key in ("nbytes", "nbytes_read", "allocated")}
    return replace(timing, seconds=mine, baseline_seconds=base, scale=1.0, peak=None, **sizes)


def _of_limit(t: Timing) -> float | None:
    """Of what ran, as it ran."""
    if not (t.moved and t.operations and t.bandwidth and t.rate):
        return None
    least = max(t.moved / t.bandwidth, t.operations / t.rate)
    return least / statistics.median(t.seconds)


TRIMMING = 1.06
"""Standard error of a trimmed mean as a multiple of the mean's, of a normal distribution."""
MOST = 1_000_000
"""Blocks that no one will wait for."""


def blocks_needed(pilot_logs: Sequence[float] | Floats, half_width: float, assurance: float = POWER) -> int:
    """How many further ABBA blocks give a ratio a 95 % t-interval that reaches ``half_width`` (0.02 is 2 %) to either
    side at most, with probability ``assurance``. ``pilot_logs`` is the log ratio of every block of a pilot. Raises
    UsageError for a pilot without a spread and for a half width that is out of reach.

    Measure exactly that many *new* blocks and make the interval of these alone (``log_ratio_interval``); it then covers
    95 %, because their number does not depend on them. Repeating until the interval is narrow does not: it stops where
    the spread happens to look small, so its intervals are too narrow, all the more if few blocks were needed.

    The spread to come is unknown too: under normality (sd of the blocks / sd of the pilot)² has an F distribution,
    whose quantile gives the upper prediction bound of the sd that is used here. So a short pilot asks for more blocks.
    In simulations 80 to 88 % of the intervals were narrow enough, the more the fewer the blocks, which come whole.
    """
    logs = np.asarray(pilot_logs, dtype=float)
    if logs.ndim != 1 or len(logs) < 2 or not np.isfinite(logs).all():
        raise UsageError("a pilot needs the log ratios of two blocks at least, all of them numbers")
    if not 0 < half_width < math.inf or not 0 < assurance < 1:
        raise UsageError(f"a half width of {half_width:g} with probability {assurance:g} cannot be asked for")
    sd, width = float(logs.std(ddof=1)), math.log1p(half_width)
    if sd == 0:
        raise UsageError("the blocks of the pilot are identical, which says nothing about their spread")
    from scipy.special import fdtri, stdtrit  # quantiles of F and t

    def reach(n: int) -> float:
        upper = TRIMMING * sd * math.sqrt(fdtri(n - 1, len(logs) - 1, assurance))
        return float(stdtrit((1 - 2 * TRIMMED) * n - 1, 1 - LEVEL / 2)) * upper / math.sqrt(n)

    enough = UNTRIMMED
    while reach(enough) > width:
        enough *= 2
        if enough > MOST:
            raise UsageError(f"more than {MOST:,} blocks would be needed for a half width of {half_width:g}")
    short = enough // 2 if enough > UNTRIMMED else UNTRIMMED - 1
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (middle, enough) if reach(middle) > width else (short, middle)
    return enough


P95 = 0.95
SHARED = (
    "requests of one load test share a server and its queue: these intervals hold the spread within two tests, not "
    "that between tests, so they are too narrow; repeat both tests in turn (ABBA)"
)


def p95(seconds: Floats, failed: int = 0) -> float:
    """The time that 95 % of the requests did not exceed: of (n,) times, NaN where unknown, and of ``failed`` requests,
    which took forever. NaN where no time is known."""
    known = seconds[~np.isnan(seconds)]
    if not len(known):
        return math.nan
    ordered = np.sort(np.append(known, np.full(failed, math.inf)))  # np.quantile makes NaN of infinite times
    return float(ordered[max(math.ceil(P95 * len(ordered) - 1e-9) - 1, 0)])


@dataclass(frozen=True)
class Cell:
    """One load test at one arrival rate against targets."""

    rate: float
    ttft: float
    """p95, seconds; infinite where more than 5 % of the requests failed."""
    itl: float
    met: bool


@dataclass(frozen=True)
class Goodput:
    """What a server can be offered."""

    rate: float | None
    """The highest rate at which both targets hold, there and at all lower rates; None where the lowest misses."""
    missed: float | None
    """The next rate, at which one did not hold; None where none failed: the limit was not reached."""
    cells: tuple[Cell, ...]
    """By rate."""
    note: str


def goodput(tests: Sequence[tuple[float, Load]], ttft: float, itl: float) -> Goodput:
    """The highest arrival rate that meets a target for the p95 of the time to first token and one for that between
    tokens, seconds. ``tests`` are arrival rates (requests a second) and what was measured there; a rate holds if every
    test at it does. A failed request missed both targets. To compare methods, give their servers equal memory. Raises
    UsageError for rates and targets that are not over 0, and for tests without these times."""
    if not tests or not all(0 < rate < math.inf for rate, _ in tests):
        raise UsageError("goodput needs load tests at arrival rates over 0")
    if not (ttft > 0 and itl > 0):
        raise UsageError(f"targets must be over 0 seconds, not {ttft:g} and {itl:g}")
    cells = []
    for rate, load in sorted(tests, key=lambda test: test[0]):
        seen = p95(load.ttft, load.failed), p95(load.itl, load.failed)
        if any(map(math.isnan, seen)):
            raise UsageError(f"{load.source} does not say the times to first token and between tokens of any request")
        cells.append(Cell(rate, *seen, met=seen[0] <= ttft and seen[1] <= itl))
    missed = min((cell.rate for cell in cells if not cell.met), default=None)
    held = [cell.rate for cell in cells if missed is None or cell.rate < missed]
    again = [cell.rate for cell in cells if missed is not None and cell.met and cell.rate > missed]
    note = "not reached: both targets still hold at the highest rate measured" if missed is None else ""
    if not held:
        note = "the lowest rate measured misses a target already"
    if again:
        note = f"both targets hold again at {again[0]:g} requests a second, above one that missed: one of both is noise"
    return Goodput(max(held, default=None), missed, tuple(cells), note)


@dataclass(frozen=True)
class LoadChange:
    """One load test as a multiple of another: over 1 is slower, of the throughput faster."""

    ratios: dict[str, Interval]
    """``mean TTFT``, ``p95 TTFT`` and the same of ITL and E2E, of the answered requests; what a test does not say is
    left out."""
    throughput: float
    """Tokens per second; one figure a test, so without an interval. NaN where tokens are unknown."""
    answered: tuple[int, int]
    """Of the test, and of the one it is compared with."""
    failed: tuple[int, int]
    notes: tuple[str, ...]


def compare_loads(test: Load, base: Load, draws: int = DRAWS, seed: int = 0) -> LoadChange:
    """A load test against another of the same setting, with 95 % intervals from resampling the requests of each by
    themselves (they are not paired). Raises UsageError, naming what, where the settings differ.

    Requests of one test share a server, its queue and its neighbours, so they are not independent, and a single pair of
    tests understates the noise between tests; ``notes`` say so.
    """
    names = {**test.setting, **base.setting}
    differ = [name for name in names if test.setting.get(name) != base.setting.get(name)]
    if differ:
        said = ", ".join(f"{n} ({test.setting.get(n, 'unknown')} and {base.setting.get(n, 'unknown')})" for n in differ)
        raise UsageError(f"{test.source} and {base.source} are load tests of different settings: {said}")
    ratios: dict[str, Interval] = {}
    for name in ("ttft", "itl", "e2e"):
        mine, theirs = (x[x > 0] for x in (getattr(test, name), getattr(base, name)))  # NaN is not
        if len(mine) and len(theirs):
            ratios[f"mean {name.upper()}"] = _mean_ratio(mine, theirs, draws, seed)
            ratios[f"p95 {name.upper()}"] = _p95_ratio(mine, theirs, draws, seed)
    known = all(np.isfinite(x.tokens).any() and x.tokens.any() for x in (test, base))
    failed = (test.failed, base.failed)
    lost = f"{failed[0]} and {failed[1]} requests failed; their times are in no figure"
    return LoadChange(
        ratios,
        test.throughput / base.throughput if known else math.nan,
        (len(test), len(base)),
        failed,
        (SHARED, lost) if any(failed) else (SHARED,),
    )


def _mean_ratio(mine: Floats, theirs: Floats, draws: int, seed: int) -> Interval:
    """The bootstrap of ``estimate`` with the two tests as its datasets. One request has no interval."""
    n, m = len(mine), len(theirs)
    if min(n, m) < 2:
        return Interval(float(mine.mean() / theirs.mean()), 0.0, math.inf)
    top, bottom = np.append(mine / n, np.zeros(m)), np.append(np.zeros(n), theirs / m)
    design = Design.of([""] * n + ["base"] * m, [str(at) for at in range(n + m)])
    return estimate(design, [Ratio(top, bottom, log=True, bounds=(0, math.inf))], draws=draws, seed=seed)[0]


def _p95_ratio(mine: Floats, theirs: Floats, draws: int, seed: int) -> Interval:
    """Resamples of the rank. How many of n requests are below the true p95 is binomial: each draw takes such a number
    and the middle between the two times it separates. Drawing the requests themselves would never go beyond the slowest
    one seen: of 100 requests against 1,000 it is too low in 8 % instead of 2.5 % (lognormal times)."""
    rng = np.random.default_rng([seed, 1])
    drawn = []
    for column in (mine, theirs):
        ordered = np.concatenate([[0.0], np.sort(column), [math.inf]])
        below = rng.binomial(len(column), P95, draws)
        drawn.append((ordered[below] + ordered[below + 1]) / 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = drawn[0] / drawn[1]
    ends = (LEVEL / 2, 0.0), (1 - LEVEL / 2, math.inf)  # ∞ / ∞ can be anything
    low, high = (np.quantile(np.nan_to_num(ratios, nan=x, posinf=math.inf), q, method="inverted_cdf") for q, x in ends)
    return Interval(p95(mine) / p95(theirs), float(low), float(high))
