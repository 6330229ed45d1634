"""Random tokens: what a selector has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.methods.base import BudgetSelector

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.prefill import PrefilledLayer


@dataclass(frozen=True)
class Random(BudgetSelector):
    """Keeps tokens of the context uniformly at random, per head: score = hash(k, seed, layer). So neither batch nor
    order changes the draw. Tokens appended later all stay. kvsuite's own, and its default."""

    name = "random"
    stores = "tokens of the context drawn uniformly per kv head (a control)"
    source = "control; kvpress random_press.py has one like it"

    seed: int = 0

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        from kvsuite.kernels.noise import content_hash

        return content_hash(seen.k, self.seed * 1_000_003 + seen.layer).double()
