"""StreamingLLM: attention sinks and a sliding window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvsuite.cache.decoding import LowestEviction
from kvsuite.errors import UsageError
from kvsuite.methods.base import BudgetSelector

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.decoding import Eviction
    from kvsuite.cache.prefill import PrefilledLayer


@dataclass(frozen=True)
class StreamingLLM(BudgetSelector):
    """The first ``sinks`` tokens and the last ones: with S = ``sinks`` and the budget B, token t of T stays where t < S
    or t ≥ T - (B - S), also while decoding. The authors' defaults.

    ``positions=cache``, the authors': keys stand where the cache has them. Relative to the query that moves only the
    sinks, by the number of tokens evicted; they are rotated from their stored originals at every step.
    ``positions=absolute``: keys stay where the text has them.
    """

    name = "streaming-llm"
    stores = "first `sinks` tokens and the last budget - sinks, also while decoding"
    source = "Xiao et al. 2023, arXiv 2309.17453; mit-han-lab/streaming-llm streaming_llm/kv_cache.py"

    sinks: int = 4
    positions: Literal["cache", "absolute"] = "cache"

    def check(self) -> None:
        if self.sinks < 0:
            raise UsageError(f"{self.name}: sinks={self.sinks} must not be negative")
        super().check()

    @property
    def protects(self) -> tuple[int, str]:
        return self.sinks, f"its {self.sinks} sinks"

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        import torch

        heads, length = seen.k.shape[:2]
        recency = torch.arange(length, dtype=torch.float32, device=seen.k.device)
        recency[: self.sinks] = float("inf")
        return recency.expand(heads, -1)

    @property
    def eviction(self) -> Eviction:
        rerotated = self.sinks if self.positions == "cache" else 0
        return LowestEviction("positions", first=self.sinks, rerotated_sinks=rerotated)
