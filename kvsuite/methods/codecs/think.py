"""ThinK: keys without the channels that queries use least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.cache.observations import LastQueries, Observation
from kvsuite.errors import UsageError
from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.methods.base import Codec
from kvsuite.methods.codecs.full import Plain

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvsuite.kernels.context import LayerContext
    from kvsuite.kernels.quantspec import Shape
    from kvsuite.methods.artifact import Artifact


@dataclass(frozen=True)
class Think(Codec):
    """Stores keys without a share ``prune`` of their channels: those with the lowest score = mean of q² over the
    prompt's last 32 queries and the query group · mean of k² over its keys. Each sequence and kv head has its own
    channels. Attention reads zeros for them. The last ``recent`` keys stay whole, and lose these channels when they
    leave that window; values stay whole. The authors' defaults. Their code leaves all keys whole that are decoded, and
    chooses channels after eviction."""

    name = "think"
    stores = "K without 40 % of its channels but for the last 32 tokens, V whole, the channels' numbers per sequence"
    source = "Xu et al. 2024, arXiv 2407.21018; SalesforceAIResearch/ThinK kv_pruning_utils.py; kvpress think_press.py"

    prune: float = 0.4
    recent: int = 32

    def check(self) -> None:
        super().check()
        if not 0 <= self.prune < 1 or self.recent < 0:
            raise UsageError(f"{self.name}: prune must be at least 0 and below 1, and recent not negative")

    @property
    def observes(self) -> tuple[Observation, ...]:
        return (LastQueries(32),)

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        dim = layer.head_dim
        return Pruned(dim, dim - int(dim * self.prune), self.recent), Plain()


@dataclass(frozen=True)
class Pruned(QuantSpec):
    """``kept`` of the ``head_dim`` channels of each token."""

    rolling = True
    last_queries = 32
    head_dim: int
    kept: int
    residual: int

    def fields(self, head_dim: int, kv_dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        return [((self.kept,), kv_dtype)]

    def fitted(self, head_dim: int, kv_dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        import torch

        return [((self.kept,), torch.int16)]

    def fit(self, x: Tensor, queries: Tensor | None) -> tuple[Tensor, ...]:
        import torch

        assert queries is not None
        asked = queries.float().square().mean(1).view(len(x), -1, x.shape[2]).mean(1)
        used = asked * x.float().square().mean(1)
        return (used.topk(self.kept).indices.sort().values.to(torch.int16),)

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (x[:, :, 0].gather(2, self._channels(fitted, x.shape[1])),)

    def decode(self, fields: tuple[Tensor, ...], dtype: torch.dtype, fitted: tuple[Tensor, ...]) -> Tensor:
        x = fields[0].new_zeros(*fields[0].shape[:2], self.head_dim)
        x.scatter_(2, self._channels(fitted, x.shape[1]), fields[0])
        return x.unsqueeze(2).to(dtype)

    def _channels(self, fitted: tuple[Tensor, ...], units: int) -> Tensor:
        return fitted[0].long()[:, None].expand(-1, units, -1)
