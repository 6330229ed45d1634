"""All parts of methods as the page docs/methods.md lists them, from their docstrings and fields."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable

from kvsuite.methods.base import Component

TITLES = {"selector": "Selectors", "budget": "Budgets", "codec": "Codecs", "reader": "Readers"}


def markdown(parts: Iterable[type[Component]]) -> str:
    """A heading for each kind that occurs, and under it each part of that kind."""
    kinds: dict[str, list[type[Component]]] = {}
    for part in parts:
        kinds.setdefault(part.kind, []).append(part)
    return "\n\n".join(f"### {TITLES[kind]}\n\n" + "\n\n".join(map(_described, own)) for kind, own in kinds.items())


def _described(part: type[Component]) -> str:
    """Name, docstring, parameters with their defaults, what is stored, and the source."""
    text = inspect.cleandoc(part.__doc__ or "").replace("``", "`")
    given = ", ".join(f"`{field.name}={_spelled(field.default)}`" for field in dataclasses.fields(part))
    lines = [f"* Parameters: {given}." if given else "* No parameters.", f"* Stores: {part.stores}."]
    return "\n".join([f"#### `{part.name}`\n", f"{text}\n", *lines, f"* Source: {part.source}."])


def _spelled(default: object) -> str:
    return "…" if default is None else str(default)
