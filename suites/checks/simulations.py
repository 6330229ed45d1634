"""Does the analysis keep its promises? Worlds whose truth is known, drawn thousands of times.

``python -m suites.checks.simulations`` runs all of them (minutes) and rewrites the tables of docs/statistics.md;
test_simulations.py asserts the same bounds. Every world is seeded: the same numbers come out every time. A world may be
asked for every ``thin``-th of its draws; its bounds are then wider.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from kvsuite.analysis import forced as forcing
from kvsuite.analysis.answered import Answered, apart, extremes, shared
from kvsuite.analysis.benchmark import score, select
from kvsuite.analysis.effects import DEFAULT, Comparison, Part, compare, decided
from kvsuite.analysis.garbled import check
from kvsuite.analysis.predictors import Worth, worth
from kvsuite.analysis.resample import Design
from kvsuite.analysis.runs import arms, noise
from kvsuite.analysis.shipped import Shipped, shipped
from kvsuite.analysis.speed import blocks_needed
from kvsuite.analysis.stats import LEVEL, Estimate, Ratio, estimate, mean_interval
from kvsuite.analysis.tables.presets import Preset
from kvsuite.analysis.trimmed import log_ratio_interval
from kvsuite.analysis.verdict import SPEED, Named, Verdict, decide, overall
from kvsuite.analysis.verdict import effect as endpoint
from kvsuite.columns import Arm, align, stack
from kvsuite.margins import Margins
from kvsuite.presets import PRESETS
from kvsuite.records import Forced, read

SIZE = (0.038, 0.063)
"""Where the size of a test at nominal 5 % must lie in 2,000 draws; an exact test of counts may be smaller."""
COVERAGE = (0.937, 0.962)
"""Where the coverage of a 95 % interval must lie."""
DRAWS = 2000
RESAMPLES = 1000
"""Of the bootstrap inside a simulation; outside it is 10,000."""
PLANTED = 1000
"""Draws of the comparison with the planner: a share of .3 is then known to 1.5 points."""
CAP = 1024


@dataclass(frozen=True)
class Row:
    """One promise and what became of it."""

    about: str
    figure: str
    seen: float
    low: float
    high: float
    draws: int

    def holds(self, thin: int = 1) -> bool:
        """Whether it lies in its bounds, which are for ``thin`` times as many draws."""
        low, high = widened(self.low, self.high, self.draws, thin)
        return low <= self.seen <= high


def widened(low: float, high: float, draws: int, thin: int) -> tuple[float, float]:
    """Bounds of a share in ``draws`` for those in ``thin`` times as many. They lie 2.6 standard errors from a share
    that is as promised; a standard error is larger in fewer draws."""
    more = 2.6 * (1 - thin**-0.5) / math.sqrt(draws)
    return low - more * math.sqrt(max(0, low * (1 - low))), high + more * math.sqrt(max(0, high * (1 - high)))


@dataclass(frozen=True)
class World:
    """Prompts of four datasets that score differently: all scores between (ROUGE), right or wrong, mostly 0 or 1 with
    some between (F1), and nearly all 0. An arm's score is the prompt's own and noise; so is its length. Two prompts in
    three of the second dataset share a document."""

    each: int = 60
    """Prompts of a dataset."""
    noise: float = 0.4
    """Share of the answers that noise changes at all."""
    spread: float = 0.45
    """Standard deviation of a log length, given the prompt."""

    @functools.cached_property
    def keys(self) -> list[tuple[str, str]]:
        return [(name, str(i)) for name in ("rouge", "exact", "f1", "count") for i in range(self.each)]

    @functools.cached_property
    def clusters(self) -> list[str]:
        return [f"{d} {int(i) // 3 * 2 if d == 'exact' and int(i) % 3 else i + 'x'}" for d, i in self.keys]

    def prompts(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Their own scores, and log lengths; those of a document have a part in common."""
        n = self.each
        level = np.concatenate(
            [
                np.clip(rng.normal(0.26, 0.06, n), 0.02, 1),
                rng.choice([0.02, 0.3, 0.6, 0.98], n),
                rng.choice([0.0, 0.35, 0.7, 1.0], n, p=[0.25, 0.25, 0.25, 0.25]),
                rng.choice([0.0, 0.05, 0.5], n, p=[0.9, 0.05, 0.05]),
            ]
        )
        _, same = np.unique(self.clusters, return_inverse=True)
        length = rng.normal(5.4, 0.6, len(level)) + rng.normal(0, 0.4, same.max() + 1)[same]
        return level, length

    def arm(
        self, rng: np.random.Generator, level: np.ndarray, length: np.ndarray, worse: float = 0.0, longer: float = 1.0
    ) -> Arm:
        """Answers: a share ``worse`` of all scores falls to 0, lengths are ``longer`` times as long."""
        n, part = self.each, np.repeat(np.arange(4), self.each)
        moved = rng.random(4 * n) < self.noise
        score = np.where(part == 0, np.clip(level + moved * rng.normal(0, 0.04, 4 * n), 0, 1), level)
        score = np.where((part == 1) | (part == 3), rng.random(4 * n) < level, score)
        score = np.where((part == 2) & moved, np.clip(level + rng.choice([-0.35, 0.35], 4 * n), 0, 1), score)
        score = np.where(rng.random(4 * n) < worse, 0.0, score)
        tokens = np.ceil(np.exp(length + rng.normal(0, self.spread, 4 * n)) * longer)
        capped = tokens >= CAP
        cap, files = np.full(4 * n, float(CAP)), dict.fromkeys(("rouge", "exact", "f1", "count"), "-")
        known = {"score": score.astype(float), "tokens": np.minimum(tokens, CAP), "cap": cap}
        text: list[str | None] = [None] * (4 * n)
        return Arm("simulated", self.keys, self.clusters, capped=capped.astype(float), text=text, files=files, **known)

    def part(self, rng: np.random.Generator, worse: float = 0.0, longer: float = 1.0, methods: int = 1) -> Part:
        """A baseline, methods and a control of the same prompts."""
        own = self.prompts(rng)
        named = {f"m{i}": self.arm(rng, *own, worse, longer) for i in range(methods)}
        return Part(self.arm(rng, *own), named, self.arm(rng, *own))


def _shares(rows: Iterable[dict[str, bool]]) -> dict[str, tuple[float, int]]:
    """How often each thing happened, and in how many draws it could."""
    seen: dict[str, list[bool]] = {}
    for row in rows:
        for name, happened in row.items():
            seen.setdefault(name, []).append(happened)
    return {name: (sum(x) / len(x), len(x)) for name, x in seen.items()}


def _holds(estimate: Estimate, truth: float) -> bool:
    return estimate.low <= truth <= estimate.high


EXACT = {"broken", "truncation", "net harm", "churn", "longer", "shorter", "cap hits"}
"""Figures whose p is of counts: it cannot reach 5 %, only stay below."""
NO_MARGIN = Margins(**dict.fromkeys(Margins.names(), 0.0))
"""With these a method that does nothing is at every limit: the hardest null."""


def null(thin: int = 1) -> list[Row]:
    """Three methods that do nothing, margins of 0: how often is something found?"""

    def draw(seed: int) -> dict[str, bool]:
        part = World().part(np.random.default_rng([1, seed]), methods=3)
        rows, _ = decided(compare([part], NO_MARGIN, draws=RESAMPLES, seed=seed), NO_MARGIN)
        first, sides = rows[0], {-1: "less", 1: "more"}
        found = {f"harm p of {e.endpoint}, {sides[s]}": e.harm(s) < LEVEL for e in first.effects for s in e.sides}
        found |= {f"p of {f.name}": f.p < LEVEL for f in first.findings if f.p is not None}
        found["any harmful of three methods"] = any(row.verdict == "harmful" for row in rows)
        found["any found after Benjamini–Hochberg"] = any(
            f.adjusted < LEVEL for row in rows for f in row.findings if f.p is not None
        )
        seen = compare([part], draws=RESAMPLES, seed=seed)[0].effects
        return found | {f"interval of {e.endpoint}": not _holds(e.estimate, float(e.ratio)) for e in seen}

    shares = _shares(draw(seed) for seed in range(DRAWS // thin))
    about = "size at nominal 5 %, no effect"
    found = []
    for name, (share, draws) in shares.items():
        upper_only = name.startswith("any") or bool(EXACT & {name.removeprefix("p of "), name.split()[-1]})
        upper_only |= bool(EXACT & {name.removeprefix("harm p of ").partition(",")[0]})
        found.append(Row(about, name, share, 0.0 if upper_only else SIZE[0], SIZE[1], draws))
    return found


def effect(thin: int = 1) -> list[Row]:
    """A method that loses 8 % of all answers and writes 10 % more: do the intervals hold the truth?"""
    much = {"worse": 0.08, "longer": 1.1}
    large = World(each=150_000).part(np.random.default_rng(2), **much)
    (truth,) = compare([large], draws=2)
    known = {e.endpoint: e.estimate.mean for e in truth.effects}
    known |= {f.name: f.estimate.mean for f in truth.findings if f.estimate is not None}

    def draw(seed: int) -> dict[str, bool]:
        (row,) = compare([World().part(np.random.default_rng([3, seed]), **much)], draws=RESAMPLES, seed=seed)
        seen = {e.endpoint: e.estimate for e in row.effects}
        seen |= {f.name: f.estimate for f in row.findings if f.estimate is not None}
        return {name: _holds(estimate, known[name]) for name, estimate in seen.items()}

    shares = _shares(draw(seed) for seed in range(DRAWS // thin))
    about = "coverage of 95 % intervals, planted effects"
    return [Row(about, f"{name} ({known[name]:.3g})", share, *COVERAGE, n) for name, (share, n) in shares.items()]


def few(thin: int = 1) -> list[Row]:
    """Small samples: 5 and 12 prompts a dataset, one dataset of 8, 6 blocks."""

    def draw(seed: int) -> dict[str, bool]:
        rng, found = np.random.default_rng([4, seed]), {}
        for each in (5, 12):
            (row,) = compare([World(each=each).part(rng)], draws=RESAMPLES, seed=seed)
            found |= {f"{e.endpoint}, {4 * each} prompts": _holds(e.estimate, float(e.ratio)) for e in row.effects}
        found["mean of 8 scores"] = _holds(mean_interval(np.clip(rng.normal(0.4, 0.1, 8), 0, 1)), 0.4)
        found["speed, 6 blocks"] = _holds(log_ratio_interval(rng.normal(np.log(1.3), 0.1, 6)), 1.3)
        return found

    shares = _shares(draw(seed) for seed in range(DRAWS // thin))
    about = "coverage of 95 % intervals, small samples (upper end open: few changes widen them)"
    return [Row(about, name, share, COVERAGE[0], 1.0, n) for name, (share, n) in shares.items()]


def scrambler(thin: int = 1) -> list[Row]:
    """A method that gives half the prompts the level of another prompt of their dataset: as many broken as fixed."""

    def draw(seed: int) -> dict[str, bool]:
        rng, world = np.random.default_rng([5, seed]), World(each=150)
        level, length = world.prompts(rng)
        mixed = level.copy()
        for part in np.split(np.arange(len(level)), 4):
            some = part[rng.random(len(part)) < 0.5]
            mixed[some] = level[rng.permutation(some)]
        arms = [world.arm(rng, x, length) for x in (level, mixed, level)]
        (row,) = compare([Part(arms[0], {"m": arms[1]}, arms[2])], NO_MARGIN, draws=200, seed=seed)
        net = row.finding("net harm")
        return {"broken beyond noise": row.effect("broken").harm(1) < LEVEL, "net harm": net.p < LEVEL}

    shares = _shares(draw(seed) for seed in range(400 // thin))
    about = "a symmetric scrambler is found by"
    limits = {"broken beyond noise": (0.8, 1.0), "net harm": (0.0, SIZE[1])}
    return [Row(about, name, share, *limits[name], n) for name, (share, n) in shares.items()]


NOISE = Path(__file__).parents[2] / "reports" / "cpu" / "noise"
"""A/A records of our own: the default model's answers under full and two controls."""


def power(thin: int = 1) -> list[Row]:
    """Effects planted into our own noise: does a planner say how often each verdict comes?"""
    parts = [part for part in noise(read(NOISE)) if "jitter" in part.methods]
    scored, chats = sorted(parts, key=lambda part: bool(np.isnan(part.base.score).any()))
    found = _planned("score", scored.base, scored.methods["jitter"], 0.03, False, PLANTED // thin)
    return found + _planned("length", chats.base, chats.methods["jitter"], 0.10, True, PLANTED // thin)


def _planned(about: str, base: Arm, control: Arm, margin: float, ratio: bool, draws: int) -> list[Row]:
    margins = Margins(quality=margin, length=margin)
    names = [str(i) for i in range(2 * len(base))]  # each pair both ways round, as it will be drawn
    both = [replace(stack(arms), cluster=names) for arms in ((base, control), (control, base))]
    (seen,) = (e for e in compare([Part(both[0], {"": both[1]})], margins)[0].effects if e.ratio == ratio)
    planned = math.ceil(seen.needed)
    rows = []
    for effect, verdict in ((0.0, "within margin"), (margin / 2, "within margin"), (2 * margin, "harmful")):
        predicted = chances(seen.estimate, seen.n, planned, effect, margin, ratio, len(seen.sides))[verdict]

        def draw(seed: int, effect: float = effect, verdict: str = verdict) -> bool:
            one, other = _redrawn(np.random.default_rng([6, seed]), base, control, planned)
            worse = (
                replace(other, tokens=other.tokens * (1 + effect))
                if ratio
                else replace(other, score=other.score - effect)
            )
            rows = compare([Part(one, {"": worse})], margins, draws=RESAMPLES, seed=seed)
            (row,), _ = decided(rows, margins)
            return next(e for e in row.effects if e.ratio == ratio).verdict == verdict

        share = sum(draw(seed) for seed in range(draws)) / draws
        figure = f"{about}, effect {effect:.0%}, {planned} prompts: {verdict}"
        rows.append(
            Row(
                "power: simulated, beside the planner's prediction ± 5 points",
                figure,
                share,
                predicted - 0.05,
                predicted + 0.05,
                draws,
            )
        )
    return rows


def _redrawn(rng: np.random.Generator, base: Arm, control: Arm, n: int) -> tuple[Arm, Arm]:
    """``n`` prompts drawn from the records, baseline and control changing places at random: exchangeable, so no effect.
    The cap is above every answer with a planted one."""
    at = rng.integers(0, len(base), n)
    keys, swap = [("drawn", str(i)) for i in range(n)], rng.random(n) < 0.5
    arms = []
    for mine, theirs in ((base, control), (control, base)):
        score = np.where(swap, theirs.score[at], mine.score[at])
        tokens = np.where(swap, theirs.tokens[at], mine.tokens[at])
        drawn = mine.take(at)
        clusters = [name for _, name in keys]
        files = {"drawn": "-"}
        arms.append(
            replace(drawn, keys=keys, cluster=clusters, score=score, tokens=tokens, cap=np.full(n, 320.0), files=files)
        )
    return arms[0], arms[1]


def selection(thin: int = 1) -> list[Row]:
    """The negative benchmark on methods that do nothing: what other families chose on one replicate, scored on
    another."""

    def draw(seed: int) -> dict[str, bool]:
        rng = np.random.default_rng([7, seed])
        level, world = rng.beta(6, 6, 300), World(each=75)

        def replicate() -> Arm:
            score = np.clip(level + rng.normal(0, 0.12, 300), 0, 1)
            alone = [str(i) for i in range(300)]
            return replace(world.arm(rng, level, level), score=score, keys=[("d", i) for i in alone], cluster=alone)

        jurors = {name: replicate() for name in ("kivi:4", "h2o", "snapkv")}
        found = score(select(replicate(), jurors, "kivi:4"), *(replicate() for _ in range(3)), draws=600, seed=seed)
        return {"drop of the candidate": _holds(found.drop, 0), "drop of the control": _holds(found.floor, 0)}

    shares = _shares(draw(seed) for seed in range(DRAWS // thin))
    about = "negative benchmark, methods that do nothing: the interval covers 0"
    return [Row(about, name, share, *COVERAGE, n) for name, (share, n) in shares.items()]


def chances(
    seen: Estimate, n: int, planned: int, effect: float, margin: float, ratio: bool = False, sides: int = 1
) -> dict[Verdict, float]:
    """The probability of every verdict on a lone method with a true ``effect`` (bad is positive; relative for a ratio)
    from ``planned`` samples with the spread of these ``n``; of two ``sides``, each has its test."""
    true, edge = (math.log1p(effect), math.log1p(margin)) if ratio else (effect, margin)
    se = seen.se * math.sqrt(n / planned)
    reach, further = (float(stats.t.isf(level, max(planned - 1, 1))) for level in (LEVEL, LEVEL / sides))
    harmful = float(stats.norm.cdf((true - edge) / se - further))
    within = float(stats.norm.cdf((edge - true) / se - reach))
    if sides > 1:
        within = max(within - float(stats.norm.sf((edge + true) / se - reach)), 0)
    return {"harmful": harmful, "within margin": within, "undecided": 1 - within - harmful}


def blocks(thin: int = 1) -> list[Row]:
    """Speed from as many ABBA blocks as a pilot of 6 asks for."""

    def draw(seed: int) -> dict[str, bool]:
        rng = np.random.default_rng([8, seed])
        n = blocks_needed(rng.normal(np.log(1.2), 0.03, 6), 0.02)
        return {"as many as the pilot says": _holds(log_ratio_interval(rng.normal(np.log(1.2), 0.03, n)), 1.2)}

    shares = _shares(draw(seed) for seed in range(DRAWS // thin))
    about = "coverage of the speed ratio"
    return [Row(about, name, share, *COVERAGE, n) for name, (share, n) in shares.items()]


def shuffled(thin: int = 1) -> list[Row]:
    """A line fitted to shuffled labels is as good as their mean, which ignores all features; groups are left out."""
    rng = np.random.default_rng(9)
    x = rng.normal(0, 1, 200)
    y = 3 + x + rng.normal(0, 0.4, 200)
    groups = np.repeat(np.arange(40), 5)

    def left_out(labels: np.ndarray, seed: int) -> Worth:
        line, mean = np.empty(200), np.empty(200)
        fold = np.random.default_rng(seed).permutation(40)[groups] % 5
        for out in (fold == number for number in range(5)):
            line[out] = np.polynomial.Polynomial.fit(x[~out], labels[~out], 1)(x[out])
            mean[out] = labels[~out].mean()
        return worth(np.exp(line), np.exp(mean), np.exp(labels), groups.astype(str).tolist(), draws=500, seed=seed)

    better = [left_out(rng.permutation(y), seed).better for seed in range(400 // thin)]
    about = "a predictor is called better than the null"
    return [
        Row(about, "shuffled labels", sum(better) / len(better), 0.0, SIZE[1], len(better)),
        Row(about, "true labels", float(left_out(y, 0).better), 1.0, 1.0, 1),
    ]


def _arm(names: list[tuple[str, str]], score: np.ndarray | None = None, tokens: np.ndarray | None = None) -> Arm:
    """An arm of one column; ``names`` are the dataset and the document of every sample."""
    n, nothing = len(names), np.full(len(names), np.nan)
    given = [nothing if x is None else x for x in (score, tokens)]
    keys = [(d, f"{i}") for i, (d, _) in enumerate(names)]
    documents = [document for _, document in names]
    flat = np.full(n, float(CAP)), np.zeros(n)
    return Arm("simulated", keys, documents, *given, *flat, [None] * n, dict.fromkeys((d for d, _ in names), "-"))


def documents(thin: int = 1) -> list[Row]:
    """60 documents of 5 samples that share most of their noise; a dataset of one document beside another dataset."""
    names = [("d", f"document {i // 5}") for i in range(300)]
    lone = [("one", "document")] * 200 + [("many", str(i)) for i in range(50)]

    def draw(seed: int) -> dict[str, bool]:
        rng = np.random.default_rng([10, seed])
        level = np.repeat(rng.beta(2, 2, 60), 5)

        def arm() -> Arm:
            noise = np.repeat(rng.normal(0, 0.25, 60), 5) + rng.normal(0, 0.05, 300)
            return _arm(names, np.clip(level + noise, 0, 1))

        (row,) = compare([Part(arm(), {"m": arm()}, arm())], NO_MARGIN, draws=RESAMPLES, seed=seed)
        found = {f"harm p of {e.endpoint}": e.harm(e.sides[0]) < LEVEL for e in row.effects}
        found |= {f"p of {f.name}": f.p < LEVEL for f in row.findings}
        base = rng.uniform(0.3, 0.7, 250)
        moved = np.append(np.full(200, rng.normal(0, 0.05)), rng.normal(0, 0.05, 50))
        (row,) = compare([Part(_arm(lone, base), {"m": _arm(lone, base + moved)})], draws=RESAMPLES, seed=seed)
        return found | {"interval of quality, one dataset being one document": not _holds(row.effects[0].estimate, 0)}

    shares = _shares(draw(seed) for seed in range(500 // thin))
    about = "errors at nominal 5 %, samples of documents, no effect"
    return [Row(about, name, share, 0.0, 0.07, n) for name, (share, n) in shares.items()]  # 500 draws


def rare(thin: int = 1) -> list[Row]:
    """Every answer differs by a token, a few loop to the cap: true costs of 1.17, 1.08 and 1.03 must not look safe
    at a margin of 3 %."""

    def draw(seed: int, n: int, share: float) -> bool:
        rng = np.random.default_rng([11, seed])
        names = [("d", str(i)) for i in range(n)]
        base = np.round(np.clip(rng.lognormal(3.9, 0.5, n), 5, 500))
        tokens = np.where(rng.random(n) < share, CAP, base + rng.choice([-1, 1], n))
        part = Part(_arm(names, tokens=base), {"m": _arm(names, tokens=tokens)})
        return judged(part, seed, Margins(length=0.03)).verdict == "within margin"

    found, draws = [], 300 // thin
    for n, share in ((80, 0.01), (400, 0.005), (1500, 0.002)):
        seen = sum(draw(seed, n, share) for seed in range(draws)) / draws
        name = f"{share:.1%} of {n:,} answers loop"
        found.append(Row("called within margin although a few answers loop", name, seen, 0.0, 0.05, draws))
    return found


def judged(part: Part, seed: int = 0, margins: Margins = DEFAULT) -> Comparison:
    """The only method of a part, with its verdicts."""
    return decided(compare([part], margins, draws=200, seed=seed), margins)[0][0]


def _said(row: Comparison, endpoint: str) -> str:
    found = row.effect(endpoint)
    return found.verdict if found else ""


def _bounded(about: str, bounds: dict[str, tuple[float, float]], rows: Iterable[dict[str, bool]]) -> list[Row]:
    """Of the draws of a world, how often each thing happened."""
    return [Row(about, name, share, *bounds[name], n) for name, (share, n) in _shares(rows).items()]


def _forced(
    rng: np.random.Generator, kl: float, margins: Margins, documents: int = 16, skewed: bool = True
) -> list[tuple[str, Any]]:
    """One forced pass: each document's KL beyond the control's (it varies by half), and its perplexity."""
    level = rng.gamma(4, 0.25, documents)
    noise = rng.gamma(4, 0.25, documents) * 2e-4
    beyond = kl * level + noise - rng.permutation(noise)
    found = estimate(Design.alone(documents), [Ratio(beyond, skewed=skewed)], draws=200)[0]
    logs = rng.normal(0, 0.01, documents)
    ratio = Estimate.of(math.exp(logs.mean()), float(logs.std(ddof=1)) / documents**0.5, documents - 1, log=True)
    return [
        ("kl", endpoint("kl", found, margins.kl, 1, documents)),
        ("perplexity", endpoint("perplexity", ratio, margins.perplexity, 1, documents, ratio=True)),
    ]


def family(thin: int = 1) -> list[Row]:
    """24 methods that do nothing, all endpoints and speed: how often is any called harmful, or slower?"""

    def draw(seed: int, each: int, margins: Margins) -> bool:
        rng = np.random.default_rng([12, seed])
        beside: list[Named] = []
        for at in range(24):
            beside += [(f"m{at}", e) for _, e in _forced(rng, 0.0, margins)]
            speed = log_ratio_interval(rng.normal(0, 0.05, 6))
            beside.append((f"m{at}", endpoint("speed", speed, margins.speed, -1, 6, ratio=True)))
        rows = compare([World(each=each).part(rng, methods=24)], margins, draws=200, seed=seed)
        rows, others = decided(rows, margins, beside)
        return any(e.verdict == "harmful" for e in [*(e for r in rows for e in r.effects), *(e for _, e in others)])

    found, draws = [], 400 // thin
    high = LEVEL + 2.6 * math.sqrt(LEVEL * (1 - LEVEL) / 400)
    for name, each, margins in (
        ("24 prompts", 6, Margins()), ("240 prompts", 60, Margins()),
        ("24 prompts, margins of 0", 6, NO_MARGIN), ("240 prompts, margins of 0", 60, NO_MARGIN),
    ):  # fmt: skip
        seen = sum(draw(seed, each, margins) for seed in range(draws)) / draws
        found.append(Row("any harmful among 24 methods that do nothing, speed included", name, seen, 0.0, high, draws))
    return found


def _chats(rng: np.random.Generator, n: int, middle: float, spread: float = 0.3) -> tuple[Any, Callable[..., Arm]]:
    """Prompts and a way to answer them: lengths that vary, ended by the cap."""
    names = [("chat", str(i)) for i in range(n)]
    own = rng.normal(math.log(middle), 0.7, n)

    def answers(times: Any = 1.0) -> Arm:
        tokens = np.maximum(np.round(np.exp(own + rng.normal(0, spread, n)) * times), 1)
        return _arm(names, tokens=np.minimum(tokens, CAP))

    return own, answers


def capped(thin: int = 1) -> list[Row]:
    """Baselines of which 50 to 98 % are at the cap, beside answers truly twice as long."""
    rows = []
    for share, z in ((0.5, 0.0), (0.8, 0.84), (0.98, 2.05)):
        for n in (20, 300):

            def draw(seed: int, n: int = n, z: float = z) -> dict[str, bool]:
                rng = np.random.default_rng([13, seed])
                _, answers = _chats(rng, n, CAP * math.exp(0.76 * z))
                said = _said(judged(Part(answers(), {"m": answers(2.0)}), seed), "length")
                return {"within": said == "within margin"}

            draws = 300 // thin
            seen = sum(draw(seed)["within"] for seed in range(draws)) / draws
            about = "called within margin, answers twice as long that the cap hides"
            rows.append(Row(about, f"{share:.0%} of {n} at the cap", seen, 0.0, 0.01, draws))
    return rows


def repeated(thin: int = 1) -> list[Row]:
    """80 chats answered 3 times by a method that does nothing, with noise half of which it shares with the baseline."""

    def draw(seed: int) -> dict[str, bool]:
        rng = np.random.default_rng([19, seed])
        own, noise = rng.normal(math.log(150), 0.7, 80), rng.normal(0, 0.5, (7, 80))
        mine = own + math.sqrt(0.5) * noise[:3] + math.sqrt(0.5) * noise[4:]
        names = [("chat", str(i)) for i in range(80)]
        tokens = np.minimum(np.maximum(np.round(np.exp(np.concatenate([own + noise[:4], mine]))), 1), CAP)
        arms = [Answered(arm, arm) for arm in (_arm(names, tokens=x) for x in tokens)]
        [part] = shared("m", arms[:4], arms[4:], apart(arms[:4], arms[4:]), 80, coupled=True)
        [row] = compare([part], NO_MARGIN, draws=RESAMPLES, seed=seed)
        sides = {-1: "less", 1: "more"}
        found = {
            f"harm p of {e.endpoint}, {sides[s]}, 3 repeats": e.harm(s) < LEVEL for e in row.effects for s in e.sides
        }
        found |= {f"p of {f.name}, 3 repeats": f.p < LEVEL for f in row.findings if f.p is not None and f.estimate}
        cost = row.effect("length").estimate
        return found | {"interval of length, 3 repeats": not _holds(cost, 1.0)}

    found = _shares(draw(seed) for seed in range(DRAWS // thin))
    about = "size at nominal 5 %, no effect, 3 answers to each of 80 prompts"
    return [
        Row(about, name, seen, SIZE[0] if "length" in name else 0.0, SIZE[1], n) for name, (seen, n) in found.items()
    ]


def truncated(thin: int = 1) -> list[Row]:
    """300 chats of which a share is cut to a third, which makes 83 % of these at most half as long, and noise 5 %."""
    beyond = 0.05 * (0.830 - 0.051)

    def draw(seed: int) -> dict[str, bool]:
        rng, found = np.random.default_rng([14, seed]), {}
        for share in (0.05, 0.2):
            _, answers = _chats(rng, 300, 150)
            times = np.where(rng.random(300) < share, 1 / 3, 1.0)
            row = judged(Part(answers(), {"m": answers(times)}, answers()), seed)
            found[f"{share:.0%}: called within margin"] = row.verdict == "within margin"
            found[f"{share:.0%}: called harmful"] = row.verdict == "harmful"
            if share == 0.05:
                found["5%: excluded by the interval"] = row.effect("truncation").estimate.high < beyond
        return found

    bounds = {
        "5%: called within margin": (0.0, 0.05), "5%: called harmful": (0.0, 1.0),
        "5%: excluded by the interval": (0.0, 0.07),
        "20%: called within margin": (0.0, 0.0), "20%: called harmful": (0.9, 1.0),
    }  # fmt: skip
    return _bounded("a share of 300 answers cut to a third", bounds, (draw(seed) for seed in range(400 // thin)))


def sharp(thin: int = 1) -> list[Row]:
    """Much harm in few samples, and the broken type among four."""

    def draw(seed: int) -> dict[str, bool]:
        rng = np.random.default_rng([15, seed])
        names = [("d", str(i)) for i in range(16)]
        base, control = (_arm(names, np.ones(16)) for _ in range(2))
        lost = _arm(names, (rng.random(16) > 0.375).astype(float))
        few = judged(Part(base, {"m": lost}, control, acted=True), seed)
        own, world = World().prompts(rng), World()
        method = world.arm(rng, *own)
        gone = np.array([d == "exact" for d, _ in method.keys])
        broken = replace(method, score=np.where(gone, 0.0, method.score))
        row = judged(Part(world.arm(rng, *own), {"m": broken}, world.arm(rng, *own)), seed)
        return {
            "16 samples, 37.5 points lost: harmful": few.verdict == "harmful",
            "one of four types fails: harmful": row.verdict == "harmful",
            "one of four types fails: within margin": row.verdict == "within margin",
        }

    bounds = {
        "16 samples, 37.5 points lost: harmful": (0.7, 1.0), "one of four types fails: harmful": (0.9, 1.0),
        "one of four types fails: within margin": (0.0, 0.0),
    }  # fmt: skip
    return _bounded("much harm is found", bounds, (draw(seed) for seed in range(500 // thin)))


def failing(thin: int = 1) -> list[Row]:
    """A fifth of one arm's answers failed, among them the bad ones: neither is the rest safe, nor is failing harm."""

    def part(rng: np.random.Generator, worse: float, fails: float) -> Part:
        names = [("d", str(i)) for i in range(300)]
        base, control, mine = ((rng.random(300) < 0.8).astype(float) for _ in range(3))
        mine = np.where(rng.random(300) < worse, 0.0, mine)
        gone = rng.random(300) < np.where(mine == 0, 2 * fails, fails / 2)
        arms = [_arm(names, x) for x in (base, mine, control)]
        lacking = replace(arms[1], score=np.where(gone, np.nan, mine), capped=np.where(gone, np.nan, 0.0))
        ends = extremes([arms[0], lacking, arms[2]])
        assert ends
        there = np.flatnonzero(~gone).tolist()
        first, second, floor = (arm.take(there) for arm in arms)
        bounds = [Part(x[0], {"m": x[1]}, x[2]) for x in ends]
        return Part(first, {"m": second}, floor, asked=300, extremes=(bounds[0], bounds[1]))

    def draw(seed: int) -> dict[str, bool]:
        rng = np.random.default_rng([16, seed])
        null, harm = (judged(part(rng, worse, fails), seed).verdict for worse, fails in ((0.0, 0.2), (0.4, 0.05)))
        return {
            "no effect, a fifth failed: harmful": null == "harmful",
            "no effect, a fifth failed: within margin": null == "within margin",
            "four of ten lost, a few failed: harmful": harm == "harmful",
        }

    bounds = {
        "no effect, a fifth failed: harmful": (0.0, 0.01), "no effect, a fifth failed: within margin": (0.0, 0.0),
        "four of ten lost, a few failed: harmful": (0.9, 1.0),
    }  # fmt: skip
    return _bounded("failures in one arm", bounds, (draw(seed) for seed in range(300 // thin)))


def timing(thin: int = 1) -> list[Row]:
    """ABBA blocks of two steps a turn: a drift of 2 % a step, and blocks of which one in twenty took three times as
    long, of the method or of the baseline."""

    def block(rng: np.random.Generator, at: int) -> float:
        logs = 0.02 * (8 * at + np.arange(8)) + rng.normal(0, 0.03, 8)
        return float(logs[[0, 1, 6, 7]].mean() - logs[2:6].mean())

    def draw(seed: int) -> dict[str, bool]:
        rng, found = np.random.default_rng([17, seed]), {}
        for n in (6, 12):
            drift = log_ratio_interval([block(rng, at) for at in range(n)])
            held = rng.choice([0.0, math.log(3), -math.log(3)], n, p=[0.95, 0.025, 0.025])
            outlier = log_ratio_interval(rng.normal(0, 0.03, n) + held)
            for name, seen in (("drift", drift), ("outliers", outlier)):
                found[f"{name}, {n} blocks: slower"] = seen.p(1, -1) < LEVEL
                found[f"{name}, {n} blocks: faster"] = seen.p(1, 1) < LEVEL
            found[f"outliers, {n} blocks: wider than 20 %"] = outlier.high / outlier.low > 1.2
        return found

    draws = [draw(seed) for seed in range(DRAWS // thin)]
    bounds = {name: (0.0, 0.3 if "wider" in name else 0.07) for name in draws[0]}
    return _bounded("speed at nominal 5 % a side, no effect", bounds, draws)


def forced(thin: int = 1) -> list[Row]:
    """KL of 16 documents against its margin of .02."""

    def draw(seed: int) -> dict[str, bool]:
        rng = np.random.default_rng([18, seed])
        found = {}
        for kl in (0.005, 0.012, 0.02, 0.07):
            (_, e), _ = _forced(rng, kl, Margins())
            ((_, e),) = decide([("m", e)])
            found[f"{kl:g}: harmful"] = e.verdict == "harmful"
            found[f"{kl:g}: within margin"] = e.verdict == "within margin"
        for kl in (0.012, 0.02):
            (_, e), _ = _forced(np.random.default_rng([21, seed]), kl, Margins(), skewed=False)
            ((_, e),) = decide([("m", e)])
            found[f"{kl:g}: within margin, were it by t alone"] = e.verdict == "within margin"
        return found

    bounds = {
        "0.012: within margin, were it by t alone": (0.0, 1.0), "0.02: within margin, were it by t alone": (0.0, 1.0),
        "0.005: harmful": (0.0, 0.01), "0.005: within margin": (0.95, 1.0), "0.012: harmful": (0.0, 0.01),
        "0.012: within margin": (0.9, 1.0), "0.02: harmful": (0.0, SIZE[1]), "0.02: within margin": (0.0, 0.07),
        "0.07: harmful": (0.95, 1.0), "0.07: within margin": (0.0, 0.0),
    }  # fmt: skip
    about = "KL of 16 documents, margin .02 (skewed: Hall's correction on the safe side)"
    return _bounded(about, bounds, (draw(seed) for seed in range(DRAWS // thin)))


def _read(moved: np.ndarray) -> dict[tuple[str, str], Forced]:
    """Reference answers of one token each, whose log probability moved so much."""
    names = [f"n{i}" for i in range(len(moved))]
    task = "reference:needle"
    return {
        (task, name): Forced("m", task=task, sample=name, logs=[float(x) - 1])
        for name, x in zip(names, moved, strict=True)
    }


def answers(thin: int = 1) -> list[Row]:
    """Log probabilities of reference answers, whose noise has a spread of .05 nats: methods that make all of them a
    little less likely, and methods that lose some altogether, 2.3 nats each, as of a digit that is guessed."""

    def verdict(rng: np.random.Generator, n: int, all_by: float, lost: float, margin: float = 0.1) -> str:
        moved = rng.normal(-all_by, 0.05, n) - 2.3 * (rng.random(n) < lost)
        worst = _read(np.full(n, -2.3))  # of another method, as there is one in most runs
        arms = {name: (own, _read(np.zeros(n))) for name, own in (("m", _read(moved)), ("other", worst))}
        (_, e), _ = forcing.references(arms, replace(Margins(), reference=margin), n, draws=200)
        ((_, e),) = decide([("m", e)])
        return str(e.verdict)

    none = "64 answers, no effect, margin 0: harmful"

    def size(seed: int) -> dict[str, bool]:
        return {none: verdict(np.random.default_rng([21, seed]), 64, 0, 0, 0) == "harmful"}

    def draw(seed: int) -> dict[str, bool]:
        rng, found = np.random.default_rng([19, seed]), {}
        found["64 answers, .15 nats less likely: harmful"] = verdict(rng, 64, 0.15, 0) == "harmful"
        found["64 answers, one in five lost: harmful"] = verdict(rng, 64, 0, 0.2) == "harmful"
        for n in (64, 160, 400):
            found[f"{n} answers, one in twenty lost: within margin"] = verdict(rng, n, 0, 0.05) == "within margin"
        found["160 answers, no effect: within margin"] = verdict(rng, 160, 0, 0) == "within margin"
        return found

    bounds = {
        "64 answers, .15 nats less likely: harmful": (0.95, 1.0),
        "64 answers, one in five lost: harmful": (0.8, 1.0), "160 answers, no effect: within margin": (0.95, 1.0),
        **{f"{n} answers, one in twenty lost: within margin": (0.0, 0.07) for n in (64, 160, 400)},
    }  # fmt: skip
    about = "reference answers, margin .1 nats a token (one in twenty lost is .115)"
    sized = _bounded(about, {none: SIZE}, (size(seed) for seed in range(DRAWS // thin)))
    return sized + _bounded(about, bounds, (draw(seed) for seed in range(500 // thin)))


def deciding(thin: int = 1) -> list[Row]:
    """All methods of a preset without an effect, with the spreads that our published runs show: how many are cleared by
    what decides there?"""
    rows, known = [], shipped()
    for name, raw in PRESETS.items():
        preset = Preset.of(name, raw, "")
        decides = [x for x in preset.effects(known) if x not in preset.margins.veto]
        damage = [x for x in decides if x != SPEED]
        cleared: dict[str, list[float]] = {"no damage": [], "speed": []}
        draws = 200 // thin
        for seed in range(draws):
            rng = np.random.default_rng([20, seed])
            methods = [f"m{at}" for at in range(preset.methods)]
            found = decide([(m, _null(rng, x, preset, known)) for m in methods for x in decides], preset.margins)
            said = {m: overall([e for who, e in found if who == m]) for m in methods}
            fast = [e.verdict == "within margin" for _, e in found if e.endpoint == SPEED]
            cleared["no damage"].append(sum(x == "within margin" for x in said.values()) / len(said))
            cleared["speed"].append(sum(fast) / len(fast))
        about = "methods without an effect that a preset clears"
        what = {"no damage": " and ".join(damage), "speed": "speed"}
        rows += [
            Row(about, f"{name}: {what[key]}", sum(x) / len(x), 0.8, 1.0, draws * preset.methods)
            for key, x in cleared.items()
        ]
    return rows


def _null(rng: np.random.Generator, name: str, preset: Preset, known: Shipped) -> Any:
    """An endpoint of a method that does nothing, measured once more."""
    n, spread, margin = preset.effects(known)[name].n, known.spreads[name], getattr(preset.margins, name)
    if name == "quality":
        moved = rng.choice([-1.0, 0.0, 1.0], n, p=[spread.share / 2, 1 - spread.share, spread.share / 2])
        return endpoint(name, _once(Ratio(moved, paired=True, bounds=(-1, 1))), margin, -1, n)
    if name == "kl":  # as far from 0 as those that we measured: it varies by half
        return endpoint(name, _once(Ratio(2 * spread.spread * rng.gamma(4, 0.25, n), skewed=True)), margin, 1, n)
    if name == "reference":
        moved, room = rng.normal(0, spread.spread, n), spread.room
        ratio = Ratio(moved, large=np.abs(moved) >= room / 2, room=(room, room), skewed=True)
        return endpoint(name, _once(ratio), margin, -1, n)
    if name == SPEED:
        return endpoint(name, log_ratio_interval(rng.normal(0, spread.spread, n)), margin, -1, n, ratio=True)
    seen = _once(Ratio(rng.normal(0, spread.spread, n), skewed=True))
    found = Estimate.of(math.exp(seen.mean), seen.se, seen.df, log=True, skew=seen.skew)
    return endpoint(name, found, margin, 1, n, ratio=True)


def _once(ratio: Ratio) -> Estimate:
    return estimate(Design.alone(len(ratio.top)), [ratio], draws=200)[0]


GARBAGE: dict[str, Callable[[list[str], int, random.Random], str]] = {
    "empty": lambda said, at, rng: "",
    "loops from a third on": lambda said, at, rng: said[at][: len(said[at]) // 3] + said[at][:60] * 20,
    "letters in random order": lambda said, at, rng: "".join(rng.sample(said[at], len(said[at]))),
    "words in random order": lambda said, at, rng: " ".join(rng.sample(words := said[at].split(), len(words))),
    "answers to other prompts": lambda said, at, rng: said[at - 1],
}
"""What becomes of an answer."""


def garbage(thin: int = 1) -> list[Row]:
    """Our own noise, sane answers of a small model at temperature 1 asked up to four times, is not called broken, in
    whatever roles; garbage planted into it is. What is garbage only beside other answers is told by all of them, not
    by a third."""
    asked, _ = align(list(arms(read(NOISE), "length").values()))

    def called(seed: int, n: int, kind: str = "", share: float = 0.0, greedy: bool = False) -> bool:
        rng = random.Random(f"{kind} {seed}")
        at = rng.sample(range(len(asked[0])), n)
        base, variant, control = (arm.take(at) for arm in rng.sample(asked, 3))
        if greedy:  # a server that answers the same once more, but for a letter
            control = replace(base, text=[f"{base.text[0]}.", *base.text[1:]])
        text = [str(t) for t in variant.text]
        for place in rng.sample(range(n), round(share * n)):
            text[place] = GARBAGE[kind]([str(t) for t in variant.text], place, rng)
        return check(base, replace(variant, text=text), control).broken

    def row(figure: str, low: float, high: float, draws: int, *what: Any) -> Row:
        seeds = range(-(-draws // thin))
        return Row(
            "called BROKEN", figure, sum(called(seed, *what) for seed in seeds) / len(seeds), low, high, len(seeds)
        )

    rows = [row(f"sane, {n} chats", 0.0, 0.03, 100, n) for n in (12, 24, 48)]  # at 1 %, 3 of 100 are hardly exceeded
    rows.append(row("sane, 80 chats, beside a control of the same letters", 0.0, 0.03, 50, 80, "", 0.0, True))
    for kind in GARBAGE:
        by_itself = kind.startswith(("empty", "loops", "letters"))
        n, share = (48, 1 / 3) if by_itself else (32, 1.0)
        rows.append(row(f"{kind}: {'a third' if by_itself else 'all'} of {n}", 0.8, 1.0, 25, n, kind, share))
    return rows


WORLDS = (
    null, family, effect, few, scrambler, power, selection, blocks, timing, shuffled, documents, rare, capped,
    repeated, truncated, sharp, failing, forced, answers, deciding, garbage,
)  # fmt: skip
DOCUMENT = Path(__file__).parents[2] / "docs" / "statistics.md"
MARK = "<!-- what follows is written by: python -m suites.checks.simulations -->"


def tables(rows: Iterable[Row]) -> str:
    """The rows as markdown, one table a promise."""
    lines = []
    for about, some in itertools.groupby(rows, key=lambda row: row.about):
        lines += ["", f"**{about}**", "", "| figure | seen | must lie in | draws |", "|---|---:|---:|---:|"]
        lines += [f"| {r.figure} | {r.seen:.1%} | {r.low:.1%}–{r.high:.1%} | {r.draws:,} |" for r in some]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every simulation and rewrite the document's tables."""
    rows = [row for world in WORLDS for row in world()]
    text, _, _ = DOCUMENT.read_text().partition(MARK)
    DOCUMENT.write_text(text + MARK + "\n" + tables(rows))
    broken = [row for row in rows if not row.holds()]
    print(f"{len(rows)} promises, {len(broken)} broken", *broken, sep="\n")


if __name__ == "__main__":
    main()
