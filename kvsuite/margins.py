"""How much worse a method may be before it counts as harmful."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvsuite.errors import UsageError, unknown


@dataclass(frozen=True)
class Margins:
    """How much worse a method may be. Raises UsageError for a negative margin, and for a veto of none."""

    kl: float = 0.02
    """Nats of KL divergence beyond the control's."""
    perplexity: float = 0.02
    """Relative."""
    reference: float = 0.1
    """Nats by which the log probability of a token of the reference answer may fall."""
    quality: float = 0.05
    """Points of the mean score, 0.05 is five of a hundred."""
    broken: float = 0.05
    """Share of the eligible samples broken beyond noise."""
    length: float = 0.15
    """Tokens of the answers, relative, to either side."""
    truncation: float = 0.03
    """Share of the answers at most half as long beyond noise."""
    speed: float = 0.05
    """Decode speed, relative."""
    veto: Iterable[str] = ()
    """Endpoints that can only convict: a method may be harmful by them, but needs none of them to be within margin.
    Kept as a sorted tuple, which JSON has."""

    @classmethod
    def names(cls) -> list[str]:
        """The endpoints that have a margin."""
        return [f.name for f in fields(cls) if f.name != "veto"]

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Margins:
        """Those of a run, from its ``run.json``. Raises UsageError."""
        given = facts.get("margins", {})
        if strange := given.keys() - {*cls.names(), "veto"}:
            raise unknown("margin", min(strange), [*cls.names(), "veto"])
        return cls(**given)

    @classmethod
    def parse(cls, text: str) -> Margins:
        """Of ``quality=0.1,length=0.15,veto=quality+length``; what is left out keeps its default. Raises UsageError."""
        given: dict[str, float] = {}
        veto: list[str] = []
        for item in filter(None, (x.strip() for x in text.split(","))):
            name, _, value = item.partition("=")
            if name == "veto":
                veto = [x for x in value.split("+") if x]
                continue
            if name not in cls.names():
                raise unknown("margin", name, [*cls.names(), "veto"])
            try:
                given[name] = float(value)
            except ValueError:
                raise UsageError(f"the margin for {name} must be a number, not {value!r}") from None
        return cls(**given, veto=veto)

    def __post_init__(self) -> None:
        for name in self.names():
            if not 0 <= (value := getattr(self, name)) < 1:
                raise UsageError(f"the margin for {name} must be a number of at least 0 and below 1, not {value:g}")
        for name in self.veto:
            if name not in self.names():
                raise unknown("endpoint", name, self.names())
        object.__setattr__(self, "veto", tuple(sorted(self.veto)))
