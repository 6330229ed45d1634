"""RocketKV's second stage: reads the pages that a few channels of the query point to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.methods.base import check_share, share
from kvsuite.methods.readers.quest import Quest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RocketKV(Quest):
    """The second of two stages; the first is SnapKV's eviction: ``snapkv:budget=2048,window=32,kernel=63 +
    rocketkv:budget=256``. Of what is kept, each step reads the pages with the highest estimated attention. Only the
    ``channels`` of the query that are largest in the mean of its group count (below 1 a share of them). A page stands
    for the key that has, in each of these channels, the largest number of its keys where the group's sum is positive,
    else the smallest. score = softmax over pages of Σ_c q_c · k_c / √(d · Σ_c |q_c| / Σ|q|), c these channels, mean
    over the group. ``budget`` and ``dense`` as for `quest`. The authors derive page, channels and budget from one
    ratio; here a page is the cache's, 32 tokens, and the defaults are kvsuite's."""

    name = "rocketkv"
    stores = "everything that is not evicted, and two numbers of each key channel of a page; reads some pages"
    source = "Behnam et al. 2025, arXiv 2502.14051; NVlabs/RocketKV gpt-fast/rocket.py; TensorRT-LLM rocket.py"

    budget: float = 256
    dense: int = 0
    channels: float = 0.5

    def check(self) -> None:
        check_share(self.name, "channels", self.channels)
        super().check()

    def worth(self, q: Tensor, low: Tensor, high: Tensor) -> Tensor:
        import torch

        dim = q.shape[1]
        used = q.abs().mean(0).topk(min(dim, share(self.channels, dim))).indices
        few = q[:, used]
        keys = torch.where(few.sum(0) > 0, high[:, used], low[:, used])
        part = few.abs().sum(-1, keepdim=True) / q.abs().sum(-1, keepdim=True).clamp(min=1e-30)
        return (few @ keys.T / (dim * part).clamp(min=1e-30).sqrt()).softmax(-1).mean(0)
