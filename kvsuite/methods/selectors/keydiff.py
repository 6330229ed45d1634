"""KeyDiff: keys that are unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.methods.base import BudgetSelector

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.prefill import PrefilledLayer


@dataclass(frozen=True)
class KeyDiff(BudgetSelector):
    """Keeps the keys that are least similar to the mean key: score = -cos(k, mean of k/‖k‖₂), in float32. Acts on the
    whole prompt at once, and on nothing while decoding; the paper also does it block by block, to bound the memory of
    the prefill."""

    name = "keydiff"
    stores = "the tokens whose keys differ most from the mean key, per kv head"
    source = "Park et al. 2025, arXiv 2504.15364; kvpress keydiff_press.py"

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        from torch.nn.functional import cosine_similarity, normalize

        k = seen.k.float()
        return -cosine_similarity(k, normalize(k, dim=-1).mean(1, keepdim=True), dim=-1)
