"""R-KV: what the newest queries attend to and no other key repeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.cache.decoding import Compaction
from kvsuite.cache.observations import LastQueries, Observation
from kvsuite.errors import UsageError
from kvsuite.methods.base import BudgetSelector

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.decoding import DecodeState, Eviction
    from kvsuite.cache.prefill import PrefilledLayer


@dataclass(frozen=True)
class RKV(BudgetSelector):
    """Keeps the last ``window`` tokens and those with the highest λ · importance - (1 - λ) · redundancy, λ = ``mix``.
    Importance: the largest q·k/√d of the query group, softmax over the keys before the window, mean over the window's
    queries, maximum over ``kernel`` neighbours. Redundancy: the softmax over keys of the mean cosine between a key and
    all others, of which each key leaves out the last one it is similar to (cosine above 0.5), or the first of all keys
    where there is none, as the authors' code does. The prompt is compressed in this way, and every ``every`` steps a
    sequence is, to its budget. The authors' defaults. Their code takes batch item 0's keys for all; here each sequence
    has its own."""

    name = "r-kv"
    stores = "the newest tokens and those attended to and not repeated, per kv head, compacted every 128 steps"
    source = "Cai et al. 2025, arXiv 2505.24133; Zefan-Cai/R-KV rkv/compression/r1_kv.py, rkv/utils.py"

    window: int = 8
    kernel: int = 7
    mix: float = 0.07
    every: int = 128

    def check(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0 or self.every < 2 or not 0 <= self.mix <= 1:
            raise UsageError(f"{self.name}: window at least 1, kernel odd, every at least 2, mix between 0 and 1")
        super().check()

    @property
    def protects(self) -> tuple[int, str]:
        return self.window, f"its window of {self.window} tokens"

    @property
    def observes(self) -> tuple[Observation, ...]:
        return (LastQueries(self.window),)

    @property
    def eviction(self) -> Eviction:
        return Compaction(self.every, self.observes, self._held)

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        import torch

        queries = seen[self.observes[0]].view(len(seen.k), -1, self.window, seen.k.shape[2])
        return torch.stack([self.of_head(q, k) for q, k in zip(queries, seen.k, strict=True)])

    def _held(self, state: DecodeState, head: int, slots: Tensor) -> Tensor:
        assert state.k is not None
        assert state.queries is not None
        queries = state.queries.view(len(state.k), -1, *state.queries.shape[1:])
        return self.of_head(queries[head], state.k[head, slots])

    def of_head(self, q: Tensor, k: Tensor) -> Tensor:
        """One kv head's scores, float32 (n,): q (group, window, head_dim), k (n, head_dim), the newest last."""
        from torch.nn.functional import max_pool1d, pad

        logits = (q.float() @ k[: -self.window].float().T).amax(0) * k.shape[1] ** -0.5
        importance = logits.softmax(-1).mean(0, keepdim=True)
        importance = max_pool1d(importance, self.kernel, stride=1, padding=self.kernel // 2)[0]
        scores = self.mix * importance - (1 - self.mix) * _redundancy(k)[: -self.window]
        return pad(scores, (0, self.window), value=float("inf"))


def _redundancy(k: Tensor, block: int = 512) -> Tensor:
    """How much each key is repeated by others: k (n, head_dim) to float32 (n,), which sums to 1."""
    import torch

    k = k.float() / (k.float().norm(dim=-1, keepdim=True) + 1e-8)
    places, total = torch.arange(len(k), device=k.device), k.new_zeros(len(k))
    for first in range(0, len(k), block):
        own = places[first : first + block, None]
        cosine = (k[first : first + block] @ k.T).masked_fill(own == places, 0.0)
        last = torch.where(cosine > 0.5, places, 0).amax(-1, keepdim=True)
        total += cosine.scatter(1, last, 0.0).sum(0)
    return (total / len(k)).softmax(-1)
