"""Timed cells, whoever measured them: our run folders, pytest-benchmark's JSON, and the CSV of the paper's artifact."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from kvsuite import disk, records
from kvsuite.errors import UsageError
from kvsuite.records import Timing

Stage = Literal["prefill", "decoding"]
COLUMNS = ("model", "method", "bsz", "prompt_len", "stage", "thr")
"""Of the artifact's CSV, and the keys of a benchmark's ``extra_info``."""
MOST = 10**9
"""Beyond which nobody's figures are."""
PLAIN = ("none", "full", "fp16", "bf16", "float16", "bfloat16")
"""How the uncompressed cache is called, before a '-' (``None-16``), in others' files."""


@dataclass(frozen=True)
class Cell:
    """One method at one batch and length."""

    setting: str
    """The machine and what computed, as far as they are known: a method's cost holds within one setting."""
    model: str
    method: str
    stage: Stage
    batch: int
    length: int
    """Tokens of each prompt, or in the cache of each sequence."""
    seconds: float
    """Of a prefill of the batch, or of one decoding step."""
    plain: bool
    """Whether this is the uncompressed cache."""

    @property
    def rate(self) -> float:
        """Tokens per second, all sequences."""
        return rate(self.stage, self.batch, self.length, self.seconds)


def rate(stage: Stage, batch: int, length: int, seconds: float) -> float:
    """Tokens per second: of a prefill batch × length, of a step batch, over its time; the inverse is the same."""
    return batch * (length if stage == "prefill" else 1) / seconds


def read(path: Path) -> list[Cell]:
    """The timed cells of a run folder, of a ``.csv`` or a ``.json`` of pytest-benchmark. Raises UsageError for a file
    that is none of these, and for one without a timed cell."""
    if path.is_dir():
        found = _run(path)
    elif path.suffix == ".csv":
        found = _csv(path)
    elif path.suffix == ".json":
        found = _benchmarks(path)
    else:
        raise UsageError(f"{str(path)!r} is no run folder, no .csv and no .json of pytest-benchmark")
    if not found:
        raise UsageError(f"{str(path)!r} holds no timed cell")
    return found


def _run(folder: Path) -> list[Cell]:
    """Cells of our own cache. A cell's time is that of the baseline at its batch and length, median over all methods'
    cells, over the speed-up of its own paired blocks: what drifts from one cell to the next is not a method's."""
    run = records.told(folder)
    timed = [r for r in run.records if isinstance(r, Timing) and r.status == "ok" and r.seconds and r.baseline_seconds]
    kinds: dict[str, Stage] = {"prefill": "prefill", "decode": "decoding"}
    blocks: dict[tuple[str, int, int], list[float]] = {}
    for t in timed:
        each = statistics.median(t.baseline_seconds) / t.tokens
        blocks.setdefault((t.phase, t.width, t.length), []).append(each)
    env = run.facts.get("environment", {})
    machine = f"{env.get('gpu') or env.get('cpu')}, {env.get('threads')} threads"
    if (ranks := env.get("tensor_parallel", 1)) > 1:
        machine += f", tensor parallel {ranks}"
    found = []
    for t in timed:
        if t.phase not in kinds:
            continue
        stage = kinds[t.phase]
        ratio = statistics.median(a / b for a, b in zip(t.seconds, t.baseline_seconds, strict=False))
        token = ratio * statistics.median(blocks[t.phase, t.width, t.length])
        tokens = t.width * (t.length if stage == "prefill" else 1)
        seconds, plain = token * tokens, t.method == run.baseline
        model = str(run.facts["model"]["name"])
        cell = Cell(f"kvsuite on {machine}", model, t.method, stage, t.width, t.length, seconds, plain)
        found.append(checked(cell, str(run.folder)))
    return found


def _csv(file: Path) -> list[Cell]:
    try:
        rows = list(csv.DictReader(io.StringIO(disk.text(file), newline="")))
    except csv.Error as error:
        raise UsageError(f"{str(file)!r} cannot be read: {error}") from error
    return [_cell(row, f"{file} line {at}") for at, row in enumerate(rows, start=2)]


def _benchmarks(file: Path) -> list[Cell]:
    """Benchmarks whose ``extra_info`` has the CSV's columns; without ``thr``, a round is one prefill or one step."""
    cells = []
    try:
        found = disk.parsed(disk.text(file))
        machine = str(found.get("machine_info", {}).get("cpu", {}).get("brand_raw", ""))
        for one in found["benchmarks"]:
            info: dict[str, Any] = dict(one.get("extra_info", {}))
            if set(COLUMNS[:5]) <= set(info):
                stage, batch, length = info["stage"], int(info["bsz"]), int(info["prompt_len"])
                if "thr" not in info:
                    info["thr"] = rate(stage, batch, length, float(one["stats"]["median"]))
                cells.append(_cell(info, f"{file}, {one.get('name')}", machine))
    except UsageError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"{str(file)!r} is not pytest-benchmark's JSON: {error!r}") from error
    return cells


def _cell(row: Mapping[str, Any], where: str, machine: str = "") -> Cell:
    try:
        model, method, stage = (str(row[name]) for name in ("model", "method", "stage"))
        batch, length, thr = int(row["bsz"]), int(row["prompt_len"]), float(row["thr"])
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise UsageError(f"{where}: a cell has {', '.join(COLUMNS)}, and {error} is wrong or missing") from error
    plain = method.partition("-")[0].lower() in PLAIN
    seconds = rate(stage, batch, length, thr) if 1 / MOST < thr < MOST else 0.0  # type: ignore[arg-type]
    return checked(Cell(machine, model, method, stage, batch, length, seconds, plain), where)  # type: ignore[arg-type]


def checked(cell: Cell, where: str) -> Cell:
    """The cell. Raises UsageError where its figures are none that can be."""
    if cell.stage not in get_args(Stage):
        raise UsageError(f"{where}: stage is prefill or decoding, not {cell.stage!r}")
    if not (1 <= cell.batch < MOST and 1 <= cell.length < MOST and 1 / MOST < cell.seconds < MOST):
        raise UsageError(f"{where}: batch, length and tokens per second must be over 0, and below {MOST:,}")
    return cell


def merged(cells: Iterable[Cell]) -> list[Cell]:
    """One cell for each place: the median of those that were measured several times."""
    places: dict[tuple[Any, ...], list[Cell]] = {}
    for c in cells:
        places.setdefault((c.setting, c.model, c.method, c.stage, c.batch, c.length), []).append(c)
    return [
        Cell(
            c.setting,
            c.model,
            c.method,
            c.stage,
            c.batch,
            c.length,
            statistics.median(x.seconds for x in same),
            c.plain,
        )
        for same in places.values()
        for c in same[:1]
    ]
