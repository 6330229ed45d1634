"""What a server says of itself: on its pages, on ``/metrics`` and in its log, through a profile's eyes."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from kvsuite import disk
from kvsuite.engines.profile import SOURCE, Profile
from kvsuite.typed import finite

Get = Callable[[str], Awaitable[tuple[int, str]]]
"""A path of the server → status and text."""
SAMPLE = re.compile(r"^(?P<name>[^\s{#]+)(?:\{(?P<labels>.*)\})?[ \t]+(?P<value>\S+)", re.MULTILINE)
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", re.IGNORECASE)
SIZE = re.compile(r"(\d+(?:\.\d+)?) ([KMGT])i?B")
"""Servers that write GB mean 2^30 bytes, too."""
MOST = 1e18
"""What is no figure of a server any more."""


async def facts(profile: Profile, get: Get, log: str) -> dict[str, Any]:
    """What it runs with, by the profile's names: numbers as numbers, features under ``features``. What no source says
    is left out."""
    pages: dict[str, str] = {}

    async def page(path: str) -> str:
        if path not in pages:
            status, text = await get(path)
            pages[path] = text if status == 200 else ""
        return pages[path]

    async def first(sources: Sequence[str]) -> Any:
        for source in sources:
            said = await _read(source, page, log)
            if said not in (None, ""):
                return _value(said)
        return None

    found = {name: await first(sources) for name, sources in profile.facts.items()}
    if found.get("kv_tokens") is None and found.get("kv_blocks") and found.get("block_size"):
        found["kv_tokens"] = found["kv_blocks"] * found["block_size"]
    features = {name: await first(sources) for name, sources in profile.features.items()}
    features = {name: str(value) for name, value in features.items() if value is not None}
    return {name: value for name, value in found.items() if value is not None} | {"features": features}


async def counters(profile: Profile, get: Get) -> dict[str, float]:
    """What it has counted since it started, by the profile's names."""
    if not profile.counters:
        return {}
    status, text = await get("/metrics")
    known = series(text) if status == 200 else []
    sums: dict[str, float] = {}
    for name, metric in profile.counters.items():
        values = [_float(value) for found, _, value in known if found == metric]
        if values:
            sums[name] = sum(values)
    return sums


def since(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """What was counted in between; a server that was started anew counts from 0."""
    return {name: value - (b if (b := before.get(name, 0.0)) <= value else 0.0) for name, value in after.items()}


def series(text: str) -> list[tuple[str, dict[str, str], str]]:
    """Name, labels and value of every line of a page in Prometheus' text format."""
    return [
        (m["name"], {k: _plain(v) for k, v in LABEL.findall(m["labels"] or "")}, m["value"])
        for m in SAMPLE.finditer(text)
    ]


def _plain(label: str) -> str:
    return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], label)


async def _read(source: str, page: Callable[[str], Awaitable[str]], log: str) -> Any:
    match = SOURCE.fullmatch(source)
    assert match is not None, "checked when the profile was loaded"
    metric, name, label, get, path, keys, _, pattern = match.groups()
    if metric:
        values = [
            labels.get(label) if label else value for n, labels, value in series(await page("/metrics")) if n == name
        ]
        return next((v for v in values if v not in (None, "", "None")), None)
    if get:
        return _inside(await page(path), keys)
    found = re.findall(pattern, log)  # the last: of a server that was started twice
    last = found[-1] if found else None
    return "/".join(dict.fromkeys(filter(None, last))) if isinstance(last, tuple) else last  # of K and of V: "q8_0/f16"


def _inside(text: str, keys: str) -> Any:
    try:
        found = disk.parsed(text)
        for key in keys.split("."):
            found = found[int(key)] if isinstance(found, list) else found[key]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return found


def _value(said: Any) -> Any:
    """A number where it is one: 46592 for 46,592 and for 4.6592e+04; bytes for a size such as 90.00 MiB."""
    if isinstance(said, (bool, dict, list)):
        return said if finite(said) else None
    text = str(said).strip().replace(",", "")
    size = SIZE.fullmatch(text)
    number = float(size[1] if size else text) if size or NUMBER.fullmatch(text) else math.nan
    if not abs(number) < MOST:
        return str(said)
    if size:
        return round(number * 1024 ** ("KMGT".index(size[2]) + 1))
    return int(number) if number.is_integer() else number


def _float(text: str) -> float:
    try:
        return number if abs(number := float(text)) < MOST else 0.0
    except ValueError:
        return 0.0
