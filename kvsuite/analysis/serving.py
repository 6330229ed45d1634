"""Arms that servers answered: speed by blocks, what is garbled, and whether compression ran."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from kvsuite.analysis import pools
from kvsuite.analysis.garbled import Check, check, senseless
from kvsuite.analysis.speed import Goodput, goodput, p95
from kvsuite.analysis.stats import Estimate
from kvsuite.analysis.trimmed import log_ratio_interval
from kvsuite.columns import Arm, ArmBuilder, Key, align
from kvsuite.readers.base import Load
from kvsuite.records import Probe, Run, Scored, Served

FIGURES = ("rate", "ttft", "tpot", "e2e")
"""Tokens per second of a leg; median seconds to the first token, per token after it, and to the end of an answer. (A
leg has ``itl95`` besides: the p95 of the seconds between two chunks.)"""


@dataclass(frozen=True)
class ServedRow:
    """One arm in one cell. A ratio over 1 is faster than the baseline."""

    method: str
    cell: str
    n: int
    failed: int
    error: str
    blocks: int = 0
    figures: Mapping[str, float] = field(default_factory=dict)
    """Median leg, by `FIGURES` and ``itl95``."""
    ratios: Mapping[str, Estimate] = field(default_factory=dict)
    """Of blocks in which both arms answered everything in both legs: t-interval of the log ratios."""
    tokens: float = math.nan
    """Mean tokens of an answer."""
    capped: int = 0
    """Answers that their cap ended."""


def timed(run: Run) -> list[Served]:
    """Answers that were made to be timed."""
    return [r for r in run.records if isinstance(r, Served) and r.evaluation == "throughput"]


def as_load(found: Sequence[Served], source: str) -> Load:
    """Answers of one load as a load test; its ITL are the gaps of all answers."""
    good = [r for r in found if r.status == "ok" and r.tpot is not None]
    return Load(
        source,
        ttft=np.array([r.ttft or math.nan for r in good] or [math.inf]),  # where none came, it takes forever
        itl=np.array([gap for r in good for gap in r.gaps] or [math.inf]),
        e2e=np.array([r.e2e for r in good]),
        prompt_tokens=np.array([float(r.prompt_tokens) for r in good]),
        tokens=np.array([float(r.count) for r in good]),
        start=np.array([r.start for r in good]),
        failed=sum(r.status != "ok" for r in found),
        duration=max((r.start + r.e2e for r in good), default=0.0) - min((r.start for r in good), default=0.0),
        setting={},
    )


def goodputs(run: Run) -> dict[str, Goodput]:
    """What every arm can be offered, from the load tests that looked for it."""
    targets = run.facts["settings"].get("goodput")
    if not targets:
        return {}
    tests: dict[tuple[str, str, int, int], list[Served]] = {}
    for r in run.records:
        if isinstance(r, Served) and r.evaluation == "goodput":
            tests.setdefault((r.method, r.cell, r.block, r.test), []).append(r)
    arms: dict[str, list[tuple[float, Load]]] = {}
    for (method, cell, *_), found in tests.items():
        rate = float(cell.removeprefix("poisson:").split()[0])
        arms.setdefault(method, []).append((rate, as_load(found, cell)))
    return {method: goodput(found, *targets) for method, found in arms.items()}


def served_rows(run: Run) -> list[ServedRow]:
    """One row per cell and arm, both in order of appearance. A leg in which a request failed has no figures: what is
    missing would look fast."""
    grouped = _by_cell(run)
    legs = {key: _legs(found) for key, found in grouped.items()}
    cells = list(dict.fromkeys(cell for cell, _ in grouped))
    ordered = sorted(grouped, key=lambda key: cells.index(key[0]))
    return [_row(*key, grouped[key], legs, run.baseline) for key in ordered]


def token_speeds(run: Run) -> dict[tuple[str, str], list[float]]:
    """By cell and arm, a logarithm per block: how many times as fast as the baseline it was per token, the baseline
    itself in tokens a second."""
    legs = {key: _legs(found) for key, found in _by_cell(run).items()}
    found = {}
    for (cell, method), mine in legs.items():
        ratios = _log_ratios(mine, legs.get((cell, run.baseline), {}), "tpot")
        itself = [-_mean_log(block, "tpot") for block in mine.values() if len(block) == 2]
        logs = itself if method == run.baseline else [-x for x in ratios.values()]
        found[cell, method] = [x for x in logs if math.isfinite(x)]
    return found


def blocks(run: Run) -> dict[str, set[int]]:
    """By cell, the blocks that any arm began."""
    found: dict[str, set[int]] = {}
    for r in timed(run):
        found.setdefault(r.cell, set()).add(r.block)
    return found


def _by_cell(run: Run) -> dict[tuple[str, str], list[Served]]:
    grouped: dict[tuple[str, str], list[Served]] = {}
    for r in timed(run):
        grouped.setdefault((r.cell, r.method), []).append(r)
    return grouped


Legs = Mapping[int, list[dict[str, float]]]
"""By block, the figures of every whole leg."""


def _log_ratios(mine: Legs, theirs: Legs, name: str) -> dict[int, float]:
    """By block in which both have both legs."""
    both = [block for block in mine if len(mine[block]) == 2 == len(theirs.get(block, ()))]
    return {block: _mean_log(mine[block], name) - _mean_log(theirs[block], name) for block in both}


def _row(cell: str, method: str, found: Sequence[Served], legs: Mapping[tuple[str, str], Legs], base: str) -> ServedRow:
    errors = [r.error for r in found if r.status != "ok"]
    counts = (method, cell, len(found), len(errors), errors[0] if errors else "")
    mine, theirs = legs[cell, method], legs.get((cell, base), {})
    each = [leg for block in mine.values() for leg in block]
    if not each:
        return ServedRow(*counts)
    ratios, blocks = {}, 0
    for name in FIGURES:
        found_logs = _log_ratios(mine, theirs, name)
        blocks = len(found_logs)
        logs = [x if name == "rate" else -x for x in found_logs.values() if math.isfinite(x)]
        if logs:
            ratios[name] = log_ratio_interval(logs)
    figures = {name: float(np.nanmedian(column)) for name in (*FIGURES, "itl95") if (column := _known(each, name))}
    good = [r for r in found if r.status == "ok"]
    capped = sum(r.finish == "length" for r in good)
    return ServedRow(*counts, blocks, figures, ratios, statistics.fmean(r.count for r in good), capped)


def _known(legs: Sequence[Mapping[str, float]], name: str) -> list[float]:
    return [leg[name] for leg in legs if math.isfinite(leg[name])]


def _legs(found: Iterable[Served]) -> dict[int, list[dict[str, float]]]:
    grouped: dict[tuple[int, int], list[Served]] = {}
    for r in found:
        grouped.setdefault((r.block, r.leg), []).append(r)
    blocks: dict[int, list[dict[str, float]]] = {}
    for (block, _), replies in grouped.items():
        if all(r.status == "ok" for r in replies):
            blocks.setdefault(block, []).append(_figures(replies))
    return blocks


def _figures(replies: Sequence[Served]) -> dict[str, float]:
    took = max(r.start + r.e2e for r in replies) - min(r.start for r in replies)
    between, first = [r.tpot for r in replies if r.tpot], [r.ttft for r in replies if r.ttft]
    gaps = [gap for r in replies for gap in r.gaps]
    return {
        "rate": sum(r.count for r in replies) / took if took > 0 else math.nan,
        "ttft": statistics.median(first) if first else math.nan,
        "itl95": p95(np.array(gaps)) if gaps else math.nan,
        "tpot": statistics.median(between) if between else math.nan,
        "e2e": statistics.median(r.e2e for r in replies),
    }


def _mean_log(legs: Sequence[Mapping[str, float]], name: str) -> float:
    return statistics.fmean(math.log(leg[name]) if leg[name] > 0 else math.nan for leg in legs)


@lru_cache(maxsize=2)
def sense(run: Run) -> tuple[int, int]:
    """How many of the prompts that the baseline answered have answers without sense, and of how many that could be
    told."""
    base = _said(run).get(run.baseline)
    return senseless(base) if base is not None else (0, 0)


@lru_cache(maxsize=2)
def checks(run: Run) -> Mapping[str, Check]:
    """Whether an arm's answers are still answers: everything it said against what the baseline said to the same,
    beyond the A/A arm. An A/A arm that answered less than half of it is no control."""
    arms = {name: arm for name, arm in _said(run).items() if len(arm)}
    base = arms.get(run.baseline)
    again = next((name for name in arms if run.is_control(name)), "")
    control, scored, found = arms.get(again), _scored(run), {}
    for name, arm in arms.items():
        if base is None or name == run.baseline or run.is_control(name):
            continue
        shared = set(base.keys) & set(arm.keys)
        both = [base, arm]
        if control is not None and 2 * len(shared & set(control.keys)) >= len(shared):
            both.append(control)
        if shared:
            aligned, _ = align(both, allow_missing=True)
            likely = [scored.get(arm, {}) for arm in (run.baseline, name, again)] if name in scored else []
            found[name] = check(aligned[0], aligned[1], aligned[2] if len(aligned) > 2 else None, likely)
    return found


def _scored(run: Run) -> dict[str, dict[Key, list[float]]]:
    """By arm and sample of a task, how likely the baseline finds every token of the answer."""
    found: dict[str, dict[Key, list[float]]] = {}
    for r in run.records:
        if isinstance(r, Scored) and r.status == "ok":
            found.setdefault(r.method, {})[r.task, r.sample] = r.logs
    return found


@lru_cache(maxsize=2)
def _said(run: Run) -> dict[str, Arm]:
    found = [r for r in run.records if isinstance(r, Served)]
    legs: dict[tuple[str, int], set[int]] = {}
    for r in found:
        legs.setdefault((r.method, r.block), set()).add(r.leg)
    gathered: dict[str, ArmBuilder] = {}
    for r in (r for r in found if r.status == "ok"):
        half = sorted(legs[r.method, r.block]).index(r.leg)
        load = "goodput" if r.evaluation == "goodput" else r.cell  # its rates are each arm's own, its prompts are not
        where = f"test {r.test}" if load == "goodput" else f"half {half}"
        dataset, sample = (load, f"{r.sample} in {where} of block {r.block}") if load else (r.task, r.sample)
        said = "\n".join(filter(None, (r.reasoning, r.text, r.calls)))
        gather = gathered.setdefault(r.method, ArmBuilder(f"{run.folder}#{r.method}"))
        known: dict[str, Any] = {"tokens": r.count, "cap": r.cap, "capped": r.finish == "length", "score": r.score}
        cluster = r.cluster or f"{r.sample} {r.block}"
        gather.add(run.folder, dataset, sample, text=said, cluster=cluster, **known)
    return {method: gather.arm() for method, gather in gathered.items()}


@dataclass(frozen=True)
class ServerReport:
    """What an arm's server said of itself."""

    method: str
    profile: str
    command: str
    facts: Mapping[str, Any]
    """Of its last leg; ``kv_bytes_per_token`` of a line where the server itself does not say it."""
    counters: Mapping[str, float]
    """Summed over its legs."""
    failures: tuple[str, ...]
    proof: str = ""
    """Why compression is taken to have run; empty where that is not shown. Nothing to be shown of a baseline."""
    apart: Mapping[str, tuple[str | None, str | None]] = field(default_factory=dict)
    """By name, features that it says it has otherwise than the baseline's server says: what each says of them."""
    warm: float = 0.0
    """Of the tokens of prompts that were to be cold, the share that the server had in its prefix cache."""
    perhaps_warm: bool = False
    """Whether nothing kept them from it, and nothing says how many it had."""
    line: pools.Line | None = None
    """What its pools take, where the run has two sizes of them."""


@lru_cache(maxsize=2)
def told(run: Run) -> list[ServerReport]:
    """One entry per arm."""
    probes: dict[str, list[Probe]] = {}
    for r in run.records:
        if isinstance(r, Probe):
            probes.setdefault(r.method, []).append(r)
    lines, found = pools.lines(p for mine in probes.values() for p in mine), []
    warm = _warm(run)
    if run.baseline not in probes:
        return []
    said = {method: _facts(mine, lines.get(method)) for method, mine in probes.items()}
    base = said[run.baseline]
    for method, mine in probes.items():
        facts, plain = said[method], method == run.baseline or run.is_control(method)
        last = next((p for p in reversed(mine) if p.status == "ok"), mine[-1])
        sums: dict[str, float] = {}
        for p in mine:
            for name, value in p.counters.items():
                sums[name] = max(sums.get(name, 0.0), value) if name == "late" else sums.get(name, 0.0) + value
        failures = tuple(dict.fromkeys(p.error for p in mine if p.status != "ok"))
        proof, apart = ("", {}) if plain or not facts else (proven(facts, base), differing(facts, base))
        off = str(facts.get("features", {}).get("prefix caching", "")).lower() in OFF
        perhaps = bool(sums.get("perhaps_warm")) and method not in warm and not off
        share = warm.get(method, 0.0)
        found.append(
            ServerReport(
                method, last.profile, last.command, facts, sums, failures, proof, apart, share, perhaps,
                lines.get(method),
            )
        )  # fmt: skip
    return found


OFF = ("false", "off", "disabled", "no", "0")


def _warm(run: Run) -> dict[str, float]:
    """By arm, of the prompts' tokens in loads that were to be cold, the share found in the prefix cache: as the server
    says it request by request, else as it counted in legs that had nothing but such loads."""
    settings = run.facts["settings"]
    if settings.get("prefix") == "warm" or settings.get("workload") == "multi-turn":  # later turns find the earlier
        return {}
    sums: dict[str, list[float]] = {}
    for r in timed(run):
        if r.cached_tokens is not None:
            both = sums.setdefault(r.method, [0.0, 0.0])
            both[0], both[1] = both[0] + r.cached_tokens, both[1] + r.prompt_tokens
    said = set(sums)
    loads = {r.leg for r in timed(run)} - {r.leg for r in run.records if isinstance(r, Served) and r.task}
    for p in (p for p in run.records if isinstance(p, Probe) and p.leg in loads and p.method not in said):
        if "prefix_hits" in p.counters and p.counters.get("prefix_queries"):
            both = sums.setdefault(p.method, [0.0, 0.0])
            both[0], both[1] = both[0] + p.counters["prefix_hits"], both[1] + p.counters["prefix_queries"]
    return {method: cached / asked for method, (cached, asked) in sums.items() if asked}


def _facts(probes: Sequence[Probe], line: pools.Line | None) -> Mapping[str, Any]:
    facts = next((p.facts for p in reversed(probes) if p.status == "ok"), {})
    return {"kv_bytes_per_token": line.slope} | facts if line else facts


ENOUGH = 1.05
"""Less than this much more room is no compression: block sizes round."""


def proven(facts: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """What shows that a server stores fewer bytes for a token than the baseline's; empty where nothing does. That it
    accepted an option shows nothing."""
    if facts.get("compressed") is not True:
        return ""
    mine, theirs = (_per_token(f) for f in (facts, base))
    if mine and theirs and theirs / mine >= ENOUGH:
        said = all(f.get("kv_bytes_per_token") for f in (facts, base))
        how = "" if said else ", derived: the bytes of a pool over the tokens that fit into it"
        return f"{mine:,.0f} bytes a token, the baseline {theirs:,.0f}{how}"
    tokens, before = (None if f.get("blocks_set") else f.get("kv_tokens") for f in (facts, base))
    if mine is None and tokens and before and tokens / before >= ENOUGH:  # in what memory, it does not say
        return f"room for {tokens:,} tokens, the baseline's server for {before:,}"
    return str(facts.get("proof", ""))


def _per_token(facts: Mapping[str, Any]) -> float | None:
    if given := facts.get("kv_bytes_per_token"):
        return float(given)
    tokens, size = pools.pool(facts) or (0, 0)
    return size / tokens if tokens else None


def differing(facts: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """By name, features of which a server and the baseline's do not say the same; None: it does not say."""
    mine, theirs = facts.get("features", {}), base.get("features", {})
    both = {name: (mine.get(name), theirs.get(name)) for name in dict.fromkeys([*theirs, *mine])}
    return {name: said for name, said in both.items() if said[0] != said[1]}


def stored(run: Run) -> dict[str, float]:
    """By arm, the bytes that its server stores for a token as a part of the baseline's; arms that say so alone."""
    found = {server.method: _per_token(server.facts) for server in told(run)}
    base = found.pop(run.baseline, None)
    return {arm: own / base for arm, own in found.items() if own and base}
