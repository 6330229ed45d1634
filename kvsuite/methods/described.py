"""All parts of methods as the page docs/methods.md lists them, from their docstrings and fields."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable

from kvsuite.methods.base import Component
from kvsuite.methods.named import NAMED

TITLES = {"selector": "Selectors", "budget": "Budgets", "codec": "Codecs", "reader": "Readers"}
COMMON = {
    "selector": "A `budget` of 0.2 is kvsuite's default, not the authors'.",
    "codec": "Every codec has `skip_first=0` and `skip_last=0` besides: so many first and last layers are stored as\n"
    "`full` stores them.",
}
"""What all of a kind have."""


def markdown(parts: Iterable[type[Component]]) -> str:
    """A heading for each kind that occurs, and under it each part of that kind; then the names for methods."""
    kinds: dict[str, list[type[Component]]] = {}
    for part in parts:
        kinds.setdefault(part.kind, []).append(part)
    sections = [
        "\n\n".join([f"### {TITLES[kind]}", *([COMMON[kind]] if kind in COMMON else []), *map(_described, own)])
        for kind, own in kinds.items()
    ]
    return "\n\n".join([*sections, _named()])


def _described(part: type[Component]) -> str:
    """Name, docstring, parameters with their defaults, what is stored, and the source."""
    text = inspect.cleandoc(part.__doc__ or "").replace("``", "`")
    own = [field for field in dataclasses.fields(part) if not field.kw_only]
    given = ", ".join(f"`{field.name}={_spelled(field.default)}`" for field in own)
    lines = [f"* Parameters: {given}." if given else "* No parameters.", f"* Stores: {part.stores}."]
    return "\n".join([f"#### `{part.name}`\n", f"{text}\n", *lines, f"* Source: {part.source}."])


def _named() -> str:
    rows = [f"| `{name}` | `{method}` |" for name, method in NAMED.items()]
    return "\n".join(["### Names for methods\n", "| name | stands for |", "|---|---|", *rows])


def _spelled(default: object) -> str:
    return "…" if default is None else str(default)
