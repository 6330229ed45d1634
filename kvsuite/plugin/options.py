"""What a run was asked to do: read once from the command line and ``[tool.kvsuite]``, checked, then frozen."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from kvsuite import models, tasks
from kvsuite.errors import UsageError, unknown
from kvsuite.methods import Method, parse, parse_all

BASELINE = parse("full")
CONTROL = parse("jitter")
DEFAULT_METHODS = (
    "full,jitter,int8,kivi:bits=4,kivi:bits=2,streaming-llm:budget=256,h2o:budget=256,random:budget=256,"
    "h2o:budget=256+kivi:bits=4"
)
HELP = {
    "model": "a model folder in Hugging Face's layout (default: SmolLM2-135M-Instruct, fetched once)",
    "methods": "methods, comma-separated, e.g. kivi:bits=4,h2o:budget=256+int8; full and jitter always take part",
    "compress": "what is compressed: the whole prompt, or the context, the question being fed through the cache",
    "batch": "the fixed width of decoding batches",
    "length": "prompt lengths in tokens, comma-separated",
    "tasks": "tasks, comma-separated",
    "samples": "samples per task",
    "seed": "seed of samples and noise",
    "dtype": "auto (the model's own), bfloat16 or float32",
    "device": "cpu or cuda",
}
DEFAULTS: dict[str, Any] = {
    "model": "",
    "methods": DEFAULT_METHODS,
    "compress": "prompt",
    "batch": 8,
    "length": "512,1024,2048,4000",
    "tasks": "needle",
    "samples": 16,
    "seed": 0,
    "dtype": "auto",
    "device": "cpu",
}
CHOICES = {
    "compress": ("prompt", "context"),
    "dtype": ("auto", "bfloat16", "float32"),
    "device": ("cpu", "cuda"),
}
SHORTEST = 256
"""Tokens below which no task can be told."""


@dataclass(frozen=True)
class Options:
    """One run's settings."""

    model: Path | None
    methods: tuple[Method, ...]
    compress: Literal["prompt", "context"]
    batch: int
    length: tuple[int, ...]
    tasks: tuple[str, ...]
    samples: int
    seed: int
    dtype: str
    device: str


def add(parser: pytest.Parser) -> None:
    """Declare ``--kv-…``. Defaults are filled in by `read`, so that the configuration file can come between."""
    group = parser.getgroup("kvsuite", "KV-cache compression")
    for key, text in HELP.items():
        shown = "" if key in ("model", "methods") else f" (default: {DEFAULTS[key]})"
        group.addoption(f"--kv-{key}", dest=f"kv_{key}", default=None, metavar=key.upper(), help=text + shown)


def read(config: pytest.Config) -> Options:
    """The run's options; nothing is loaded. Raises UsageError, one sentence, naming the option."""
    given = _configured(config.rootpath / "pyproject.toml")
    given |= {key: value for key in HELP if (value := config.getoption(f"kv_{key}")) is not None}
    return check(given)


def check(given: Mapping[str, Any]) -> Options:
    """Options out of raw values by key; keys left out take their defaults. Raises UsageError."""
    raw = DEFAULTS | dict(given)
    for key, known in CHOICES.items():
        if raw[key] not in known:
            raise unknown(f"value of --kv-{key}", str(raw[key]), known)
    lengths = tuple(_whole("length", x, SHORTEST) for x in _items(raw["length"]))
    methods = tuple({m.name: m for m in (BASELINE, CONTROL, *parse_all(_texts(raw["methods"])))}.values())
    chosen = tuple(dict.fromkeys(tasks.task(name).name for name in _items(raw["tasks"])))
    for key, values in (("length", lengths), ("tasks", chosen)):
        if not values:
            raise UsageError(f"--kv-{key} is empty")
    for method in methods:
        method.check_context(max(lengths))
    model = Path(raw["model"]) if raw["model"] else None
    limit = models.model_limit(model) if model else 8192
    if limit is not None and max(lengths) >= limit:
        raise UsageError(f"--kv-length {max(lengths)} does not fit the model's context of {limit} tokens")
    return Options(
        model=model,
        methods=methods,
        compress=raw["compress"],
        batch=_whole("batch", raw["batch"], 1),
        length=lengths,
        tasks=chosen,
        samples=_whole("samples", raw["samples"], 1),
        seed=_whole("seed", raw["seed"], 0),
        dtype=raw["dtype"],
        device=raw["device"],
    )


def _configured(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    table = tomllib.loads(file.read_text()).get("tool", {}).get("kvsuite", {})
    for key in table:
        if key not in HELP:
            raise unknown("key of [tool.kvsuite]", key, HELP)
    return dict(table)


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(item) for item in value]


def _items(value: Any) -> list[str]:
    values = value if isinstance(value, list) else str(value).split(",")
    return [text for item in values if (text := str(item).strip())]


def _whole(key: str, value: Any, least: int) -> int:
    try:
        number = int(str(value))
    except ValueError:
        raise UsageError(f"--kv-{key} must be a whole number, not {str(value)!r}") from None
    if number < least:
        raise UsageError(f"--kv-{key} must be at least {least}, not {number}")
    return number
