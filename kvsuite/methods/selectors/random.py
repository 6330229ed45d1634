"""Random tokens: what a selector has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.methods.base import Selector, check_share, share

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.prefill import PrefilledLayer


@dataclass(frozen=True)
class Random(Selector):
    """Keeps tokens of the context uniformly at random, per head; tokens appended later all stay. The draw depends on
    the seed and the key itself, so neither batch nor order changes it."""

    name = "random"
    stores = "tokens of the context drawn uniformly per kv head (a control)"
    source = "control; kvpress random_press.py has one like it"

    budget: float = 0.2
    seed: int = 0

    def check(self) -> None:
        check_share(self.name, "budget", self.budget)

    def tokens(self, length: int) -> int:
        return share(self.budget, length)

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        from kvsuite.kernels.noise import content_hash

        return content_hash(seen.k, self.seed * 1_000_003 + seen.layer).double()
