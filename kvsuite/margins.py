"""How much worse a method may be before it counts as harmful."""

from __future__ import annotations

from dataclasses import dataclass, fields

from kvsuite.errors import UsageError, unknown


@dataclass(frozen=True)
class Margins:
    """How much worse a method may be. Raises UsageError for a negative one."""

    quality: float = 0.01
    """Points of the mean score, 0.01 is one of a hundred."""
    broken: float = 0.01
    """Share of the eligible samples broken beyond noise."""
    length: float = 0.03
    """Tokens of the answers, relative."""
    speed: float = 0.0
    """Decode speed, relative."""

    @classmethod
    def parse(cls, text: str) -> Margins:
        """Of ``quality=0.02,length=0.05``; what is left out keeps its default. Raises UsageError."""
        known, given = [f.name for f in fields(cls)], {}
        for item in filter(None, (x.strip() for x in text.split(","))):
            name, _, value = item.partition("=")
            if name not in known:
                raise unknown("margin", name, known)
            try:
                given[name] = float(value)
            except ValueError:
                raise UsageError(f"the margin for {name} must be a number, not {value!r}") from None
        return cls(**given)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < 1:
                raise UsageError(f"the margin for {name} must be a number of at least 0 and below 1, not {value:g}")
