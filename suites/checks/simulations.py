"""Does the analysis keep its promises? Worlds whose truth is known, drawn thousands of times.

``python -m suites.checks.simulations`` runs all of them (minutes) and rewrites the tables of docs/statistics.md;
test_simulations.py asserts the same bounds. Every world is seeded: the same numbers come out every time. A world may be
asked for every ``thin``-th of its draws; its bounds are then wider.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kvsuite.analysis.benchmark import score, select
from kvsuite.analysis.effects import Part, compare
from kvsuite.analysis.garbled import check
from kvsuite.analysis.predictors import held_out
from kvsuite.analysis.runs import arms, noise
from kvsuite.analysis.speed import blocks_needed
from kvsuite.analysis.stats import LEVEL, Estimate, log_ratio_interval, mean_interval
from kvsuite.analysis.verdict import chances
from kvsuite.columns import Arm, align, stack
from kvsuite.margins import Margins
from kvsuite.records import read

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
        ones, files = np.ones(4 * n), dict.fromkeys(("rouge", "exact", "f1", "count"), "-")
        known = {"score": score.astype(float), "tokens": np.minimum(tokens, CAP), "cap": CAP * ones, "seconds": ones}
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


EXACT = {"broken", "net harm", "churn", "longer", "shorter", "cap hits"}
"""Figures whose p is of counts: it cannot reach 5 %, only stay below."""


def null(thin: int = 1) -> list[Row]:
    """Three methods that do nothing: how often is something found?"""

    def draw(seed: int) -> dict[str, bool]:
        rows = compare([World().part(np.random.default_rng([1, seed]), methods=3)], draws=RESAMPLES, seed=seed)
        first = rows[0]
        found = {f"p of {e.endpoint}": e.p < LEVEL for e in first.effects}
        found |= {f"p of {f.name}": f.p < LEVEL for f in first.findings if f.p is not None}
        found["any of nine after Holm"] = any(e.adjusted < LEVEL for row in rows for e in row.effects)
        found["any found after Benjamini–Hochberg"] = any(
            f.adjusted < LEVEL for row in rows for f in row.findings if f.p is not None
        )
        return found | {f"interval of {e.endpoint}": not _holds(e.estimate, float(e.ratio)) for e in first.effects}

    shares = _shares(draw(seed) for seed in range(DRAWS // thin))
    about = "size at nominal 5 %, no effect"
    found = []
    for name, (share, draws) in shares.items():
        upper_only = name.startswith("any") or name.removeprefix("p of ") in EXACT
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
        (row,) = compare([Part(arms[0], {"m": arms[1]}, arms[2])], draws=200, seed=seed)
        net = row.finding("net harm")
        return {"broken beyond noise": row.effect("broken").p < LEVEL, "net harm": net.p < LEVEL}

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
        predicted = chances(seen.estimate, seen.n, planned, effect, margin, ratio)[verdict]

        def draw(seed: int, effect: float = effect, verdict: str = verdict) -> bool:
            one, other = _redrawn(np.random.default_rng([6, seed]), base, control, planned)
            worse = (
                replace(other, tokens=other.tokens * (1 + effect))
                if ratio
                else replace(other, score=other.score - effect)
            )
            (row,) = compare([Part(one, {"": worse})], margins, draws=RESAMPLES, seed=seed)
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
    """A predictor fitted to shuffled labels is as good as the null, which ignores all features."""
    rng = np.random.default_rng(9)
    x = rng.normal(0, 1, (200, 2))
    y = np.exp(3 + x[:, 0] + rng.normal(0, 0.4, 200))
    groups = [f"g{i // 5}" for i in range(200)]

    def line(features: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        found = np.polynomial.Polynomial.fit(features[:, 0], np.log(labels), 1)
        return lambda new: np.exp(found(new[:, 0]))

    better = [held_out(x, rng.permutation(y), groups, line, draws=500, seed=seed).better for seed in range(400 // thin)]
    about = "a predictor is called better than the null"
    return [
        Row(about, "shuffled labels", sum(better) / len(better), 0.0, SIZE[1], len(better)),
        Row(about, "true labels", float(held_out(x, y, groups, line, draws=500).better), 1.0, 1.0, 1),
    ]


def _arm(names: list[tuple[str, str]], score: np.ndarray | None = None, tokens: np.ndarray | None = None) -> Arm:
    """An arm of one column; ``names`` are the dataset and the document of every sample."""
    n, nothing = len(names), np.full(len(names), np.nan)
    given = [nothing if x is None else x for x in (score, tokens)]
    keys = [(d, f"{i}") for i, (d, _) in enumerate(names)]
    documents = [document for _, document in names]
    flat = np.full(n, float(CAP)), np.zeros(n), np.ones(n)
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

        (row,) = compare([Part(arm(), {"m": arm()}, arm())], draws=RESAMPLES, seed=seed)
        found = {f"p of {e.endpoint}": e.p < LEVEL for e in row.effects}
        found |= {f"p of {f.name}": f.p < LEVEL for f in row.findings}
        base = rng.uniform(0.3, 0.7, 250)
        moved = np.append(np.full(200, rng.normal(0, 0.05)), rng.normal(0, 0.05, 50))
        (row,) = compare([Part(_arm(lone, base), {"m": _arm(lone, base + moved)})], draws=RESAMPLES, seed=seed)
        return found | {"interval of quality, one dataset being one document": not _holds(row.effects[0].estimate, 0)}

    shares = _shares(draw(seed) for seed in range(500 // thin))
    about = "errors at nominal 5 %, samples of documents, no effect"
    return [Row(about, name, share, 0.0, 0.07, n) for name, (share, n) in shares.items()]  # 500 draws


def rare(thin: int = 1) -> list[Row]:
    """Every answer differs by a token, a few loop to the cap: true costs of 1.17, 1.08 and 1.03 must not look safe."""

    def draw(seed: int, n: int, share: float) -> bool:
        rng = np.random.default_rng([11, seed])
        names = [("d", str(i)) for i in range(n)]
        base = np.round(np.clip(rng.lognormal(3.9, 0.5, n), 5, 500))
        tokens = np.where(rng.random(n) < share, CAP, base + rng.choice([-1, 1], n))
        (row,) = compare([Part(_arm(names, tokens=base), {"m": _arm(names, tokens=tokens)})], draws=200, seed=seed)
        return row.verdict == "within margin"

    found, draws = [], 300 // thin
    for n, share in ((80, 0.01), (400, 0.005), (1500, 0.002)):
        seen = sum(draw(seed, n, share) for seed in range(draws)) / draws
        name = f"{share:.1%} of {n:,} answers loop"
        found.append(Row("called within margin although a few answers loop", name, seen, 0.0, 0.05, draws))
    return found


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


WORLDS = (null, effect, few, scrambler, power, selection, blocks, shuffled, documents, rare, garbage)
DOCUMENT = Path(__file__).parents[2] / "docs" / "statistics.md"
MARK = "<!-- what follows is written by: python -m suites.checks.simulations -->"


@contextmanager
def quick() -> Iterator[None]:
    """Makes what is slow in statsmodels, a garbage collection a call, cheap meanwhile."""
    compare([World().part(np.random.default_rng(0))], draws=10)
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def tables(rows: Iterable[Row]) -> str:
    """The rows as markdown, one table a promise."""
    lines = []
    for about, some in itertools.groupby(rows, key=lambda row: row.about):
        lines += ["", f"**{about}**", "", "| figure | seen | must lie in | draws |", "|---|---:|---:|---:|"]
        lines += [f"| {r.figure} | {r.seen:.1%} | {r.low:.1%}–{r.high:.1%} | {r.draws:,} |" for r in some]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every simulation and rewrite the document's tables."""
    with quick():
        rows = [row for world in WORLDS for row in world()]
    text, _, _ = DOCUMENT.read_text().partition(MARK)
    DOCUMENT.write_text(text + MARK + "\n" + tables(rows))
    broken = [row for row in rows if not row.holds()]
    print(f"{len(rows)} promises, {len(broken)} broken", *broken, sep="\n")


if __name__ == "__main__":
    main()
