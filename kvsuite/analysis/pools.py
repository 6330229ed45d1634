"""What a token and what a pool take of a server's memory, by the line through two pool sizes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from kvsuite.records import Probe

PRECISE = 0.05
"""How much of the slope may be due to pools being whole blocks, at most."""


@dataclass(frozen=True)
class Line:
    """Bytes of a pool = ``fixed`` + ``slope`` × tokens that fit, through the smallest and the largest pool."""

    pools: tuple[tuple[float, float], tuple[float, float]]
    """Tokens and bytes of both."""
    block: float
    """Tokens by which pools grow: as many more may have had room in bytes, but for the last."""

    @property
    def slope(self) -> float:
        """Bytes a token."""
        return _through(*self.pools)[0]

    @property
    def fixed(self) -> float:
        """Bytes that no token takes."""
        return _through(*self.pools)[1]

    @property
    def open(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Least and most of slope and of the fixed part, since the bytes of either pool may be up to a block more than
        its tokens take."""
        (small, less), (large, more) = self.pools
        ends = product((small, small + self.block), (large, large + self.block))
        slopes, fixed = zip(*(_through((a, less), (b, more)) for a, b in ends), strict=True)
        return (min(slopes), max(slopes)), (min(fixed), max(fixed))


def _through(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    slope = (large[1] - small[1]) / (large[0] - small[0])
    return slope, small[1] - slope * small[0]


def pool(facts: Mapping[str, Any]) -> tuple[float, float] | None:
    """Tokens and bytes of a pool, where a server says both of the same one."""
    size, tokens = _number(facts, "kv_bytes"), _number(facts, "kv_tokens")
    if facts.get("blocks_set"):  # its user chose how many tokens fit, in whatever bytes
        tokens = _number(facts, "blocks_fit") * _number(facts, "block_size")
    return (tokens, size) if size > 0 and tokens > 0 else None


def _number(facts: Mapping[str, Any], name: str) -> float:
    """0 where a server says none."""
    said = facts.get(name)
    return said if isinstance(said, (int, float)) and math.isfinite(said) else 0.0


def lines(probes: Iterable[Probe]) -> dict[str, Line]:
    """By arm. Pools belong together whose servers say the same of themselves, whichever arms they are of; nothing for
    those of one size, or of sizes that are too few blocks apart."""
    alike: dict[str, dict[str, set[tuple[float, float]]]] = {}
    blocks: dict[str, float] = {}
    for p in probes:
        found, block = pool(p.facts), _number(p.facts, "block_size")
        if p.status == "ok" and found and block > 0:
            kind = _kind(p)
            alike.setdefault(kind, {}).setdefault(p.method, set()).add(found)
            blocks[kind] = block
    by_arm: dict[str, Line] = {}
    for kind, arms in alike.items():
        pools = sorted(set().union(*arms.values()))
        line = Line((pools[0], pools[-1]), blocks[kind])
        if 2 * line.block <= PRECISE * (pools[-1][0] - pools[0][0]) and line.slope > 0:
            by_arm |= dict.fromkeys(arms, line)
    return by_arm


def _kind(p: Probe) -> str:
    """What decides how many bytes a token takes, and all features, since no one knows which of them do."""
    names = ("version", "kv_dtype", "compressed", "block_size", "features")
    return repr([p.profile, *(p.facts.get(name) for name in names)])
