"""artifact: LongBench scores as the artifact of "Rethinking Key-Value Cache Compression" leaves them.

``artifact:FOLDER/PREFIX`` is every file of FOLDER whose name starts with PREFIX and ends in ``_eval.json``, each a list
of ``{"id", "score"}``; the dataset is what stands between, without its leading underscore. FOLDER may be a pattern.
github.com/LLMkvsys/rethink-kv-compression.
"""

from __future__ import annotations

from pathlib import Path

from kvsuite.columns import Arm, ArmBuilder
from kvsuite.errors import UsageError
from kvsuite.readers.base import LONGBENCH, files, load_json

ENDING = "_eval.json"


def read(spec: str, path: str, which: str) -> Arm:
    """All datasets of one configuration."""
    folder, _, prefix = (f"{path}#{which}" if which else path).rpartition("/")  # nothing is chosen: a name's own "#"
    if not prefix:
        raise UsageError(f"{spec}: say how the file names begin, artifact:FOLDER/PREFIX")
    gathered = ArmBuilder(spec)
    found: dict[str, Path] = {}
    underscores: dict[bool, Path] = {}
    for file in _named(folder or ".", prefix):
        between = file.name.removeprefix(prefix).removesuffix(ENDING)
        underscores.setdefault(between.startswith("_"), file)
        dataset = between.removeprefix("_")
        if not dataset:
            raise UsageError(f"{file}: its name leaves no room for a dataset after the prefix {prefix!r}")
        if dataset in found:
            raise UsageError(f"dataset {dataset} is there twice: {found[dataset]} and {file}")
        found[dataset] = file
    if len(underscores) > 1:
        one, other = underscores.values()
        raise UsageError(f"{spec}: {one} and {other} are of two configurations; write more of the prefix")
    for dataset, file in found.items():
        _read(gathered, file, dataset)
    if not found:
        raise UsageError(f"{spec}: no file of {folder or '.'} starts with {prefix!r} and ends in {ENDING!r}")
    return gathered.arm()


def _named(folder: str, prefix: str) -> list[Path]:
    folders = [f for f in files(folder) if f.is_dir()]
    return sorted(
        file for f in folders for file in f.iterdir() if file.name.startswith(prefix) and file.name.endswith(ENDING)
    )


def _read(gathered: ArmBuilder, file: Path, dataset: str) -> None:
    rows = load_json(file)
    if not isinstance(rows, list) or not rows:
        raise UsageError(f"{file} is not a list of scores")
    kind = LONGBENCH.get(dataset, "")
    for at, row in enumerate(rows):
        if not isinstance(row, dict) or "id" not in row or "score" not in row:
            raise UsageError(f"{file}: entry {at} has no id and score")
        if row["score"] is None:
            raise UsageError(f"{file}: sample {row['id']} of {dataset} has no score")
        gathered.add(file, dataset, row["id"], score=row["score"], type=kind)
