"""What a selector can ask to see: of a prompt while it is prefilled, and while a sequence is decoded. Each is collected
once for all methods, and only where one of them asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:  # selectors are listed without importing torch
    from torch import Tensor


@dataclass(frozen=True)
class Observation:
    """A value: two selectors that ask for equal ones share what is collected."""

    prefilling: ClassVar[bool] = True
    """Whether a prompt shows it while it is prefilled."""
    decoding: ClassVar[bool] = False
    """Whether an eviction can see it while a sequence is decoded."""


@dataclass(frozen=True)
class AttentionMass(Observation):
    """The attention that each token got from all queries so far, mean over the query group: float32 (kv_heads, T)."""

    decoding = True


@dataclass(frozen=True)
class NewestAttention(Observation):
    """The attention that each token got from the newest query, mean over the query group: float32 (kv_heads, T). While
    decoding alone."""

    prefilling = False
    decoding = True


@dataclass(frozen=True)
class LastQueries(Observation):
    """The queries of the newest ``window`` tokens as attention uses them, rotated: (heads, n, head_dim), the newest
    last; n is smaller where fewer tokens have passed."""

    decoding = True
    window: int


class Notes(Protocol):
    """What is kept of hidden states; a frozen dataclass, so that equal ones share it."""

    def note(self, hidden: Tensor, layer: int) -> Tensor:
        """hidden (n, hidden size), what goes into the layer's attention before its projections, to (kv_heads, n), or to
        (1, n) where all heads have the same."""


@dataclass(frozen=True)
class HiddenStates(Observation):
    """What ``notes`` keeps of each token when it passes its hidden state, float32. The states themselves are not held:
    of a whole prompt in all layers they are larger than its K and V. An eviction has at most one of these."""

    decoding = True
    notes: Notes


@dataclass(frozen=True)
class PreRopeMoments(Observation):
    """Mean and covariance of the prompt's queries before RoPE, but for the first ``skip``: (heads, head_dim) and
    (heads, head_dim, head_dim), float32. While prefilling alone."""

    skip: int = 0


@dataclass(frozen=True)
class QueryCentres(Observation):
    """The mean of the prompt's queries before RoPE, and behind it the mean length of each pair of channels that RoPE
    turns together: float32 (heads, head_dim + pairs). While decoding it is the prompt's still."""

    decoding = True


@dataclass(frozen=True)
class ChunkAttention(Observation):
    """The attention that each token but the first and last ones gets from the queries of its own chunk, causal or not:
    the softmax of q·k, *not* divided by √head_dim, over the chunk's keys, summed over its queries, mean over the query
    group: float32 (kv_heads, T - first - last). Chunks begin after the first tokens. While prefilling alone."""

    chunk: int
    first: int = 0
    last: int = 0


@dataclass(frozen=True)
class ExtraPass(Observation):
    """How much each token is looked back at while the context is repeated: float32 (kv_heads, T). After the prefilled
    context the model is fed the context once more, ``chunk`` tokens at a time, each after a request to repeat it. A
    token gets the largest weight that a query of its own chunk's repetition, request included, gives it, over the
    query group. The softmax is over the first ``sinks`` tokens, the chunk in the context, and what is fed.
    ``normalized``: each weight over ‖h‖₂, the query's hidden state before the projections, times ‖W_O v‖₂, what the
    token's value writes by that query head. While prefilling alone."""

    chunk: int = 2000
    sinks: int = 4
    normalized: bool = False
