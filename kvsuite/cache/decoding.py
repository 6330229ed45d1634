"""What a method does to a sequence while it is decoded: evict tokens, or read some of them only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from kvsuite.cache.observations import AttentionMass, NewestAttention, Observation

if TYPE_CHECKING:  # selectors are listed without importing torch
    import torch
    from torch import Tensor

    from kvsuite.kernels.quantspec import Shape
    from kvsuite.kernels.rope import Rope

UNLIMITED = 2**31 - 1
"""The budget of a head that keeps everything, also while decoding."""


@dataclass(frozen=True)
class DecodeState:
    """What an eviction sees. Leading dimensions (…) are the sequences that act together; there are none in a
    compaction."""

    positions: Tensor
    """int32 (…, kv_heads, n): each slot's token's position, -1 where it holds none."""
    num_seen: Tensor
    """int64 (…, 1, 1): tokens that have passed."""
    parameters: tuple[Tensor, ...]
    """Each int32 (…, 1, 1): what `Eviction.parameters` gave for the sequence."""
    accumulated_attention: Tensor | None = None
    """float32 (…, kv_heads, n), where `AttentionMass` is observed."""
    newest_attention: Tensor | None = None
    """float32 (…, kv_heads, n), where `NewestAttention` is observed."""
    noted: Tensor | None = None
    """float32 (…, kv_heads, n): what was kept of each token's hidden state, where `HiddenStates` is observed."""
    queries: Tensor | None = None
    """(heads, window, head_dim), the newest last, where `LastQueries` is observed; in a compaction alone."""
    k: Tensor | None = None
    """(kv_heads, n, head_dim), as attention reads them; in a compaction alone."""
    query_centres: Tensor | None = None
    """(heads, head_dim + pairs), where `QueryCentres` is observed; in a compaction alone."""
    rope: Rope | None = None
    """The layer's; in a compaction alone."""


class Eviction(Protocol):
    """Keeps a sequence at its budget while it is decoded."""

    @property
    def every(self) -> int:
        """1: after each step one token per head beyond the budget is evicted, and the next token takes its slot where
        the codec stores tokens singly. More: after so many steps of a sequence it is compacted to its budget."""

    @property
    def observes(self) -> tuple[Observation, ...]:
        """What it must see of each step."""

    @property
    def rerotated_sinks(self) -> int:
        """How many first tokens' keys stand where the cache has them, not where the text has them."""

    def parameters(self, length: int) -> tuple[int, ...]:
        """Whole numbers of its own for a sequence with a context of ``length``."""

    def score(self, state: DecodeState) -> Tensor:
        """float32 (…, kv_heads, n): the lowest is evicted, the highest stay. Empty slots' scores do not count."""


@dataclass(frozen=True)
class LowestEviction:
    """After each step evicts the token with the lowest value of a field, but neither the first nor the most recent
    tokens. A backend may do it by itself (`kvsuite.kernels.cpu.evict_lowest`)."""

    field: Literal["positions", "accumulated_attention", "newest_attention"]
    first: int = 0
    """Tokens at positions below it stay."""
    recent: Callable[[int], int] | None = None
    """How many of the most recent tokens stay, by the length of the context; None: not even the newest."""
    rerotated_sinks: int = 0
    every: ClassVar[int] = 1

    @property
    def observes(self) -> tuple[Observation, ...]:
        """Where the field comes from."""
        sources = {"accumulated_attention": AttentionMass(), "newest_attention": NewestAttention()}
        return (sources[self.field],) if self.field in sources else ()

    def parameters(self, length: int) -> tuple[int, ...]:
        """How many of the most recent tokens stay, where some do."""
        return () if self.recent is None else (self.recent(length),)

    def score(self, state: DecodeState) -> Tensor:
        """The field, infinite for tokens that stay."""
        values: Tensor = getattr(state, self.field)
        stays = state.positions < self.first
        for recent in state.parameters:
            stays = stays | (state.positions >= state.num_seen - recent)
        return values.float().masked_fill(stays, float("inf"))


@dataclass(frozen=True)
class Compaction:
    """Every so many steps of a sequence keeps the highest scores of each head's tokens."""

    every: int
    observes: tuple[Observation, ...]
    of_head: Callable[[DecodeState, int, Tensor], Tensor]
    """The scores (n,) of one kv head's slots that hold a token, int64 (n,), in order of position."""
    rerotated_sinks: ClassVar[int] = 0

    def parameters(self, length: int) -> tuple[int, ...]:
        """None."""
        return ()

    def score(self, state: DecodeState) -> Tensor:
        """Head by head."""
        assert state.k is not None
        scores = state.k.float().new_zeros(state.positions.shape)
        for head, positions in enumerate(state.positions):
            held = positions.argsort()[(positions < 0).sum() :]
            scores[head, held] = self.of_head(state, head, held)
        return scores


class PageReader(Protocol):
    """Chooses the pages that attention reads, per kv head and query."""

    def summaries(self, head_dim: int, dtype: torch.dtype) -> tuple[tuple[Shape, torch.dtype], ...]:
        """Shape and dtype of what is kept of each page, field by field; ``dtype`` is the K/V dtype."""

    def summarise(self, k: Tensor, held: Tensor) -> tuple[Tensor, ...]:
        """k (pages, PAGE, head_dim) and bool (pages, PAGE), which slots hold a token, to the fields (pages, *shape)."""

    def pages(self, q: Tensor, summaries: tuple[Tensor, ...]) -> Tensor:
        """Which of a head's pages are read: q (group, head_dim) and the fields (pages, *shape) to int64 (n,),
        ascending. The newest token's page is read besides."""
