"""Whether tool calls are calls (``--kv-workload tools``): a name that there is, and arguments that are JSON of the
kinds asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from kvsuite.analysis.pressure import Place, beyond
from kvsuite.analysis.serving import timed
from kvsuite.calls import valid
from kvsuite.records import Run, Served


@dataclass(frozen=True)
class Called:
    """One arm. Prompts count once, in whatever legs they were asked; a call that its cap cut off is none. All prompts
    count: of those that the baseline answers by valid calls alone, an arm that answers otherwise could only lose."""

    arm: str
    n: int
    called: int
    """Prompts that were answered by a call, valid or not, in every leg."""
    valid: int
    """Of all, those whose calls are valid in every leg."""
    adjusted: float = 1.0
    """p of as many that are not as the baseline has: exact, one-sided (McNemar), after Holm over the variants."""


@lru_cache(maxsize=2)
def called(run: Run) -> tuple[Called, ...]:
    """Every arm; nothing for any other workload."""
    if run.facts["settings"].get("workload") != "tools":
        return ()
    arms: dict[str, dict[Place, list[Served]]] = {}
    for r in timed(run):
        if r.status == "ok":
            arms.setdefault(r.method, {}).setdefault((r.cell, r.block, r.sample), []).append(r)
    bad = {
        arm: {at: not all(valid(r.calls) for r in legs) for at, legs in found.items()} for arm, found in arms.items()
    }
    p = beyond(run, bad)
    return tuple(
        Called(
            arm, len(found), sum(all(r.calls for r in legs) for legs in found.values()),
            len(found) - sum(bad[arm].values()), p.get(arm, 1.0),
        )
        for arm, found in arms.items()
    )  # fmt: skip
