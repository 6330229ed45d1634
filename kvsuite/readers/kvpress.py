"""kvpress: predictions of NVIDIA's kvpress, scored here as kvpress scores them.

``kvpress:PATH`` is the ``predictions.csv`` that kvpress's ``evaluation/evaluate.py`` leaves, the folder it is in, or a
pattern of either. The dataset is the column ``task``, else the ``dataset`` of the ``config.yaml`` beside it, else the
folder's name. Without ``config.yaml`` a benchmark is told by its columns, LongBench-E then read as LongBench.

The file has neither scores nor, LongBench's ``_id`` apart, ids. A row's id is its number, from 0, with a hash of its
answers, so that files whose rows are other samples do not align. A column ``score`` is taken as it is; else the rules
of ``kvsuite/scorers.py`` are applied, answer by answer (kvpress's ``metrics.json`` has rounded means of the same).
There are rules for RULER, LongBench without its Chinese tasks, LongBench-E, LongBench v2, AIME 2025 and MATH-500.
github.com/NVIDIA/kvpress, 0.5.4.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from kvsuite import disk, scorers
from kvsuite.columns import Arm, ArmBuilder
from kvsuite.errors import UsageError
from kvsuite.readers.base import LONGBENCH, files

FILE = "predictions.csv"
LONGEST = 2**31 - 1
"""Characters a field may have; csv allows 131,072 by itself."""
RETURN = "\udc0d"
"""Stands for a carriage return within a field; a lone surrogate is in no text that was decoded from UTF-8."""
STRING = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
RULER = re.compile("(niah|vt|[cf]we|qa)(_|$)")
"""What RULER's tasks begin with."""
Row = dict[str, str]


def read(spec: str, path: str, which: str) -> Arm:
    """All samples of one configuration."""
    if which:
        raise UsageError(f"{spec}: a file of kvpress holds one configuration, there is nothing after '#'")
    gathered = ArmBuilder(spec)
    for found in files(path):
        file = found / FILE if found.is_dir() else found
        if not file.exists():
            raise UsageError(f"{found} has no {FILE}")
        _read(gathered, file)
    return gathered.arm()


def _read(gathered: ArmBuilder, file: Path) -> None:
    name = _config(file)
    for at, (line, row) in enumerate(_rows(file)):
        if "predicted_answer" not in row:
            raise UsageError(f"{file} has no column predicted_answer; it has {', '.join(sorted(row))}")
        benchmark = name or _guess(row)
        task = row.get("task", "")
        dataset = task or benchmark or file.parent.resolve().name
        try:
            score = _score(benchmark, task, row)
        except UsageError as error:
            raise UsageError(f"{file}: line {line} ({dataset}): {error}") from error
        sample = row.get("_id") or f"row-{at}-{_hash(row)}"
        text = row["predicted_answer"]
        gathered.add(file, dataset, sample, score=score, text=text, type=_type(benchmark, task))


def _rows(file: Path) -> Iterator[tuple[int, Row]]:
    """The rows, each with its line in the file. Raises UsageError where it is cut off or no CSV."""
    csv.field_size_limit(LONGEST)
    line = 0
    try:
        content = disk.content(file)
        if not content.endswith(b"\n"):
            raise UsageError(f"{file} does not end with the end of a line; is it cut off?")
        reader = csv.reader(_text(content), strict=True)
        names = next(reader, [])
        line = reader.line_num + 1
        for fields in reader:
            if fields and len(fields) != len(names):
                what = f"not the {len(names)} fields of its head but {len(fields)}"
                raise UsageError(f"{file}: line {line} has {what}; is it cut off?")
            if fields:
                yield line, dict(zip(names, (field.replace(RETURN, "\r") for field in fields), strict=True))
            line = reader.line_num + 1
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{file} cannot be read as CSV from line {line} on; is it cut off? {error}") from error


def _text(content: bytes) -> io.StringIO:
    """The lines of a file. pandas quotes no carriage return where lines end with ``\\n``, and csv would end the row
    there; so it is replaced."""
    text = content.decode("utf-8-sig")
    if not text.partition("\n")[0].endswith("\r"):
        text = text.replace("\r", RETURN)
    return io.StringIO(text, newline="")


def _config(file: Path) -> str:
    """The benchmark that config.yaml names, or nothing."""
    config = file.with_name("config.yaml")
    if not config.exists():
        return ""
    found = re.search(r"^dataset: *['\"]?([\w-]+)", disk.text(config), re.MULTILINE)
    return found[1] if found else ""


def _guess(row: Row) -> str:
    """The benchmark whose columns these are, or nothing."""
    task = row.get("task", "")
    if "answers" in row and "all_classes" in row:
        return "longbench"
    if "answer" in row and "choice_A" in row:
        return "longbench-v2"
    if "answer" in row and RULER.match(task):
        return "ruler"
    return ""


def _score(benchmark: str, task: str, row: Row) -> float:
    if "score" in row:
        return _number(row["score"])
    if benchmark not in RULES:
        said = f"answers of {benchmark}" if benchmark else "these answers"
        raise UsageError(f"{said} cannot be scored here; add a column score, or read one of {', '.join(sorted(RULES))}")
    wanted = "answers" if benchmark.startswith("longbench") and benchmark != "longbench-v2" else "answer"
    if not row.get(wanted):
        raise UsageError(f"there is nothing in the column {wanted} to compare with")
    return RULES[benchmark](task, row)


def _longbench(task: str, row: Row) -> float:
    """kvpress strips what precedes an answer, LongBench does not."""
    return _longbench_e(task, {**row, "predicted_answer": row["predicted_answer"].lstrip()})


def _longbench_e(task: str, row: Row) -> float:
    classes = _strings(row.get("all_classes", ""))
    return scorers.longbench(task.removesuffix("-e"), row["predicted_answer"], _strings(row["answers"]), classes)


RULES: dict[str, Callable[[str, Row], float]] = {
    "ruler": lambda task, row: scorers.ruler(task, row["predicted_answer"], _strings(row["answer"])),
    "longbench": _longbench,
    "longbench-e": _longbench_e,
    "longbench-v2": lambda task, row: scorers.choice(row["predicted_answer"], row["answer"]),
    "aime25": lambda task, row: scorers.last_boxed(row["predicted_answer"], row["answer"]),
    "math500": lambda task, row: scorers.first_boxed(row["predicted_answer"], row["answer"]),
}
"""By kvpress's names of benchmarks (evaluate_registry.py)."""


def _number(cell: str) -> float:
    try:
        return {"True": 1.0, "False": 0.0}[cell] if cell in ("True", "False") else float(cell)
    except ValueError:
        raise UsageError(f"the score {cell!r} is not a number") from None


def _strings(cell: str) -> list[str]:
    """The strings of a list as Python prints it, ``['a', 'b']``, or as NumPy does, ``['a' 'b']``; pandas writes the
    latter, and to Python it is one string. What is no list is one string."""
    if not (cell.startswith("[") and cell.endswith("]")):
        return [cell] if cell else []
    inside = cell[1:-1]
    if STRING.sub("", inside).strip(", \r\n"):
        raise UsageError(f"{cell[:60]!r} is not a list of strings")
    try:
        found = [str(ast.literal_eval(said)) for said in STRING.findall(inside)]
    except (SyntaxError, ValueError) as error:  # an escape that is cut off, a zero byte
        raise UsageError(f"{cell[:60]!r} is not a list of strings") from error
    if not found:
        raise UsageError("there is no answer to compare with")
    return found


def _hash(row: Row) -> str:
    """Of what a row's answer is compared with, or of its question: the same whatever was answered and however the
    question was given."""
    known = row.get("answers") or row.get("answer") or row.get("needle") or row.get("question", "")
    return hashlib.sha1(known.encode(), usedforsecurity=False).hexdigest()[:8]


def _type(benchmark: str, task: str) -> str:
    if benchmark == "ruler":
        return "qa" if task.split("_")[0] == "qa" else "synthetic"
    return LONGBENCH.get(task.removesuffix("-e"), "") if benchmark.startswith("longbench") else ""
