"""Ada-KV: the heads of a layer share one budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvsuite.errors import UsageError
from kvsuite.methods.base import Budget

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ada(Budget):
    """The heads of a layer share its budget by score. With B the selector's budget, P how many tokens of each head it
    protects, and c how many of the heads · (B - P) highest scores of the others are a head's, that head keeps
    P + round(⌊``alpha`` · (B - P)⌋ + (1 - ``alpha``) · c), halves to even. Heads are ragged: those with little to keep
    give their pages to the others. The authors' default and rule; rounding may make a layer's sum another than
    heads · B, by less than twice its heads.

    ``rule=kvpress``: of each head its ⌊``alpha`` · B⌋ highest, what is protected among them, then the highest of all,
    heads · B together. So ``alpha`` changes nothing while what is protected is as many."""

    name = "ada"
    stores = "as many tokens a layer as the selector says, shared out over its heads by score"
    source = "Feng et al. 2024, arXiv 2407.11550; FFY0/AdaKV adaptive_snapkv/monkeypatch/snapkv_utils.py"
    ragged = True

    alpha: float = 0.2
    rule: Literal["authors", "kvpress"] = "authors"

    def check(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"{self.name}: alpha={self.alpha:g} must be between 0 and 1")

    def most(self, tokens: int, length: int) -> tuple[int, int]:
        return length, min(length, tokens + 1)

    def allot(self, scores: Sequence[Tensor], tokens: int) -> Tensor:
        import torch

        return torch.stack([self._counts(layer.double(), tokens).cpu() for layer in scores])

    def _counts(self, layer: Tensor, tokens: int) -> Tensor:
        """layer float64 (heads, T) to int64 (heads,)."""
        heads, protected = len(layer), layer.isposinf()
        if self.rule == "kvpress":
            safe = layer.topk(int(tokens * self.alpha), dim=-1).indices
            return _highest(layer.scatter(1, safe, float("inf")), heads * tokens)
        own = protected.sum(1)
        spare = max(heads * tokens - int(own.sum()), 0)
        shared = _highest(layer.masked_fill(protected, float("-inf")), spare)
        return ((1 - self.alpha) * shared + int(self.alpha * spare / heads)).round().long() + own


def _highest(layer: Tensor, n: int) -> Tensor:
    """How many of the n highest of all are each head's, int64 (heads,)."""
    return (layer.flatten().topk(n).indices // layer.shape[1]).bincount(minlength=len(layer))
