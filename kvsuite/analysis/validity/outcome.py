"""What one check says of one arm, and the words for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from kvsuite.analysis.garbled import State
from kvsuite.analysis.table import State as Lost
from kvsuite.records import Run, Served

Kind = Literal["BROKEN", "DIFFERS", "COMPRESSED", "FAILED", "RESTARTED", "NOT SHOWN", "COULD NOT TELL"]
"""Of headlines, the gravest first."""
FATAL: tuple[Kind, ...] = ("BROKEN", "FAILED", "DIFFERS")
"""Kinds that end a run with an error, unless its user wants otherwise."""
OPEN: tuple[Kind, ...] = ("NOT SHOWN", "COULD NOT TELL")
"""Kinds of checks that did not decide."""
ANSWERS = frozenset({"quality", "broken", "length", "truncation"})
SPEED = frozenset({"speed"})
ALL = ANSWERS | SPEED
NOTHING: frozenset[str] = frozenset()
APART = 0.05
"""Of requests, the share that may differ before something does."""


@dataclass(frozen=True)
class Outcome:
    """What one check says of one arm."""

    arm: str
    check: str
    kind: Kind | None = None
    """None: it passed."""
    text: str = ""
    """What was seen, what follows, and what to do."""
    hides: frozenset[str] = NOTHING
    """Endpoints that this leaves nothing good to say of: no *within margin*, no rank. Those of the baseline are every
    variant's."""
    lost: Lost = "ok"
    """Why the arm has no figures at all, where it has none."""
    tested: bool = False
    """Whether it is what the comparison is about."""

    @property
    def state(self) -> State:
        """How the check ended."""
        return "passed" if self.kind is None else "could not tell" if self.kind in OPEN else "failed"

    @property
    def fatal(self) -> bool:
        """Whether it ends a run with an error, unless the user wants otherwise."""
        return self.kind in FATAL and not self.tested


def plain(run: Run, arm: str) -> bool:
    """Whether it is the baseline, once more or not."""
    return arm == run.baseline or run.is_control(arm)


def answered(run: Run) -> Iterable[Served]:
    """All answers that came, whatever they were asked for."""
    return (r for r in run.records if isinstance(r, Served) and r.status == "ok")


def by_arm(found: Iterable[Served]) -> Mapping[str, list[Served]]:
    """Answers, by the arm that gave them."""
    grouped: dict[str, list[Served]] = {}
    for r in found:
        grouped.setdefault(r.method, []).append(r)
    return grouped
