"""What a full pool does to answers (``--kv-workload pressure``): the same prompts, a few at a time and all at once."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from kvsuite.analysis.serving import timed, told
from kvsuite.analysis.stats import holm
from kvsuite.records import Run, Served

Place = tuple[str, int, str]
"""Load, block and sample: one prompt."""


@dataclass(frozen=True)
class Pressed:
    """One arm."""

    arm: str
    asked: int
    """Requests at once."""
    room: int | None
    """Tokens in its pool, as its server says."""
    size: float
    """Tokens of a prompt with its answer, mean."""
    preempted: int | None
    """Requests that lost their place in the pool while all were asked at once; None where the server does not count."""
    n: int
    """Prompts that were answered both ways."""
    changed: int
    """Of these, those whose answer all at once is another than a few at a time."""
    adjusted: float = 1.0
    """p of as many by noise as the baseline's own: exact, one-sided, prompts that only one of both changed (McNemar);
    after Holm over the variants."""


@lru_cache(maxsize=2)
def pressed(run: Run) -> tuple[Pressed, ...]:
    """Every arm that answered both ways; nothing for any other workload."""
    if run.facts["settings"].get("workload") != "pressure":
        return ()
    servers = {s.method: s for s in told(run)}
    arms: dict[str, list[Served]] = {}
    for r in timed(run):
        if r.status == "ok":
            arms.setdefault(r.method, []).append(r)
    most = max((_width(r) for r in timed(run)), default=0)
    changed = {arm: _changed(found, most) for arm, found in arms.items()}
    p = beyond(run, changed)
    found = []
    for arm, each in changed.items():
        server = servers.get(arm)
        counts = [
            n
            for key, n in (server.counters if server else {}).items()
            if key.startswith(f"preemptions, closed:{most} ")
        ]
        room = server.facts.get("kv_tokens") if server else None
        size = statistics.fmean(r.prompt_tokens + r.count for r in arms[arm])
        preempted = round(sum(counts)) if counts else None
        found.append(Pressed(arm, most, room, size, preempted, len(each), sum(each.values()), p.get(arm, 1.0)))
    return tuple(found)


def _width(r: Served) -> int:
    return int(r.cell.partition(" ")[0].partition(":")[2])


def _changed(found: list[Served], most: int) -> dict[Place, bool]:
    """By prompt, whether an answer all at once is another than in the same leg a few at a time."""
    both: dict[tuple[Place, int], dict[bool, object]] = {}
    for r in found:
        place = r.cell.partition(" ")[2], r.block, r.sample
        both.setdefault((place, r.leg), {})[_width(r) == most] = r.output_key
    changed: dict[Place, bool] = {}
    for (place, _), keys in both.items():
        if len(keys) == 2:
            changed[place] = changed.get(place, False) or keys[True] != keys[False]
    return changed


def beyond(run: Run, shown: Mapping[str, Mapping[Place, bool]]) -> dict[str, float]:
    """By variant, the p that no more of its prompts show something than of the baseline's: exact and one-sided, from
    those on which one of both alone shows it (McNemar), after Holm over the variants."""
    from scipy.stats import binom

    base, found = shown.get(run.baseline, {}), {}
    for arm, mine in shown.items():
        if arm == run.baseline or run.is_control(arm):
            continue
        apart = [mine[place] for place in mine.keys() & base.keys() if mine[place] != base[place]]
        found[arm] = float(binom.sf(sum(apart) - 1, len(apart), 0.5))
    return dict(zip(found, holm(list(found.values())), strict=True)) if found else {}
