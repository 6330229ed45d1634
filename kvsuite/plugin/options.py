"""What a run was asked to do: read once from the command line and ``[tool.kvsuite]``, checked, then frozen."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pytest

from kvsuite import configs, disk, environment, models, registry, shapes, tasks
from kvsuite.analysis.gates import POLICIES, Gates
from kvsuite.errors import UsageError, unknown
from kvsuite.kernels import BACKENDS
from kvsuite.margins import Margins
from kvsuite.methods import Method, parse, parse_all
from kvsuite.modes import MODES, PAGED
from kvsuite.plugin import servers
from kvsuite.plugin.declared import HELP
from kvsuite.presets import PRESETS

BASELINE = parse("full")
CONTROL = parse("jitter")
CHOICES = {
    **servers.CHOICES,
    "compress": ("prompt", "context"),
    "dtype": ("auto", "bfloat16", "float32"),
    "device": ("cpu", "cuda"),
    "backend": ("auto", *BACKENDS),
    "executor": ("here", "ray"),
    "strict": ("yes", "no"),
    "undecided": POLICIES,
}
SHORTEST = 256
"""Tokens below which no task can be told."""


@dataclass(frozen=True)
class Options:
    """One run's settings."""

    preset: str
    model: Path | None
    """A folder, or a name on Hugging Face's hub: `models.located` says where it is."""
    methods: tuple[Method, ...]
    compress: Literal["prompt", "context"]
    batch: tuple[int, ...]
    length: tuple[int, ...]
    cells: tuple[tuple[int, int], ...]
    """What is timed: batch and length."""
    beyond: int
    """Cells of the preset that the model's context is too short for."""
    modes: tuple[str, ...]
    """In which decoding is timed, besides kvsuite's own kernels."""
    tasks: tuple[str, ...]
    samples: Mapping[str, int]
    """How many of each task; of one that is not named, as many as under the empty name."""
    cap: int
    temperature: float
    repeats: int
    """Answers of an arm to each chat, with other noise."""
    references: tuple[float, ...]
    """Temperatures at which the uncompressed cache answers chats, too."""
    rounds: int
    timeout: float
    memory: float
    """GiB."""
    seed: int
    dtype: str
    device: str
    backend: str
    run: Path | None
    resume: Path | None
    learn: tuple[Path, ...]
    """Runs that the tools learn from; where none is named, this one."""
    executor: str
    ray_address: str
    margins: Margins
    gates: Gates
    strict: bool
    """Whether servers that are broken, fail or differ end the run with an error."""
    servers: servers.Servers | None
    """What is compared instead of methods, if anything."""

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of what is compared."""
        return tuple(m.name for m in self.methods) if self.servers is None else tuple(self.servers.specs)

    @cached_property
    def limit(self) -> int | None:
        """The most tokens a prompt and its answer can have, where that is known before anything is loaded."""
        if self.model is None:
            return None if self.servers else 8192
        if self.servers and self.model.is_file():  # GGUF
            return None
        return models.model_limit(self.model)

    @property
    def width(self) -> int:
        """The width at which answers are made."""
        return max(self.batch)

    def settings(self) -> dict[str, Any]:
        """What two runs must share to be compared, as JSON; methods and folders may differ."""
        shared = (
            "compress",
            "batch",
            "length",
            "tasks",
            "samples",
            "cap",
            "temperature",
            "repeats",
            "seed",
            "dtype",
            "device",
            "backend",
        )
        own = {key: list(v) if isinstance(v := getattr(self, key), tuple) else v for key in shared}
        if set(self.cells) != {(n, length) for n in self.batch for length in self.length}:
            own["cells"] = [f"{n}x{length}" for n, length in self.cells]
        own["tasks"] = [tasks.task(name).spelled for name in self.tasks]
        return own if self.servers is None else own | self.servers.settings()


METHODS_ONLY = (
    *("methods", "compress", "dtype", "device", "backend", "memory", "executor", "ray-address"),
    *("repeats", "reference-temperatures", "cells", "modes"),
)
"""Options that would do nothing to a server: refused on a command line, overlooked in a file that serves both."""


def read(config: pytest.Config) -> Options:
    """The run's options; of what they name only the user's own files are loaded. Raises UsageError, one sentence,
    naming the option."""
    given = _configured(config.rootpath / "pyproject.toml")
    here = {key: value for key in HELP if (value := config.getoption(f"kv_{key}")) is not None}
    own = _items("plugin", given.pop("plugin")) if "plugin" in given else []
    for file in [*(config.rootpath / name for name in own), *map(Path, here.pop("plugin", []))]:
        registry.load(file)
    if {"baseline", "variant"} & {*given, *here} and (own := [key for key in METHODS_ONLY if key in here]):
        raise UsageError(f"--kv-{own[0]} is about methods in this process; servers are configured by their own options")
    named = here.get("gate", [])
    options = check(given | here | {"gate": [*_texts("gate", given.get("gate", [])), *named]})
    for gate in options.gates.gates:
        if gate.text in map(str.strip, named) and not any(map(gate.matches, options.arms)):
            raise unknown(f"method of --kv-gate {gate.text!r}:", gate.pattern, options.arms)
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist that replaces another finds its records
        _check_folders(options)
    return options


def check(given: Mapping[str, Any]) -> Options:
    """Options out of raw values by key; keys left out take the preset's. Raises UsageError."""
    preset = str(given.get("preset", "smoke"))
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    raw = PRESETS[preset] | {key: value for key, value in given.items() if key != "preset"}
    for key, known in CHOICES.items():
        if raw[key] not in known:
            raise unknown(f"value of --kv-{key}", str(raw[key]), known)
    texts = raw["methods"] if isinstance(raw["methods"], list) else [raw["methods"]]
    methods = {m.name: m for m in (BASELINE, CONTROL, *parse_all(map(str, texts)))}
    lengths = tuple(sorted({_whole("length", x, SHORTEST) for x in _items("length", raw["length"])}))
    batches = tuple(sorted({_whole("batch", x, 1) for x in _items("batch", raw["batch"])}))
    if {"batch", "length"} & given.keys() and "cells" not in given:
        raw["cells"] = ""
    cells = _cells(raw["cells"]) if raw["cells"] else tuple((n, length) for n in batches for length in lengths)
    options = Options(
        preset=preset,
        model=Path(str(raw["model"])) if raw["model"] else None,
        methods=tuple(methods.values()),
        compress=raw["compress"],
        batch=batches,
        length=lengths,
        cells=cells,
        beyond=0,
        modes=_modes(raw["modes"]),
        tasks=tuple(dict.fromkeys(tasks.task(name).name for name in _items("tasks", raw["tasks"]))),
        dtype=raw["dtype"],
        device=raw["device"],
        backend=raw["backend"],
        temperature=_number("temperature", raw["temperature"]),
        references=_references(raw["reference-temperatures"]),
        timeout=_number("timeout", raw["timeout"]),
        memory=_number("memory", raw["memory"]) if raw["memory"] else environment.memory() / 4,
        run=Path(str(raw["run"])) if raw["run"] else None,
        resume=Path(str(raw["resume"])) if raw["resume"] else None,
        learn=tuple(map(Path, _items("learn", raw["learn"]))) if raw["learn"] else (),
        executor=raw["executor"],
        ray_address=str(raw["ray-address"]),
        margins=Margins.parse(f"{PRESETS[preset]['margins']},{raw['margins']}"),
        gates=Gates.of(_texts("gate", raw["gate"]), raw["undecided"], str(raw["against"]), str(raw["acknowledged"])),
        strict=raw["strict"] == "yes",
        servers=servers.check(raw | {"variant": _texts("variant", raw["variant"])}, _number),
        **{key: _whole(key, raw[key], 0 if key == "seed" else 1) for key in ("cap", "repeats", "rounds", "seed")},
        samples=_counts(raw["samples"]),
    )
    if options.servers is None and options.model is not None:
        configs.refuse(models.model_config(options.model))
    _check_drawn(options)
    if "cells" not in given and options.limit is not None:
        fits = tuple(cell for cell in cells if cell[1] + tasks.FRAME <= options.limit or cell[1] in lengths)
        options = replace(options, cells=fits, beyond=len(cells) - len(fits))
    _check_sizes(options)
    return options


def _check_drawn(options: Options) -> None:
    if options.temperature:
        if options.temperature in options.references:
            raise UsageError(f"--kv-reference-temperatures {options.temperature:g} is the run's own --kv-temperature")
    elif options.repeats > 1:
        raise UsageError(f"--kv-repeats {options.repeats}: at --kv-temperature 0 every repeat is the same answer")
    elif options.references:
        raise UsageError("--kv-reference-temperatures: at --kv-temperature 0 nothing is drawn that they could change")


def _check_sizes(options: Options) -> None:
    if options.device == "cuda" and not environment.cuda_driver():
        raise UsageError("--kv-device cuda: this machine has no CUDA driver (libcuda)")
    longest = {"length": max(options.length), "cells": max(length for _, length in options.cells)}
    if options.servers is None:
        for method in options.methods:
            method.check_context(max(longest.values()))
    for key, most in longest.items():
        if options.limit is not None and most + tasks.FRAME > options.limit:
            raise UsageError(f"--kv-{key} {most} does not fit the model's context of {options.limit} tokens")
    if "flash-attn" in options.modes:
        _check_flash(options)
    if options.servers is not None and shapes.is_shape(options.model):
        raise UsageError(f"--kv-model {options.model}: a shape has no weights that a server could load")


def _check_flash(options: Options) -> None:
    if importlib.util.find_spec("flash_attn") is None:
        raise UsageError("--kv-modes flash-attn needs flash-attn, which is not installed: pip install 'kvsuite[cuda]'")
    if options.device != "cuda":
        raise UsageError("--kv-modes flash-attn needs --kv-device cuda")


def _check_folders(options: Options) -> None:
    for folder in options.learn:
        if not disk.is_file(folder / "run.json"):
            raise UsageError(f"--kv-learn {str(folder)!r} is not a run folder")
    if options.resume is not None:
        if options.run is not None:
            raise UsageError("--kv-run names a new run's folder, --kv-resume an old one's: give one of them")
        if options.servers is not None:
            raise UsageError("--kv-resume: a comparison of servers cannot be resumed, since its legs belong together")
        if not disk.is_file(options.resume / "run.json"):
            raise UsageError(f"--kv-resume {str(options.resume)!r} is not a run folder")


def _configured(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        table = disk.toml(file).get("tool", {})
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{file} is no TOML: {error}") from error
    table = table.get("kvsuite", {}) if isinstance(table, dict) else table
    if not isinstance(table, dict):
        raise UsageError("kvsuite under [tool] must be a table of options")
    gates = table.pop("gates", {})
    if not isinstance(gates, dict) or not all(isinstance(text, str) for text in gates.values()):
        raise UsageError('[tool.kvsuite.gates] has lines NAME = "GATE"')
    for key in table:
        if key not in HELP:
            raise unknown("key of [tool.kvsuite]", key, HELP)
    return table | ({"gate": list(gates.values())} if gates else {})


def _items(key: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else str(value).split(",")
    items = [text for item in values if (text := str(item).strip())]
    if not items:
        raise UsageError(f"--kv-{key} is empty")
    return items


def _texts(key: str, value: Any) -> list[str]:
    """Of an option that may be given several times."""
    if not isinstance(value, (str, list, tuple)):
        raise UsageError(f"--kv-{key} cannot be {value!r}: in [tool.kvsuite] it is a text or a list of texts")
    return [value] if isinstance(value, str) else [str(item) for item in value]


def _whole(key: str, value: Any, least: int) -> int:
    try:
        number = int(str(value))
    except ValueError:
        raise UsageError(f"--kv-{key} must be a whole number, not {str(value)!r}") from None
    if number < least:
        raise UsageError(f"--kv-{key} must be at least {least}, not {number}")
    return number


def _counts(value: Any) -> dict[str, int]:
    """Of ``48,chat=8``: a number for all tasks, others for some of them."""
    found = {}
    for item in _items("samples", value):
        name, equals, number = item.rpartition("=")
        scored = name.removeprefix("reference:")
        if equals and scored not in tasks.names() and scored not in tasks.made():
            raise unknown("task in --kv-samples", name, [*tasks.names(), *tasks.made()])
        found[name] = _whole("samples", number, 1)
    if "" not in found:
        raise UsageError(f"--kv-samples {value}: begin with a number for all tasks, such as 8,chat=4")
    return found


def _cells(value: Any) -> tuple[tuple[int, int], ...]:
    """Of ``1x4096,16x1024``, each once."""
    found = dict[tuple[int, int], None]()
    for item in _items("cells", value):
        width, cross, length = item.partition("x")
        if not cross:
            raise UsageError(f"--kv-cells {item!r} is not BATCHxLENGTH, such as 8x1024")
        found[_whole("cells", width, 1), _whole("cells", length, SHORTEST)] = None
    return tuple(found)


def _modes(value: Any) -> tuple[str, ...]:
    """Without ``paged``, which always takes part."""
    found = dict.fromkeys(_items("modes", value)) if value else {}
    for name in found:
        if name not in (PAGED, *MODES):
            raise unknown("mode", name, (PAGED, *MODES))
    return tuple(name for name in found if name != PAGED)


def _references(value: Any) -> tuple[float, ...]:
    key = "reference-temperatures"
    found = dict.fromkeys(_number(key, x) for x in _items(key, value)) if value else {}
    if 0 in found:
        raise UsageError(f"--kv-{key} must be over 0")
    return tuple(found)


def _number(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise UsageError(f"--kv-{key} must be a number of at least 0, not {str(value)!r}")
    return number
