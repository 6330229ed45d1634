"""Quest: reads the pages whose keys could suit the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.errors import UsageError
from kvsuite.kernels.quantspec import PAGE
from kvsuite.methods.base import Reader, check_share

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvsuite.kernels.quantspec import Shape


@dataclass(frozen=True)
class Quest(Reader):
    """Keeps everything and reads, at each decoding step, the pages with the highest bound on q·k:
    Σ_d max(q_d · min_d, q_d · max_d), with the smallest and largest number of each key channel in the page,
    in the mean over the query group. ``budget`` is how many tokens' pages are read, the newest page besides; below 1 a
    share of the pages. The first ``dense`` layers read everything. Its memory is the whole cache and what is kept of
    each page. A page is the cache's, 32 tokens; the authors read pages of 16, three at least, of each query head's own
    choice. The default of ``dense`` is theirs."""

    name = "quest"
    stores = "everything, and the smallest and largest number of each key channel of a page; reads some pages"
    source = "Tang et al. 2024, arXiv 2406.10774; mit-han-lab/Quest evaluation/quest_attention.py"

    budget: float = 1024
    dense: int = 2

    def check(self) -> None:
        check_share(self.name, "budget", self.budget)
        if self.dense < 0:
            raise UsageError(f"{self.name}: dense={self.dense} must not be negative")

    def check_context(self, longest: int) -> None:
        if self.budget >= longest:
            raise UsageError(
                f"{self.name}: budget={self.budget:g} reads everything of a context of {longest}; "
                "make it smaller or the prompts longer"
            )

    def reads_all(self, layer: int) -> bool:
        return layer < self.dense

    def summaries(self, head_dim: int, dtype: torch.dtype) -> tuple[tuple[Shape, torch.dtype], ...]:
        return (((2, head_dim), dtype),)

    def summarise(self, k: Tensor, held: Tensor) -> tuple[Tensor, ...]:
        import torch

        empty, far = ~held[..., None], float("inf")
        return (torch.stack([k.masked_fill(empty, far).amin(1), k.masked_fill(empty, -far).amax(1)], 1),)

    def pages(self, q: Tensor, summaries: tuple[Tensor, ...]) -> Tensor:
        low, high = summaries[0].float().unbind(1)
        empty = (low > high).any(-1)
        low, high = (x.masked_fill(empty[:, None], 0.0) for x in (low, high))
        worth = self.worth(q.float(), low, high).masked_fill(empty, float("-inf"))
        wanted = round(self.budget * len(worth)) if self.budget < 1 else int(self.budget) // PAGE
        return worth.topk(min(max(1, wanted), len(worth))).indices.sort().values

    def worth(self, q: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """How much pages are worth reading, (pages,): q (group, head_dim), low and high (pages, head_dim), float32."""
        import torch

        q = q[:, None]
        return torch.maximum(q * low, q * high).sum(-1).mean(0)
