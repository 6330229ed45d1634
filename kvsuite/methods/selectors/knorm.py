"""Small keys: the norm of a key says how little it is attended to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.methods.base import BudgetSelector

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.prefill import PrefilledLayer


@dataclass(frozen=True)
class Knorm(BudgetSelector):
    """Keeps the keys with the smallest norm: score = -‖k‖₂, in float32, of keys after RoPE, whose norm RoPE does not
    change. Acts on the prompt alone; while decoding all new tokens stay. The authors leave the first two layers whole:
    ``knorm + layers:first=2``."""

    name = "knorm"
    stores = "the tokens with the smallest keys, per kv head"
    source = "Devoto et al. 2024, arXiv 2406.11430; kvpress knorm_press.py"

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        norms: Tensor = seen.k.float().norm(dim=-1)
        return -norms
