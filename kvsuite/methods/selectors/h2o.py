"""H2O: heavy hitters by accumulated attention, and the most recent tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.cache.decoding import LowestEviction
from kvsuite.cache.observations import AttentionMass, Observation
from kvsuite.errors import UsageError
from kvsuite.methods.base import Selector, check_share, share

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.decoding import Eviction
    from kvsuite.cache.prefill import PrefilledLayer


@dataclass(frozen=True)
class H2O(Selector):
    """Keeps the ``heavy`` tokens that got most attention from all queries so far, and the ``recent`` last ones:
    score = Σ softmax(q·k/√d) over all queries so far, mean over the query group. Evicts one token per head at every
    decoding step. ``budget`` is short for half of it each. The authors' defaults, a tenth of the context each."""

    name = "h2o"
    stores = "heavy hitters and recent tokens, per kv head, also while decoding"
    source = "Zhang et al. 2023, arXiv 2306.14048; FMInference/H2O h2o_hf/utils_hh/modify_llama.py"

    budget: float | None = None
    heavy: float = 0.1
    recent: float = 0.1

    def check(self) -> None:
        if self.budget is not None:
            if (self.heavy, self.recent) != (0.1, 0.1):
                raise UsageError(f"{self.name}: give either budget or heavy and recent")
            check_share(self.name, "budget", self.budget, least=2)
        for name in ("heavy", "recent"):
            check_share(self.name, name, getattr(self, name))

    def tokens(self, length: int) -> int:
        if self.budget is not None:
            return share(self.budget, length, least=2)
        return share(self.heavy, length) + share(self.recent, length)

    def protected(self, length: int) -> int:
        """How many of the tokens kept of a context of ``length`` are the most recent ones."""
        return share(self.recent, length) if self.budget is None else self.tokens(length) // 2

    @property
    def observes(self) -> tuple[Observation, ...]:
        return (AttentionMass(),)

    @property
    def eviction(self) -> Eviction:
        return LowestEviction("accumulated_attention", recent=self.protected)

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        scores: Tensor = seen[AttentionMass()].clone()
        scores[:, -self.protected(scores.shape[1]) :] = float("inf")
        return scores
