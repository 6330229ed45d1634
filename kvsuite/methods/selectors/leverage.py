"""Leverage: keys that the others do not span."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.errors import UsageError
from kvsuite.methods.base import BudgetSelector

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.prefill import PrefilledLayer


@dataclass(frozen=True)
class Leverage(BudgetSelector):
    """Keeps the keys with the highest approximate leverage: diag(X (XᵀX + 0.01)⁻¹ Xᵀ), X the keys before RoPE, centred
    and multiplied by a Gaussian sketch of ``sketch`` columns over √``sketch``; as a z-score over all kv heads of a
    layer. The sketch is drawn from ``seed`` and the layer, one for all heads. Nothing is protected. Acts on the prompt
    alone; while decoding all new tokens stay. The default is kvpress's."""

    name = "leverage"
    stores = "the tokens whose keys the others do not span, per kv head"
    source = "Chari & Van Durme 2025, arXiv 2507.08143; kvpress leverage_press.py"
    before_rope = True

    sketch: int = 48
    seed: int = 0

    def check(self) -> None:
        if self.sketch < 1:
            raise UsageError(f"{self.name}: sketch must be at least 1")
        super().check()

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        return standard(leverage_of(seen.k_before_rope, self.sketch, self.seed, seen.layer))


def leverage_of(keys: Tensor, columns: int, seed: int, layer: int) -> Tensor:
    """keys before RoPE, float32 (kv_heads, n, head_dim), to their leverage (kv_heads, n). In float64: a channel of 1e4
    leaves nothing of 0.01 in float32."""
    import torch

    noise = torch.Generator().manual_seed(seed * 1_000_003 + layer)
    sketch = torch.randn(keys.shape[2], columns, generator=noise).to(keys.device)
    wide = keys.double()
    x = (wide - wide.mean(1, keepdim=True)) @ (sketch.double() / columns**0.5)
    gram = x.transpose(1, 2) @ x + 0.01 * torch.eye(columns, device=x.device)
    solved = torch.cholesky_solve(x.transpose(1, 2), torch.linalg.cholesky(gram))
    scores: Tensor = (x * solved.transpose(1, 2)).sum(-1)
    return scores.clamp(min=0).float()


def standard(scores: Tensor) -> Tensor:
    """Less their mean, over their standard deviation, all heads together."""
    return (scores - scores.mean()) / scores.std().clamp(min=1e-6)
