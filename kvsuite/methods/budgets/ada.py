"""Ada-KV: the heads of a layer share one budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.errors import UsageError
from kvsuite.methods.base import Budget

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ada(Budget):
    """The highest scores of all heads of a layer together stay, but of each head at least ``alpha`` of the mean. With B
    the selector's budget, of each head its ⌊alpha · B⌋ highest, then the highest of all, heads · B together. Heads are
    ragged: those with little to keep give their pages to the others. The authors' default."""

    name = "ada"
    stores = "as many tokens a layer as the selector says, shared out over its heads by score"
    source = "Feng et al. 2024, arXiv 2407.11550, algorithm 1; kvpress adakv_press.py"
    ragged = True

    alpha: float = 0.2

    def check(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"{self.name}: alpha={self.alpha:g} must be between 0 and 1")

    def most(self, tokens: int, length: int) -> tuple[int, int]:
        return length, tokens

    def allot(self, scores: Sequence[Tensor], tokens: int) -> Tensor:
        import torch

        counts = []
        for layer in scores:
            heads, length = layer.shape
            safe = layer.topk(int(tokens * self.alpha), dim=-1).indices
            raised = layer.double().scatter(1, safe, float("inf"))
            kept = raised.flatten().topk(heads * tokens).indices // length
            counts.append(kept.bincount(minlength=heads).cpu())
        return torch.stack(counts)
