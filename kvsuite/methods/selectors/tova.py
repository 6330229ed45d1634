"""TOVA: what the newest query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvsuite.cache.observations import LastQueries, NewestAttention, Observation
from kvsuite.errors import UsageError
from kvsuite.methods.base import BudgetSelector

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.decoding import DecodeState
    from kvsuite.cache.prefill import PrefilledLayer


@dataclass(frozen=True)
class Tova(BudgetSelector):
    """Keeps the tokens that the newest query attends to most: score = its softmax, mean over all heads, so all kv heads
    of a layer keep the same tokens. Evicts one token at every decoding step, too. The authors protect nothing, not even
    the newest token, which is the default; ``recent`` of the newest ones stay."""

    name = "tova"
    stores = "the tokens that the newest query attends to most, the same in all heads, also while decoding"
    source = "Oren et al. 2024, arXiv 2401.06104; schwartz-lab-NLP/TOVA src/tova_cache.py"
    one_set = True

    recent: int = 0

    def check(self) -> None:
        if self.recent < 0:
            raise UsageError(f"{self.name}: recent={self.recent} must not be negative")
        super().check()

    @property
    def protects(self) -> tuple[int, str]:
        return self.recent, f"its {self.recent} newest tokens"

    @property
    def observes(self) -> tuple[Observation, ...]:
        return (LastQueries(1),)

    @property
    def eviction(self) -> LeastAttended:
        return LeastAttended(self.recent)

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        import torch

        from kvsuite.kernels.reference.attention import last_query_weights

        heads, length = seen.k.shape[:2]
        weights = torch.cat(list(last_query_weights(seen[LastQueries(1)], seen.k, seen.params)))  # (heads, 1, T)
        scores = weights.mean((0, 1))
        scores[length - self.recent :] = float("inf")
        return scores.expand(heads, -1)


@dataclass(frozen=True)
class LeastAttended:
    """After each step evicts the token that the newest query attends to least, mean over the kv heads."""

    recent: int
    every: ClassVar[int] = 1
    rerotated_sinks: ClassVar[int] = 0
    observes: ClassVar[tuple[Observation, ...]] = (NewestAttention(),)

    def parameters(self, length: int) -> tuple[int, ...]:
        """None."""
        return ()

    def score(self, state: DecodeState) -> Tensor:
        """The mean attention; all kv heads hold the same tokens in the same slots."""
        assert state.newest_attention is not None
        scores = state.newest_attention.mean(-2, keepdim=True).expand_as(state.newest_attention)
        return scores.masked_fill(state.positions >= state.num_seen - self.recent, float("inf"))
