"""Which arms both sides run, and what they are asked. Read in kvsuite's environment only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvsuite.methods import parse
from kvsuite.tasks.base import task

SHARES = (1 / 4, 1 / 2, 1 / 8, 3 / 8, 3 / 4, 5 / 8, 1 / 16, 7 / 8)
"""Budgets as shares of the nominal length; the first ones come first."""
QUESTION = (
    "\n\nWhich two measures does this message ask the Congress to take, "
    "and which reason does it give for each of them? Answer briefly."
)
"""About 30 tokens with the end of the chat template."""
PEERS = (
    ("random:budget={n}", "RandomPress"),
    ("streaming-llm:budget={n},positions=absolute", "StreamingLLMPress"),
    ("observed-attention:budget={n}", "ObservedAttentionPress"),
    ("knorm:budget={n}", "KnormPress"),
    ("snapkv:budget={n}", "SnapKVPress"),
    ("expected-attention:budget={n}", "ExpectedAttentionPress"),
    ("tova:budget={n}", "TOVAPress"),
)
"""A selector of kvsuite with a budget, and the press that does the same to a context."""


@dataclass(frozen=True)
class Arm:
    """One method, as each side calls it."""

    name: str
    """For kvsuite: ``h2o:budget=500``."""
    press: str | None = None
    """kvpress's class; None leaves the cache whole."""
    tokens: int | None = None
    """How many tokens of the context stay, per head."""


def arms(count: int, length: int) -> list[dict[str, Any]]:
    """``count`` arms: full, and every selector that both sides have, budget after budget, until there are enough."""
    found = [Arm("full")]
    for share in SHARES:
        tokens = round(share * length)
        found += [Arm(parse(spelling.format(n=tokens)).name, press, tokens) for spelling, press in PEERS]
    if len(found) < count:
        raise SystemExit(f"both sides have {len(found)} arms in common, not {count}")
    return [asdict(arm) for arm in found[:count]]


def prompts(count: int, length: int, tokens: Callable[[str], int]) -> list[dict[str, str]]:
    """``count`` presidential messages cut to about ``length`` tokens, with a question."""
    samples: Sequence[Any] = task("digest").samples(count, [length], 0, tokens)
    return [{"id": sample.id, "context": sample.context, "question": QUESTION} for sample in samples]


def short(prompt: dict[str, str], words: int = 250) -> dict[str, str]:
    """The beginning of a prompt: to warm up, and to choose a dtype."""
    return {**prompt, "context": " ".join(prompt["context"].split()[:words])}
