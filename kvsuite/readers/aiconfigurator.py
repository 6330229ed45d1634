"""Kernels that NVIDIA measured on its GPUs: the tables of aiconfigurator-core (Apache-2.0), read without a GPU.

``systems/data/GPU/attention/ENGINE/VERSION/generation_attention_perf.parquet`` has a decode step's attention in ms: of
one layer, by batch and ``step``, the tokens before the one that is decoded. ``gemm_perf.parquet`` has products of
(m, k) by (k, n) in ms. ``systems/GPU.yaml`` has a GPU's bandwidth and memory.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsuite import disk
from kvsuite.errors import UsageError, unknown
from kvsuite.shapes import ModelShape

if TYPE_CHECKING:
    from numpy.typing import NDArray

PACKAGE = "aiconfigurator_core"
NEEDED = "GPU tables need aiconfigurator-core and pyarrow: pip install 'kvsuite[gpu-tables]'"
ATTENTION, GEMM = "generation_attention_perf.parquet", "gemm_perf.parquet"
DTYPE = "bfloat16"
"""Of queries, and of the weights and inputs of products."""

Cells = dict[tuple[int, int], float]
"""ms by (batch, length); the length counts the token that is decoded."""


@dataclass(frozen=True)
class Measured:
    """What one engine's kernels took on one GPU, for one shape of attention."""

    gpu: str
    engine: str
    version: str
    source: str
    """What was read."""
    bandwidth: float
    """Of the GPU's memory, bytes a second, as specified."""
    memory: float
    """Bytes."""
    capability: int
    """90 is compute capability 9.0."""
    attention: Mapping[str, Mapping[str, Cells]]
    """By the K/V dtype (bfloat16, fp8), then by kernel."""
    products: Mapping[tuple[int, int], Mapping[int, float]]
    """ms by (n, k), then by m; empty where there are none."""


def home() -> Path:
    """The folder ``systems`` of the installed package, which is not imported. Raises UsageError where it is missing."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UsageError(NEEDED)
    return Path(found.submodule_search_locations[0]) / "systems"


def measured(systems: Path, gpu: str, engine: str, shape: ModelShape) -> Measured:
    """The newest tables of an engine on a GPU, which may be named without what follows an underscore (h200). Raises
    UsageError for what is not there."""
    gpu = _gpu(systems, gpu)
    attention = systems / "data" / gpu / "attention"
    engines = sorted({file.parents[1].name for file in attention.glob(f"*/*/{ATTENTION}")})
    if engine not in engines:
        raise unknown(f"engine of {gpu}", engine, engines)
    file = _newest(attention.glob(f"{engine}/*/{ATTENTION}"))
    version = file.parent.name
    cells = _attention(file, shape)
    if not cells:
        others = [name for name in engines if name != engine]
        there = [n for n in others if _attention(_newest(attention.glob(f"{n}/*/{ATTENTION}")), shape)]
        raise UsageError(
            f"{engine} {version} on {gpu} was not measured with {shape.heads} heads, {shape.kv_heads} of K and V, of "
            f"{shape.head_dim} numbers each; with these were {', '.join(there) or 'none of its engines'}"
        )
    products = sorted((systems / "data" / gpu / "gemm" / engine).glob(f"*/{GEMM}"))
    same = [product for product in products if product.parent.name == version]
    facts = _facts(systems / f"{gpu}.yaml")
    return Measured(
        gpu, engine, version, _source(systems), facts["mem_bw"], facts["mem_capacity"], int(facts["sm_version"]),
        cells, _products(_newest(same or products)) if products else {},
    )  # fmt: skip


def _source(systems: Path) -> str:
    try:
        installed = f"aiconfigurator-core {importlib.metadata.version('aiconfigurator-core')}"
        return installed if systems == home() else str(systems)
    except (importlib.metadata.PackageNotFoundError, UsageError):
        return str(systems)


def _gpu(systems: Path, name: str) -> str:
    """The GPU's folder."""
    known = sorted({file.parents[3].name for file in systems.glob(f"data/*/attention/*/*/{ATTENTION}")})
    if not known:
        raise UsageError(f"there are no attention tables in {systems}")
    wanted = name.lower().replace("-", "_").replace(" ", "_")
    meant = [gpu for gpu in known if gpu == wanted] or [gpu for gpu in known if gpu.startswith(f"{wanted}_")]
    if len(meant) != 1:
        raise unknown("GPU", name, meant or known)
    return meant[0]


def _newest(files: Iterable[Path]) -> Path:
    """Of files in folders that are versions."""
    return max(files, key=lambda file: [int(n) for n in re.findall(r"\d+", file.parent.name)])


def _attention(file: Path, shape: ModelShape) -> dict[str, dict[str, Cells]]:
    """Cells of full attention by K/V dtype and kernel."""
    wanted = {"num_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim}
    found: dict[str, dict[str, Cells]] = {}
    for dtype, kernel, batch, step, ms in _rows(file, "attn_dtype", NAMES, ("batch_size", "step", "latency"), wanted):
        found.setdefault(dtype, {}).setdefault(kernel, {})[int(batch), int(step) + 1] = ms
    return found


def _products(file: Path) -> dict[tuple[int, int], dict[int, float]]:
    found: dict[tuple[int, int], dict[int, float]] = {}
    for m, n, k, ms in _rows(file, "gemm_dtype", (), ("m", "n", "k", "latency")):
        found.setdefault((int(n), int(k)), {})[int(m)] = ms
    return found


NAMES = "kv_cache_dtype", "kernel_source"
FULL = {"isl": 1, "beam_width": 1, "window_size": 0}
"""What a step of full attention has in columns that not every file has: older ones have no window_size."""
MOST = 1e12
"""Beyond which no figure of a table is."""


def _rows(
    file: Path, dtype: str, texts: Sequence[str], numbers: Sequence[str], wanted: Mapping[str, int] | None = None
) -> Iterable[tuple[Any, ...]]:
    """Columns of texts and of numbers, which some files have as text, row by row: of rows whose column ``dtype`` has
    `DTYPE`, and others what is ``wanted`` and `FULL`. Raises UsageError for what is none."""
    try:
        from pyarrow import ArrowException, BufferReader, parquet
    except ImportError as error:
        raise UsageError(NEEDED) from error
    wanted, content = wanted or {}, disk.content(file)
    try:
        table = parquet.read_table(BufferReader(content))
        if missing := {dtype, *texts, *numbers, *wanted} - set(table.column_names):
            raise UsageError(f"{file} has no column {min(missing)!r}: it is laid out in a way that is not known here")
        here = table[dtype].to_numpy().astype(str) == DTYPE
        for name, value in {**wanted, **FULL}.items():
            if name in table.column_names:
                here &= table[name].to_numpy().astype(float) == value
        said = [table[name].to_numpy()[here].astype(str) for name in texts]
        figures = [table[name].to_numpy()[here].astype(float) for name in numbers]
    except UsageError:
        raise
    except (OSError, ArrowException, TypeError, ValueError) as error:
        raise UsageError(f"{file} cannot be read as Parquet: {error}") from error
    if not all(((x >= 0) & (x < MOST)).all() for x in figures):
        raise UsageError(f"{file} has figures below 0 or beyond {MOST:g}")
    return zip(*(x.tolist() for x in (*said, *figures)), strict=True)


FACTS = 1 << 16
"""Bytes of a GPU's YAML: a page of text."""


def _facts(file: Path) -> dict[str, float]:
    try:
        import yaml
    except ImportError as error:
        raise UsageError(NEEDED) from error
    try:
        # BaseLoader makes texts, lists and dicts alone; SafeLoader merges dicts, too: a few lines can make billions
        facts = {"sm_version": 0} | yaml.load(disk.text(file, FACTS), yaml.BaseLoader)["gpu"]  # noqa: S506
        found = {name: float(facts[name]) for name in ("mem_bw", "mem_capacity", "sm_version")}
    except (yaml.YAMLError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise UsageError(f"{file} does not say what the GPU's memory is: {error}") from error
    if not all(0 <= x < 1e18 for x in found.values()):
        raise UsageError(f"{file} does not say what the GPU's memory is")
    return found


@dataclass(frozen=True)
class Formats:
    """Attention of a decode step with fp8 and with bf16 K and V, cell by cell, on one GPU with one pair of kernels."""

    gpu: str
    engine: str
    version: str
    kernels: str
    """That of bf16, and that of fp8 where it is another."""
    bandwidth: float
    """Of the GPU's memory, bytes a second, as specified."""
    capability: int
    cells: NDArray[np.int64]
    """(n, 5): batch, length, heads, kv heads, head dimension."""
    plain: NDArray[np.float64]
    """(n,) ms with bf16."""
    fp8: NDArray[np.float64]
    """(n,) ms with fp8."""


UNNAMED = "torch_flow"
"""What TensorRT-LLM's tables have for the name of a kernel; it has others for each generation of GPUs."""
CELL = ("batch_size", "step", "num_heads", "num_key_value_heads", "head_dim")


def formats(systems: Path, engine: str) -> list[Formats]:
    """All GPUs' newest tables of an engine, full attention alone; none of a GPU without fp8. Where a format was
    measured with several kernels, those of one name belong together. Raises UsageError for an unknown engine."""
    files = sorted(systems.glob(f"data/*/attention/*/*/{ATTENTION}"))
    engines = {file.parents[1].name for file in files}
    if engine not in engines:
        raise unknown("engine", engine, engines)
    found = []
    for gpu in sorted({file.parents[3].name for file in files if file.parents[1].name == engine}):
        file = _newest(file for file in files if (file.parents[3].name, file.parents[1].name) == (gpu, engine))
        facts = _facts(systems / f"{gpu}.yaml")
        times = _by_kernel(file)
        for kernel, fp8 in sorted(times.get("fp8", {}).items()):
            plains = times.get(DTYPE, {})
            name = kernel if kernel in plains else next(iter(plains), "")
            both = sorted(fp8.keys() & plains.get(name, {}).keys()) if name == kernel or len(plains) == 1 else []
            if both:
                cells, ms = np.array(both), [np.array([x[cell] for cell in both]) for x in (plains[name], fp8)]
                known = kernel if name == kernel else f"{name}, {kernel}"
                capability = int(facts["sm_version"])
                if known == UNNAMED:
                    known += f" of generation {capability // 10}"
                found.append(Formats(gpu, engine, file.parent.name, known, facts["mem_bw"], capability, cells, *ms))
    return found


def _by_kernel(file: Path) -> dict[str, dict[str, dict[tuple[int, ...], float]]]:
    """ms by K/V dtype, kernel and cell."""
    found: dict[str, dict[str, dict[tuple[int, ...], float]]] = {}
    for dtype, kernel, ms, batch, step, *shape in _rows(file, "attn_dtype", NAMES, ("latency", *CELL)):
        cell = int(batch), int(step) + 1, *map(int, shape)  # with the token that is decoded
        found.setdefault(dtype, {}).setdefault(kernel, {})[cell] = ms
    return found
