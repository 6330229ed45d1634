"""lm-eval: scores of EleutherAI's lm-evaluation-harness, from the files that ``--log_samples`` leaves.

``lm-eval:PATH#METRIC,FILTER`` is a file ``samples_TASK_TIMESTAMP.jsonl`` (with or without the timestamp), a folder in
which such files are at any depth, or a pattern of either. The dataset is TASK, the id ``doc_id``.

METRIC may be left out: it is then the first of a task's metrics that is a number. A sample for which it is none, or
NaN, is refused by its id: with the next metric instead, two files could be read by different ones. FILTER may be left
out where a task has one; ``#,FILTER`` chooses a filter alone. Nothing is logged that says whether more of a metric is
better: name one of which that is so. Lists of metrics and filters are there since lm-eval 0.4.7; in older files name
the metric. github.com/EleutherAI/lm-evaluation-harness, lm_eval/evaluator.py and loggers/evaluation_tracker.py, 0.4.13.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kvsuite import disk
from kvsuite.columns import Arm, ArmBuilder
from kvsuite.errors import UsageError
from kvsuite.readers.base import LONGBENCH, files

NAME = re.compile(r"samples_(?P<task>.+?)(_\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d(\.\d+)?)?\.jsonl")
UNFILTERED = "none"
"""What lm-eval calls the filter of a task that has none."""
Line = tuple[int, dict[str, Any]]


def read(spec: str, path: str, which: str) -> Arm:
    """All tasks of one run."""
    metric, _, chosen = (part.strip() for part in which.partition(","))
    gathered = ArmBuilder(spec)
    for task, file in _tasks(spec, path).items():
        lines = _filtered(file, _lines(file), chosen)
        _read(gathered, file, task, lines, _metric(file, lines, metric))
    return gathered.arm()


def _tasks(spec: str, path: str) -> dict[str, Path]:
    """Task → its file."""
    found: dict[str, Path] = {}
    for place in files(path):
        for file in sorted(place.rglob("samples_*.jsonl")) if place.is_dir() else [place]:
            name = NAME.fullmatch(file.name)
            if name is None:
                raise UsageError(f"{file} is not named like a file of --log_samples, samples_TASK_TIMESTAMP.jsonl")
            task = name["task"]
            if task in found:
                raise UsageError(f"{spec}: task {task} is there twice, {found[task]} and {file}; name one of them")
            found[task] = file
    if not found:
        raise UsageError(f"{spec}: there is no samples_*.jsonl in {path}")
    return found


def _lines(file: Path) -> list[Line]:
    """The samples, each with its line in the file. Raises UsageError where one is cut off or something else."""
    lines = [(at, _parse(file, at, line)) for at, line in disk.lines(file)]
    if not lines:
        raise UsageError(f"{file} is empty")
    return lines


def _parse(file: Path, at: int, line: bytes) -> dict[str, Any]:
    try:
        row = disk.parsed(line.decode("utf-8-sig"))
    except ValueError as error:
        raise UsageError(f"{file}: line {at} is not JSON; is it cut off? {error}") from error
    if not isinstance(row, dict) or "doc_id" not in row:
        raise UsageError(f"{file}: line {at} is not a sample with a doc_id")
    return row


def _filtered(file: Path, lines: list[Line], chosen: str) -> list[Line]:
    """The lines of one filter; a document has a line for each."""
    known = list(dict.fromkeys(str(row.get("filter", UNFILTERED)) for _, row in lines))
    if known == [UNFILTERED] or (len(known) == 1 and not chosen):
        return lines
    if chosen not in known:
        said = f"has no filter {chosen!r}, but" if chosen else "has the answers of"
        raise UsageError(f"{file} {said} {', '.join(known)}; choose one, lm-eval:PATH#METRIC,FILTER or #,FILTER")
    return [(at, row) for at, row in lines if row.get("filter", UNFILTERED) == chosen]


def _metric(file: Path, lines: list[Line], wanted: str) -> str:
    """The metric asked for, or the first that is a number for any sample."""
    known = lines[0][1].get("metrics")
    if wanted:
        if any(wanted not in row for _, row in lines):
            raise UsageError(f"{file}: not every sample has the metric {wanted!r}{_others(known)}")
        return wanted
    if not isinstance(known, list):
        raise UsageError(f"{file} does not list its metrics; name one, lm-eval:PATH#METRIC")
    for name in known:
        if isinstance(name, str) and any(isinstance(row.get(name), (bool, int, float)) for _, row in lines):
            return name
    raise UsageError(f"{file} has no metric that is a number{_others(known)}")


def _others(known: Any) -> str:
    return f"; it has {', '.join(map(str, known))}" if isinstance(known, list) else ""


def _read(gathered: ArmBuilder, file: Path, task: str, lines: Iterable[Line], metric: str) -> None:
    kind = LONGBENCH.get(task.removeprefix("longbench_").removesuffix("_e"), "")
    for at, row in lines:
        score = row.get(metric)
        if not isinstance(score, (bool, int, float)) or not 0 <= score <= 1:
            what = f"{metric} of document {row['doc_id']} is {repr(score)[:40]}, not a number from 0 to 1"
            raise UsageError(f"{file}: line {at}: {what}; choose another metric{_others(row.get('metrics'))}")
        said = row.get("filtered_resps")
        text = said[0] if isinstance(said, list) and said and isinstance(said[0], str) else None
        gathered.add(file, task, row["doc_id"], score=float(score), text=text, type=kind)
