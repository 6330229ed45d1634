"""Compactor: keys that span the others, and what chunks attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.cache.observations import ChunkAttention, Observation
from kvsuite.errors import UsageError
from kvsuite.methods.base import BudgetSelector
from kvsuite.methods.selectors.leverage import leverage_of, standard

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.prefill import PrefilledLayer


@dataclass(frozen=True)
class Compactor(BudgetSelector):
    """Keeps the first ``sinks`` and the last ``recent`` tokens, and of the others those with the highest ``blend`` ·
    leverage + attention, both as z-scores over all kv heads of a layer. Leverage is that of the keys before RoPE, as of
    `leverage`. Attention is what a token gets from all queries of its chunk of ``chunk`` tokens, earlier or later ones,
    of logits that are not divided by √d, times ‖v‖₂, averaged over 3 neighbours. Without ``blend`` it is the share of
    tokens that go, as in kvpress, so that a larger budget need not keep a superset. Acts on the prompt alone; while
    decoding all new tokens stay. The defaults are kvpress's."""

    name = "compactor"
    stores = "the first and last tokens, and those with high leverage or attention, per kv head"
    source = "Chari & Van Durme 2025, arXiv 2507.08143; kvpress compactor_press.py, leverage_press.py"
    before_rope = True

    sinks: int = 8
    recent: int = 4
    chunk: int = 256
    sketch: int = 48
    blend: float | None = None
    seed: int = 0

    def check(self) -> None:
        if min(self.sinks, self.recent) < 0 or min(self.chunk, self.sketch) < 1:
            raise UsageError(f"{self.name}: sinks and recent must not be negative, chunk and sketch at least 1")
        super().check()

    @property
    def protects(self) -> tuple[int, str]:
        return self.sinks + self.recent, f"its {self.sinks} first and {self.recent} last tokens"

    @property
    def observes(self) -> tuple[Observation, ...]:
        return (ChunkAttention(self.chunk, self.sinks, self.recent),)

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        from torch.nn.functional import avg_pool1d, pad

        length = seen.k.shape[1]
        inner = slice(self.sinks, length - self.recent)
        attention = seen[self.observes[0]] * seen.v[:, inner].float().norm(dim=-1)
        attention = standard(avg_pool1d(attention, 3, stride=1, padding=1))
        leverage = standard(leverage_of(seen.k_before_rope[:, inner], self.sketch, self.seed, seen.layer))
        blend = 1 - tokens / length if self.blend is None else self.blend
        return pad(blend * leverage + attention, (self.sinks, self.recent), value=float("inf"))
