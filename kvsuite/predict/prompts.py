"""What a predictor sees of a prompt: the meaning of its end, and what can be counted."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvsuite.analysis.resample import Floats

Embed = Callable[[Sequence[str]], tuple[NDArray[np.float32], list[int]]]
"""Of n texts: (n, d) vectors of length 1, and how many word pieces each has."""
TOGETHER = 16
"""Texts that are embedded at once."""
COUNTED = ("tokens", "words", "lines", "question marks", "digits", "capitals", "code")


def counted(text: str, tokens: int) -> list[float]:
    """What `COUNTED` names: logarithms of the whole prompt's tokens and of the text's words and lines, its question
    marks, the shares of digits and capitals among its characters, and whether it has signs of code."""
    size = max(1, len(text))
    return [
        np.log1p(tokens),
        np.log1p(len(text.split())),
        np.log1p(text.count("\n")),
        min(text.count("?"), 5),
        sum(c.isdigit() for c in text) / size,
        sum(c.isupper() for c in text) / size,
        float(bool(re.search(r"```|[{};]\s*$|\bdef \w+\(", text, re.MULTILINE))),
    ]


class Prompt(Protocol):
    """What is known of a prompt, whoever asks."""

    @property
    def prompt(self) -> str:
        """Its recorded end."""

    @property
    def tokens(self) -> int:
        """Of all of it."""


def prompts_of(some: Sequence[Prompt], embed: Embed) -> Floats:
    """(n, features), of the prompts of entries of any kind."""
    return features([p.prompt for p in some], [p.tokens for p in some], embed)


def features(texts: Sequence[str], tokens: Sequence[int], embed: Embed) -> Floats:
    """(n, len(COUNTED) + d): what is counted first, then the embeddings. Equal texts are embedded once."""
    unique = list(dict.fromkeys(texts))
    vectors = np.concatenate([embed(unique[at : at + TOGETHER])[0] for at in range(0, len(unique), TOGETHER)])
    at = {text: place for place, text in enumerate(unique)}
    counts = np.array([counted(text, n) for text, n in zip(texts, tokens, strict=True)])
    return np.column_stack([counts, np.asarray(vectors, dtype=float)[[at[text] for text in texts]]])
