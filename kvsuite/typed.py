"""Whether values that were read from JSON are of the types that ours have."""

from __future__ import annotations

import functools
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

NUMBERS: dict[Any, tuple[set[type], float]] = {int: ({int}, 2**63 - 1), float: ({int, float}, sys.float_info.max)}
"""The types that JSON has for numbers of ours, and the most they can be."""


@functools.cache
def fits(hint: Any) -> Callable[[Any], bool]:
    """The check for a type: str, bool, int, float, None, a list, a dict by text, or a union of these. Numbers are
    finite, in dicts and lists of anything, too."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return lambda value: any(fits(one)(value) for one in inner)
    if origin is list:
        return lambda value: type(value) is list and all(map(fits(inner[0]), value))
    if origin is dict and inner[1] is not Any:
        return lambda value: isinstance(value, dict) and all(map(fits(inner[1]), value.values()))
    if hint in NUMBERS:
        kinds, most = NUMBERS[hint]
        return lambda value: type(value) in kinds and -most <= value <= most
    kind = origin or hint
    if kind in (dict, list):
        return lambda value: isinstance(value, kind) and finite(value)
    return lambda value: type(value) is kind


def finite(value: Any) -> bool:
    """Whether all numbers in it are."""
    if isinstance(value, (dict, list)):
        return all(map(finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


Shape = Mapping[str, Any]
"""Keys, and types, or the shapes of what they hold; of what may be null, in a tuple. A key that ends with a question
mark may be missing."""


def amiss(found: Any, shape: Shape, whole: bool, where: str = "") -> str:
    """What is wrong with a dict from JSON, in a few words; empty where nothing is. ``whole``: something that is missing
    is wrong, too."""
    if not isinstance(found, dict):
        return f"{where.removesuffix('.') or 'this'} is no JSON object"
    for key, kind in shape.items():
        name = key.removesuffix("?")
        value = found.get(name)
        if name not in found:
            if whole and key == name:
                return f"it has no {where}{name}"
        elif isinstance(kind, (Mapping, tuple)):
            inner = kind[0] if isinstance(kind, tuple) else kind
            if (value is not None or inner is kind) and (said := amiss(value, inner, whole, f"{where}{name}.")):
                return said
        elif not fits(kind)(value):
            return f"{where}{name} cannot be {repr(value)[:40]}"
    return ""
