"""What an engine is asked and what it answers. No torch: servers answer the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Request:
    """One prompt. ``context`` and ``question`` together are one user message for the chat template; with
    ``compress="context"`` the question is fed afterwards, through the compressed cache."""

    id: str
    context: str
    question: str
    max_new_tokens: int


@dataclass
class Response:
    """One answer of one method, and what was measured while it was made. Seconds are wall time."""

    id: str
    method: str
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: Literal["stop", "length", "error"] = "length"
    error: str = ""
    prompt_tokens: int = 0
    context_tokens: int = 0
    """How many of the prompt's tokens were prefilled and compressed; the others are the suffix."""
    prefill_seconds: float = 0.0
    """The shared prefill, with the observations only where this method asked for them, and its own compression."""
    decode_seconds: float = 0.0
    """The steps it took part in, which it shared with its batch mates: what its reader waited."""
    decode_share: float = 0.0
    """Its part of those seconds, each step divided by the sequences in it: these add up over a method's answers."""
    nbytes: int = 0
    """Bytes its caches held when the prompt was in, all layers."""
    nbytes_end: int = 0
    """Bytes held when the answer ended, and what K and V of all its tokens would take uncompressed."""
    dense_end: int = 0
    kept: int = 0
    """Tokens held then, summed over layers and kv heads."""
    margins: list[float] = field(default_factory=list)
    """The gap between the two highest logits at every token."""
    repeat: int = 0
    """Which draw of the sampling noise."""
    cache: str = ""
    """The class that stored and attended, with its module."""
    path: str = ""
    """The codec, and whether a fused kernel or the reference ran: ``kivi/unfused``."""
