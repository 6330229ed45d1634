"""What the published runs showed of noise and speed: what a plan goes by before there is a run of one's own."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from kvsuite.analysis.minutes import Speeds
from kvsuite.analysis.stats import Estimate
from kvsuite.analysis.verdict import Effect, effect
from kvsuite.margins import Margins

FILE = "shipped.json"
DIRECTIONS: dict[str, Literal[-1, 0, 1]] = {
    "kl": 1, "perplexity": 1, "reference": -1, "quality": -1, "length": 0, "truncation": 1, "speed": -1,
}  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Of one sample (document, chat, block), and what few changes could still do; see ``Estimate``."""

    spread: float
    share: float
    room: float
    ratio: bool
    run: str
    """Where it was measured."""
    relative: float = 0.0
    """Where the spread grows with the effect: as a part of it, of methods that do harm."""

    @classmethod
    def of(cls, e: Effect, run: str) -> Spread:
        """Of an endpoint that was measured."""
        seen = e.estimate
        spread, share, room = (float(f"{x:.4g}") for x in (seen.se * math.sqrt(e.n), seen.share, seen.room))
        return cls(spread, share, room, e.ratio, run)

    def effect(self, endpoint: str, n: int, margins: Margins, levels: tuple[float, float]) -> Effect:
        """The endpoint of a method without an effect after ``n`` samples."""
        se = self.spread / math.sqrt(n)
        seen = Estimate(float(self.ratio), 0, 0, se, n - 1, log=self.ratio, share=self.share, room=self.room)
        found = effect(endpoint, seen, getattr(margins, endpoint), DIRECTIONS[endpoint], n, self.ratio)
        return Effect(endpoint, seen, found.limits, n, self.ratio, levels=levels)


@dataclass(frozen=True)
class Shipped:
    """The file's content."""

    model: str
    machine: str
    took: float
    """Seconds of the published run of the preset smoke."""
    speeds: Speeds
    prompt: float
    """Tokens of a chat's prompt."""
    answers: dict[str, float]
    """By task, tokens of an answer; of a chat the share of its cap."""
    spreads: dict[str, Spread]
    """By endpoint."""


def shipped() -> Shipped:
    """As it was measured last (``python -m suites.checks.shipped``)."""
    known = json.loads((files("kvsuite.analysis") / FILE).read_text(encoding="utf-8"))
    spreads = {endpoint: Spread(**spread) for endpoint, spread in known.pop("spreads").items()}
    return Shipped(speeds=Speeds(**known.pop("speeds")), spreads=spreads, **known)
