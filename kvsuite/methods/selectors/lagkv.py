"""LagKV: tokens that stand out against the chunk that follows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.errors import UsageError
from kvsuite.methods.base import BudgetSelector

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.prefill import PrefilledLayer


@dataclass(frozen=True)
class LagKV(BudgetSelector):
    """Keeps the first ``sinks`` tokens, the newest ones, and of each chunk of ``lag`` tokens those that stand out
    against the next chunk. K and V of a chunk are scaled, channel by channel, by the next chunk's minimum and maximum,
    x' = (x - min) / (max - min); a token's score is the softmax over its chunk of the standard deviation of x' over
    channels, mean of K's and V's. Its rank in the chunk counts, so that all chunks keep alike; the score parts equal
    ranks. The last whole chunk and what follows it stay. Where the budget does not even hold these, or a prompt is
    shorter than sinks + 2 lag, the newest stay. Needs no attention. Acts on the prompt alone; while decoding all new
    tokens stay. The authors' defaults."""

    name = "lagkv"
    stores = "sinks, the newest tokens, and of each chunk those that stand out against the next, per kv head"
    source = "Liang et al. 2025, arXiv 2504.04704; kvpress lagkv_press.py"

    sinks: int = 4
    lag: int = 128

    def check(self) -> None:
        if self.sinks < 0 or self.lag < 2:
            raise UsageError(f"{self.name}: sinks must not be negative, and lag at least 2")
        super().check()

    @property
    def protects(self) -> tuple[int, str]:
        return self.sinks, f"its {self.sinks} sinks"

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        import torch

        heads, length, dim = seen.k.shape
        # what stays for certain is above all ranks, the newest highest, and the sinks above them
        scores = 2 + torch.arange(length, device=seen.k.device).expand(heads, -1).double() / length
        scores = scores.clone()
        scores[:, : self.sinks] = float("inf")
        chunks = (length - self.sinks) // self.lag
        if chunks < 2:
            return scores
        end = self.sinks + chunks * self.lag
        k, v = (x[:, self.sinks : end].float().view(heads, chunks, self.lag, dim) for x in (seen.k, seen.v))
        spread = (_spread(k) + _spread(v)) / 2  # (heads, chunks - 1, lag)
        ranks = spread.argsort(-1).argsort(-1)
        scores[:, self.sinks : end - self.lag] = ((ranks + spread.double()) / (self.lag + 1)).flatten(1)
        return scores


def _spread(x: Tensor) -> Tensor:
    """x (heads, chunks, lag, head_dim) to (heads, chunks - 1, lag), in [0, 1]. A channel that is constant in the next
    chunk tells nothing."""
    import torch

    low, high = x[:, 1:].amin(2, keepdim=True), x[:, 1:].amax(2, keepdim=True)
    span = high - low
    scaled = torch.where(span > 0, (x[:, :-1] - low) / torch.where(span > 0, span, 1.0), 0.0)
    return scaled.std(-1).softmax(-1)
