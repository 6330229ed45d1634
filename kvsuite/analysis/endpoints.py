"""What the comparison of one method with its baseline asks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kvsuite.analysis.resample import Floats
from kvsuite.analysis.stats import Ratio


@dataclass
class Endpoints:
    """What the comparison of one method with its baseline asks of the common resampling, by the figures' names."""

    endpoints: dict[str, Ratio] = field(default_factory=dict)
    """Primary: these get a margin and a verdict."""
    findings: dict[str, Ratio] = field(default_factory=dict)
    """Exploratory."""
    flips: dict[str, Floats] = field(default_factory=dict)
    """(n,) differences whose signs are flipped for the p of a figure of that name."""
    pairs: dict[str, Floats] = field(default_factory=dict)
    """(n,): 1 where only the method shows something, -1 where only the other arm does: the exact p of a figure of that
    name."""

    def __or__(self, other: Endpoints) -> Endpoints:
        return Endpoints(
            *({**mine, **theirs} for mine, theirs in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def only(self, names: Sequence[str]) -> Endpoints:
        """The figures of these names."""
        return Endpoints(*({name: x for name, x in found.items() if name in names} for found in vars(self).values()))
