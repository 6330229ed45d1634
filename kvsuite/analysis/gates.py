"""Gates: limits that a run's figures have to keep, judged on the bounds of their intervals, never on the figures.

``quality[kivi*]>=-0.01`` holds the methods of a pattern against a limit; ``speed[int8]>=1@b8-l4096`` a timed cell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, cast

from kvsuite import disk
from kvsuite.analysis.shares import Side
from kvsuite.analysis.stats import LEVEL, Estimate, holm
from kvsuite.analysis.verdict import Effect
from kvsuite.errors import UsageError, unknown
from kvsuite.records import Run, told

State = Literal["passed", "failed", "undecided", "acknowledged"]
Policy = Literal["passes", "warns", "fails"]
POLICIES = ("passes", "warns", "fails")
BETTER = {
    "bytes": -1,
    "kl": -1,
    "perplexity": -1,
    "reference": 1,
    "quality": 1,
    "broken": -1,
    "length": 0,
    "truncation": -1,
    "speed": 1,
}
"""By endpoint, whether larger (1) or smaller (-1) is better; 0: it may be held from both sides. Numbers are as in
``--kv-margins``: shares, nats, and multiples of the baseline's (bytes, perplexity, length, speed)."""
SPELLED = re.compile(r"\s*([\w-]+)\s*\[([^\]]+)\]\s*(>=|<=)\s*([^\s@]+)\s*(?:@\s*b(\d{1,9})-l(\d{1,9})\s*)?")


@dataclass(frozen=True)
class Gate:
    """One limit."""

    text: str
    endpoint: str
    pattern: str
    """Of methods' names, with ``*`` and ``?``."""
    side: Side
    """On which failure is: below the limit (-1) or above it (1)."""
    limit: float
    cell: tuple[int, int] | None = None
    """Batch and length of a timed cell; None for the one that the verdict on speed is about."""

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Raises UsageError."""
        found = SPELLED.fullmatch(text)
        if found is None:
            raise UsageError(f"gate {text!r}: write ENDPOINT[METHOD]>=NUMBER or <=, such as speed[int8]>=1.0@b8-l4096")
        endpoint, pattern, sign, number, width, length = found.groups()
        if endpoint not in BETTER:
            raise unknown("endpoint of a gate", endpoint, BETTER)
        try:
            limit = float(number)
        except ValueError:
            limit = math.nan
        if not math.isfinite(limit):
            raise UsageError(f"gate {text!r}: {number!r} is no number")
        side: Side = -1 if sign == ">=" else 1
        if BETTER[endpoint] == side:
            right = "<=" if side < 0 else ">="
            raise UsageError(f"gate {text!r}: of {endpoint} {'less' if side < 0 else 'more'} is better; write {right}")
        if width and endpoint != "speed":
            raise UsageError(f"gate {text!r}: only speed has cells")
        cell = (int(width), int(length)) if width else None
        return cls(text.strip(), endpoint, pattern.strip(), side, limit, cell)

    def matches(self, method: str) -> bool:
        """Whether it is about a method."""
        return fnmatchcase(method, self.pattern)


@dataclass(frozen=True)
class Acknowledged:
    """A regression that is known and borne."""

    gate: str
    method: str
    reason: str
    since: date
    until: date | None = None

    def covers(self, outcome: Outcome, today: date) -> bool:
        """Whether a failure is this one, and still borne."""
        same = self.gate == outcome.gate and fnmatchcase(outcome.method, self.method)
        return same and (self.until is None or today <= self.until)


@dataclass(frozen=True)
class Outcome:
    """What one gate says of one method."""

    gate: str
    method: str
    state: State
    value: float | None = None
    bound: float | None = None
    """The end of the interval that decided, or that did not."""
    why: str = ""


@dataclass(frozen=True)
class Gates:
    """What a run is held against."""

    gates: tuple[Gate, ...] = ()
    undecided: Policy = "warns"
    """What becomes of a run with a gate that nothing decides."""
    against: Run | None = None
    """An earlier run: what is worse than there, beyond its margins, fails."""
    acknowledged: tuple[Acknowledged, ...] = ()

    @classmethod
    def of(cls, texts: Sequence[str], undecided: str = "warns", against: str = "", known: str = "") -> Gates:
        """Of gates as they are written, an earlier run's folder, and a file of what is acknowledged. Raises
        UsageError."""
        if undecided not in POLICIES:
            raise unknown("word for undecided gates", undecided, POLICIES)
        parsed = tuple(dict.fromkeys(Gate.parse(text) for text in texts))
        before = told(Path(against)) if against else None
        return cls(parsed, cast(Policy, undecided), before, acknowledged(Path(known)) if known else ())

    def failed(self, outcomes: Sequence[Outcome]) -> bool:
        """Whether a run is to end with an error."""
        lost = {"failed", "undecided"} if self.undecided == "fails" else {"failed"}
        return any(outcome.state in lost for outcome in outcomes)


def acknowledged(file: Path) -> tuple[Acknowledged, ...]:
    """The tables ``[[acknowledged]]`` of a TOML file: gate, reason, date; method and until where they are wanted.
    Raises UsageError."""
    try:
        tables = disk.toml(file).get("acknowledged", [])
    except (OSError, ValueError) as error:
        raise UsageError(f"{str(file)!r} cannot be read as TOML: {error}") from error
    if not isinstance(tables, list):
        raise UsageError(f"{file}: write [[acknowledged]] above each entry")
    return tuple(_entry(file, table) for table in tables)


def _entry(file: Path, table: Mapping[str, Any]) -> Acknowledged:
    texts, days = [table.get(key) for key in ("gate", "reason")], [table.get("date"), table.get("until")]
    if not all(isinstance(x, str) and x for x in texts) or not isinstance(days[0], date):
        raise UsageError(f"{file}: an entry has gate, reason and date (2026-11-28), and may have method and until")
    if days[1] is not None and not isinstance(days[1], date):
        raise UsageError(f"{file}: until is a date, such as 2027-01-31")
    if more := table.keys() - {"gate", "reason", "date", "method", "until"}:
        raise unknown(f"key in {file}", sorted(more)[0], ["gate", "reason", "date", "method", "until"])
    return Acknowledged(str(texts[0]), str(table.get("method", "*")), str(texts[1]), days[0], days[1])


Figure = Effect | Estimate | float | str
"""An endpoint, a cell's ratio, an exact number, or why there is none."""


def judge(gates: Sequence[Gate], methods: Sequence[str], figure: Callable[[Gate, str], Figure]) -> list[Outcome]:
    """Every gate on every method that it is about.

    *passed*: the limit is kept, at the one-sided level of 5 %. *failed*: it is missed, by one-sided p after Holm's
    correction over all gates and methods: a set of gates whose limits are all kept fails in 5 % of runs at most.
    *undecided*: neither.
    """
    asked = [(gate, method, figure(gate, method)) for gate in gates for method in methods if gate.matches(method)]
    tests = [estimate.p(gate.limit, gate.side) for gate, _, x in asked if (estimate := _estimate(x)) is not None]
    adjusted = iter(holm(tests))
    found = []
    for gate, method, x in asked:
        estimate = _estimate(x)
        if estimate is not None:
            found.append(_judged(gate, method, estimate, next(adjusted), _hidden(gate, x)))
        elif isinstance(x, float):
            kept = gate.side * (x - gate.limit) <= 0
            found.append(Outcome(gate.text, method, "passed" if kept else "failed", x))
        else:
            found.append(Outcome(gate.text, method, "undecided", why=_why(x)))
    idle = [gate for gate in gates if not any(map(gate.matches, methods))]
    return found + [Outcome(gate.text, gate.pattern, "undecided", why="no such method took part") for gate in idle]


def _estimate(x: Figure) -> Estimate | None:
    if isinstance(x, Effect):
        return x.estimate if x.judged else None
    return x if isinstance(x, Estimate) and x.known else None


def _why(x: Figure) -> str:
    if isinstance(x, Effect):
        return "answers are missing" if x.verdict == "partial" else "too few samples"
    return x if isinstance(x, str) else "too few rounds"


def _hidden(gate: Gate, x: Figure) -> str:
    """Why a limit that seems kept may not be; empty where it is."""
    if isinstance(x, Effect) and x.withheld:
        return "what measured it cannot be believed"
    return "answers end at the cap" if isinstance(x, Effect) and x.capped and gate.side > 0 else ""


def _judged(gate: Gate, method: str, e: Estimate, p: float, hidden: str) -> Outcome:
    away: Side = -1 if gate.side > 0 else 1
    if p <= LEVEL:
        return Outcome(gate.text, method, "failed", e.mean, e.bound(away, LEVEL))
    bound = e.bound(gate.side, LEVEL, safe=True)
    if hidden:
        return Outcome(gate.text, method, "undecided", e.mean, bound, hidden)
    kept = e.p(gate.limit, away, safe=True) <= LEVEL
    return Outcome(gate.text, method, "passed" if kept else "undecided", e.mean, bound)


def forgiven(outcomes: Sequence[Outcome], known: Sequence[Acknowledged], today: date) -> list[Outcome]:
    """With those failures acknowledged that are."""
    found = []
    for outcome in outcomes:
        entry = next((a for a in known if outcome.state == "failed" and a.covers(outcome, today)), None)
        if entry is not None:
            outcome = replace(outcome, state="acknowledged", why=f"{entry.reason} ({entry.since})")
        found.append(outcome)
    return found
