"""What a selector can ask to see: of a prompt while it is prefilled, and while a sequence is decoded. Each is collected
once for all methods, and only where one of them asks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


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


@dataclass(frozen=True)
class HiddenStates(Observation):
    """What goes into each layer's attention, before its projections: (T, hidden size). While prefilling alone."""


@dataclass(frozen=True)
class PreRopeMoments(Observation):
    """Mean and covariance of the prompt's queries before RoPE, but for the first ``skip``: (heads, head_dim) and
    (heads, head_dim, head_dim), float32. While prefilling alone."""

    skip: int = 0


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
    """The most attention that each token gets when the model is fed ``prompt`` and then the context once more: float32
    (kv_heads, T), the maximum over queries and the query group. While prefilling alone."""

    prompt: str
    chunk: int = 2000
    """Tokens of the context that follow the prompt at a time."""
