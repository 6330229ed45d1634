"""Whether what servers seemed to do can be believed: every check of every arm ends here, in one of three states."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import get_args

from kvsuite.analysis.serving import told
from kvsuite.analysis.table import State as Lost
from kvsuite.analysis.validity import answers, instruments, servers
from kvsuite.analysis.validity.outcome import NOTHING, Kind, Outcome, plain
from kvsuite.records import Run, Served

CHECKS: tuple[Callable[[Run], Iterator[Outcome]], ...] = (
    answers.baseline, answers.garbled, answers.prompts, instruments.tokens, instruments.times, instruments.repeats,
    answers.under_pressure, answers.tool_calls, servers.failures, servers.servers,
)  # fmt: skip
"""Of a comparison of servers."""


@lru_cache(maxsize=2)
def outcomes(run: Run) -> tuple[Outcome, ...]:
    """All that is checked of a comparison of servers, the baseline first; of any other run, what the baseline
    scores."""
    served = any(isinstance(r, Served) for r in run.records) or told(run)
    found = [outcome for check in (answers.scores, *(CHECKS if served else ())) for outcome in check(run)]
    return tuple(sorted(found, key=lambda o: (o.arm != run.baseline, _rank(o))))


def _rank(outcome: Outcome) -> int:
    kinds = get_args(Kind)
    return len(kinds) if outcome.kind is None else kinds.index(outcome.kind)


def left_out(run: Run) -> dict[str, Lost]:
    """Arms that have no figures, and why: their answers are none, or to other prompts."""
    return {o.arm: o.lost for o in outcomes(run) if o.lost != "ok" and not plain(run, o.arm)}


def withheld(run: Run) -> dict[str, frozenset[str]]:
    """By variant, the endpoints that nothing good may be said of."""
    every = NOTHING.union(*(o.hides for o in outcomes(run) if o.arm == run.baseline))
    found = {arm: every for arm in run.facts.get("methods", ()) if every and not plain(run, arm)}
    for o in outcomes(run):
        if not plain(run, o.arm):
            found[o.arm] = found.get(o.arm, every) | o.hides
    return found


def unranked(run: Run) -> set[str]:
    """Variants whose speed is beside no other's."""
    return {*left_out(run), *(arm for arm, hidden in withheld(run).items() if "speed" in hidden)}
