"""What an engine is asked and what it answers. No torch: servers answer the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

TOGETHER = 8
"""Batches that share the matrix products of one step on a CPU. It does not follow the number of methods, so that an
answer does not depend on which other methods are measured."""


def step_rows(width: int, device: str) -> int:
    """Sequences that a step decodes at most: on a CPU of all methods together, on a GPU of one."""
    return TOGETHER * width if device == "cpu" else width


@dataclass(frozen=True)
class Request:
    """One prompt. ``context`` and ``question`` together are one user message for the chat template; with
    ``compress="context"`` the question is fed afterwards, through the compressed cache."""

    id: str
    context: str
    question: str
    max_new_tokens: int
    before: tuple[tuple[str, str], ...] = ()
    """Role and text of the messages before the user's."""
    opening: str = ""
    """The first words of the answer, which are given."""
    plain: bool = False
    """Whether it is asked without a chat template."""


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
    shared_seconds: float = 0.0
    """Of these, the prefill without observations, which was run once for all methods."""
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
    width: int = 1
    """Rows of the matrix products it was decoded in."""
    cache: str = ""
    """The class that stored and attended, with its module."""
    path: str = ""
    """The codec, and the backend that computed: ``kivi/reference``."""
    refusal: str = ""
    """Why another backend was not taken."""
    artifact: str = ""
    """The hash of what the codec had learned."""
    read_end: int = 0
    """Bytes that the last step read."""
    fragmentation: float = 0.0
    """The share of the slots in use at the end that held no token, mean over layers."""


@dataclass(frozen=True)
class Ask:
    """One request to a server, in the words of OpenAI's chat completions."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    """``{"role": …, "content": …}``, system and tool messages included."""
    max_tokens: int | None = None
    """None leaves the end to the server."""
    temperature: float = 0.0
    seed: int | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the body, such as vLLM's ``cache_salt``."""
    cluster: str = ""
    """What it is about, a document or a conversation; empty where it stands by itself."""


@dataclass
class Reply:
    """What came back, and when. Seconds count from the moment of sending; a reply with an ``error`` failed."""

    id: str
    text: str = ""
    reasoning: str = ""
    """What the model thought aloud (``reasoning_content`` or ``reasoning``): it is waited and paid for like text."""
    tool_calls: str = ""
    """Names and arguments of tool calls, joined as they came."""
    finish: str = ""
    """stop, length, tool_calls …, as the server said; empty where it did not say."""
    tokens: int = 0
    """Tokens generated, reasoning and tool calls included."""
    counted: Literal["usage", "tokenizer", "chunks"] = "usage"
    """Who counted them: the server, the model's tokenizer, or one for each chunk that brought something."""
    usage_tokens: int | None = None
    """What the server said, where the tokenizer did not find it so."""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    """Of the prompt, those the server found in its prefix cache, where it says."""
    start: float = 0.0
    """When it was sent, ``time.perf_counter()``."""
    ttft: float = 0.0
    """To the first chunk that brought text, reasoning or a tool call."""
    gaps: list[float] = field(default_factory=list)
    """Between such chunks; a chunk may bring several tokens."""
    seconds: float = 0.0
    """To the end of the stream."""
    retries: int = 0
    error: str = ""


class Backend(Protocol):
    """Whatever answers an `Ask`: a server behind a URL, or an engine in this process."""

    async def ask(self, ask: Ask) -> Reply:
        """Never raises for what the engine does wrong: that is a `Reply` with an ``error``."""
