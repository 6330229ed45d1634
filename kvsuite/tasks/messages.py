"""Tasks made of presidential messages: what they share. No task itself."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

from kvsuite import models
from kvsuite.tasks.base import Task

Tokens = Callable[[str], int]


class MessageTask(Task):
    """A task whose texts are the 249 presidential messages, one file each: ``1962-Kennedy-1.txt``."""

    def fetch(self) -> list[Path]:
        return sorted(models.messages().glob("*.txt"))


def sentences(text: str) -> list[str]:
    """A text's sentences, white space made even."""
    return re.split(r"(?<=[.!?;])\s+", " ".join(text.split()))


def first_sentences(text: str, length: int, tokens: Tokens) -> list[str] | None:
    """The first sentences of a text that fill ``length`` tokens, or None where it is too short."""
    return _filled(sentences(text), length, tokens)


def excerpt(file: Path, order: random.Random, length: int, tokens: Tokens) -> list[str]:
    """Consecutive sentences of a message from a random one on, ``length`` tokens at most; empty where that is shorter
    than its first sentence, or the message ends before."""
    text = sentences(file.read_text(encoding="utf-8"))
    return _filled(text[order.randrange(len(text)) :], length, tokens) or []


def _filled(text: list[str], length: int, tokens: Tokens) -> list[str] | None:
    taken: list[str] = []
    for sentence in text:
        length -= tokens(" " + sentence)
        if length < 0:
            return taken
        taken.append(sentence)
    return None


def president(file: Path) -> str:
    """Who gave a message: the file is ``YEAR-NAME-NUMBER.txt``."""
    return file.stem.split("-")[1]


def year(file: Path) -> int:
    """When it was given."""
    return int(file.stem.split("-")[0])
