"""SnapKV: what the prompt's last queries attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvsuite.cache.observations import LastQueries, Observation
from kvsuite.errors import UsageError
from kvsuite.methods.base import BudgetSelector

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.prefill import PrefilledLayer


@dataclass(frozen=True)
class SnapKV(BudgetSelector):
    """Keeps the last ``window`` tokens and those that their queries attend to most:
    score = mean over the query group of pool(Σ softmax(q·k/√d) over these queries), each head's sum pooled along the
    keys by ``kernel``. Acts on the prompt alone; while decoding all new tokens stay. The defaults are those of the
    paper's runs."""

    name = "snapkv"
    stores = "the last tokens and those they attend to most, per kv head"
    source = "Li et al. 2024, arXiv 2404.14469, section 4; FasterDecoding/SnapKV monkeypatch/snapkv_utils.py"

    window: int = 32
    kernel: int = 7
    pool: Literal["max", "avg"] = "max"

    def check(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise UsageError(f"{self.name}: window must be at least 1, and kernel odd and at least 1")
        super().check()

    @property
    def protects(self) -> tuple[int, str]:
        return self.window, f"its window of {self.window} tokens"

    @property
    def observes(self) -> tuple[Observation, ...]:
        return (LastQueries(self.window),)

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        import torch
        from torch.nn.functional import avg_pool1d, max_pool1d, pad

        from kvsuite.kernels.reference.attention import last_query_weights

        pool, scores = max_pool1d if self.pool == "max" else avg_pool1d, []
        for weights in last_query_weights(seen[LastQueries(self.window)], seen.k, seen.params):
            sums = weights.sum(1)[:, : -self.window]  # (group, T - window)
            scores.append(pool(sums, self.kernel, stride=1, padding=self.kernel // 2).mean(0))
        return pad(torch.stack(scores), (0, self.window), value=float("inf"))
