"""Observed attention: the mean weight of a key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.cache.observations import AttentionMass, Observation
from kvsuite.methods.base import BudgetSelector

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.prefill import PrefilledLayer


@dataclass(frozen=True)
class ObservedAttention(BudgetSelector):
    """Keeps the tokens that got most attention from the queries that could see them: score = Σ softmax / number of
    such queries, mean over the query group. That is H2O's sum divided by its number of terms, so late tokens are not
    at a disadvantage. Nothing is protected. Acts on the prompt alone; while decoding all new tokens stay."""

    name = "observed-attention"
    stores = "the tokens with the highest mean attention, per kv head"
    source = "kvpress observed_attention_press.py, after Zhang et al. 2023 (H2O), arXiv 2306.14048"

    @property
    def observes(self) -> tuple[Observation, ...]:
        return (AttentionMass(),)

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        import torch

        mass: Tensor = seen[AttentionMass()]
        return mass / torch.arange(mass.shape[1], 0, -1, device=mass.device)
