"""The same number of tokens in every layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.methods.base import Budget

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Uniform(Budget):
    """The B highest scores of each head, B the selector's budget: count = B. A larger budget keeps a superset, unless
    the scores depend on it, as `compactor`'s do."""

    name = "uniform"
    stores = "the selector's budget in every layer and head"
    source = "the default of all published selectors"

    def allot(self, scores: Sequence[Tensor], tokens: int) -> Tensor:
        import torch

        return torch.full((len(scores), scores[0].shape[0]), tokens)
