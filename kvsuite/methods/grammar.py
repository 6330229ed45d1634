"""From text to a method: ``h2o:heavy=64,recent=448 + kivi:bits=4``."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Iterable, Iterator

from kvsuite.errors import UsageError, unknown
from kvsuite.methods.base import Budget, Codec, Component, Method, Reader, Selector
from kvsuite.methods.named import NAMED
from kvsuite.registry import Registry, classes

METHODS = Registry(
    "method",
    "methods",
    classes(Component),
    tuple(f"kvsuite.methods.{k}s" for k in ("selector", "budget", "codec", "reader")),
)


def names() -> dict[str, str]:
    """Every component's name and its module."""
    return METHODS.names()


def component(name: str) -> type[Component]:
    """The class of that name. Raises UsageError with the nearest known one."""
    module = METHODS.module(name)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Component) and getattr(value, "name", "") == name:
            return value
    raise UsageError(f"{module.__name__} defines no method {name!r}")


def catalogue() -> Iterator[type[Component]]:
    """All components, the built-in ones first, and of these the selectors."""
    for name in names():
        yield component(name)


def parse(text: str) -> Method:
    """One method. Raises UsageError, one sentence, for whatever is wrong with it."""
    parts: dict[str, Component] = {}
    known = "+".join(NAMED.get(piece.strip(), piece) for piece in text.split("+"))
    for piece in known.split("+"):
        part = _part(piece.strip(), text)
        if part.kind in parts:
            raise UsageError(f"{text!r} has two {part.kind}s, {parts[part.kind].name} and {part.name}; one can be used")
        parts[part.kind] = part
    selector, budget = parts.get("selector"), parts.get("budget", component("uniform")())
    codec = parts.get("codec", component("full")())
    if selector is None and "budget" in parts:
        raise UsageError(f"{text!r} has a budget but no selector that would need one")
    assert selector is None or isinstance(selector, Selector)
    assert isinstance(budget, Budget)
    if selector is not None:
        budget.check_selector(selector)
    assert isinstance(codec, Codec)
    reader = parts.get("reader")
    assert reader is None or isinstance(reader, Reader)
    return Method(selector, budget, codec, reader)


def parse_all(texts: Iterable[str]) -> list[Method]:
    """Methods out of comma-separated texts, each once, in order. A comma starts a new method unless a ``key=value``
    follows, which belongs to the method before it."""
    found: dict[str, Method] = {}
    for text in texts:
        for piece in re.split(r",(?!\s*[\w-]+\s*=)", text):
            method = parse(piece)
            found.setdefault(method.name, method)
    return list(found.values())


def _part(text: str, whole: str) -> Component:
    name, _, arguments = text.partition(":")
    if not name.strip():
        raise UsageError(f"{whole!r} names no method where one is expected")
    if name.strip() in {named.partition(":")[0] for named in NAMED}:
        raise unknown("method", text, NAMED)
    kind = component(name.strip())
    hints, given = typing.get_type_hints(kind), {}
    fields = [field.name for field in dataclasses.fields(kind)]
    for argument in filter(None, (a.strip() for a in arguments.split(","))):
        key, equals, value = (piece.strip() for piece in argument.partition("="))
        if key not in fields:
            raise unknown(f"parameter of {kind.name}", key, fields)
        if key in given or not equals:
            raise UsageError(f"{kind.name}: write {key}=VALUE once, not {argument!r}")
        given[key] = _value(kind.name, key, value, hints[key])
    part = kind(**given)
    part.check()
    return part


def _value(owner: str, key: str, text: str, hint: typing.Any) -> typing.Any:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        for option in options:
            if str(option) == text:
                return option
        raise UsageError(f"{owner}: {key} is one of {', '.join(map(str, options))}, not {text!r}")
    if hint is str:
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if "." in text and number == 1 and hint is not int:
        raise UsageError(f"{owner}: {key}={text} is neither a share below 1 nor, without a point, a number of tokens")
    if math.isfinite(number) and number.is_integer() and (hint is int or float in (hint, *options)):
        return int(number)
    if math.isfinite(number) and float in (hint, *options):
        return number
    raise UsageError(f"{owner}: {key} must be a {'whole ' if hint is int else ''}number, not {text!r}")
