"""TriAttention: how far back queries look, as a series of cosines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.cache.decoding import Compaction
from kvsuite.cache.observations import Observation, QueryCentres
from kvsuite.errors import UsageError
from kvsuite.methods.base import BudgetSelector

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.decoding import DecodeState, Eviction
    from kvsuite.cache.prefill import PrefilledLayer
    from kvsuite.kernels.rope import Rope


@dataclass(frozen=True)
class TriAttention(BudgetSelector):
    """Keeps the keys that a typical query of a token to come would attend to. Queries before RoPE lie around a centre
    q̄. With f the pairs of channels that RoPE turns, p a key's position, t tokens seen and δ a distance,
    score = mean over δ of Σ_f |q̄_f| |k_f| cos(ω_f (t + δ - p) + arg q̄_f - arg k_f) + Σ_f (mean |q_f| - |q̄_f|) |k_f|,
    for δ = 1, 2, 4, … up to ``farthest``, as a z-score over the keys, the largest of the query group. The prompt is
    compressed in this way, and every ``every`` steps a sequence is, to its budget. Nothing is protected. The authors'
    defaults, but: they calibrate q̄ and mean |q_f| once on a text, here they are the prompt's own; they keep the prompt
    whole; and of their three ways to select this is per_layer_perhead, each layer and kv head by itself."""

    name = "triattention"
    stores = "the keys that a mean query looks back to, per kv head, compacted every 128 steps"
    source = "Mao et al. 2026, arXiv 2604.04921; WeianMao/triattention triattention/methods/pruning_utils.py"
    before_rope = True

    every: int = 128
    farthest: int = 65536

    def check(self) -> None:
        if self.every < 2 or self.farthest < 1:
            raise UsageError(f"{self.name}: every must be at least 2, and farthest at least 1")
        super().check()

    @property
    def observes(self) -> tuple[Observation, ...]:
        return (QueryCentres(),)

    @property
    def eviction(self) -> Eviction:
        return Compaction(self.every, self.observes, self._held)

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        import torch

        assert seen.rope is not None, "centres are observed only where RoPE is known"
        kv_heads, length = seen.k.shape[:2]
        centres = seen[QueryCentres()].unflatten(0, (kv_heads, -1))
        return torch.stack([self.of_head(q, k, length, seen.rope) for q, k in zip(centres, seen.k, strict=True)])

    def of_head(self, centres: Tensor, k: Tensor, seen: int, rope: Rope) -> Tensor:
        """One kv head's scores, float32 (n,): centres (group, head_dim + pairs), k (n, head_dim) as attention reads
        them, ``seen`` tokens that have passed."""
        import torch

        mean, size = centres[:, : k.shape[1]], centres[:, k.shape[1] :]
        ahead = seen + 2 ** torch.arange(self.farthest.bit_length(), device=k.device)
        # a turned query times turned keys is the series: neither must be turned back
        query = rope.rotate(mean[:, None].expand(-1, len(ahead), -1), ahead[:, None]).mean(1) * rope.scaling
        spread = (size - rope.pairs(mean).norm(dim=-1)) * rope.scaling
        keys = k.float()
        scores = query @ keys.T + spread @ rope.pairs(keys).norm(dim=-1).T
        deviation = scores.std(-1, correction=0, keepdim=True).clamp(min=1e-6)
        highest: Tensor = ((scores - scores.mean(-1, keepdim=True)) / deviation).amax(0)
        return highest

    def _held(self, state: DecodeState, head: int, slots: Tensor) -> Tensor:
        assert state.k is not None
        assert state.query_centres is not None
        assert state.rope is not None
        centres = state.query_centres.view(len(state.k), -1, state.query_centres.shape[1])
        return self.of_head(centres[head], state.k[head, slots], int(state.num_seen), state.rope)
