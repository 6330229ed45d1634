"""The one exception for a user's mistake, and the nearest known name to help with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

LONGEST = 4000
"""Characters of a sentence that are shown."""


def printable(text: str) -> str:
    """Text that a terminal shows and cannot take for a command: what is neither printable nor the end of a line stands
    there as Python writes it, ``\\x1b``."""
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign == "\n" else repr(sign)[1:-1] for sign in text)


def sentence(text: str) -> str:
    """The same on one line, and not too long."""
    shown = printable(text[: LONGEST + 1]).replace("\n", " ")
    return shown if len(shown) <= LONGEST else shown[:LONGEST] + "…"


class UsageError(ValueError):
    """Bad input. Its text is one sentence for the user; pytest and the command line print it and exit with 4 or 2."""

    def __init__(self, text: str) -> None:
        super().__init__(sentence(text))


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The sentence for a name that does not exist: what it was, the nearest known one, and all that are known."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UsageError(f"unknown {kind} {name!r}: {hint}known are {', '.join(names) or 'none'}")


def first_line(error: BaseException) -> str:
    """An exception in one line: its type and the beginning of its text, without a stop at the end."""
    text = printable(str(error).strip().partition("\n")[0][:200].rstrip(" .:"))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
