"""The rows of a published dataset: from Hugging Face's hub, its cache, or a copy."""

from __future__ import annotations

import hashlib
import importlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from kvsuite import disk
from kvsuite.errors import UsageError

PATIENCE = 10
"""Seconds that the hub has for its first answer; the libraries would ask again and again for half a minute."""
LARGEST = 1 << 30
"""Bytes of a file of rows, and of an archive's member: what is published has a few hundred million at most, what was
packed to do harm can have any number."""
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Where:
    """Where rows are."""

    dataset: str
    """Its repository on the hub."""
    config: str
    split: str
    file: str = ""
    """The archive in the repository that holds them, where `datasets` cannot load it: with datasets 4 or later, a
    repository with a loading script."""
    member: str = ""
    """The JSON lines in that archive."""
    place: str = ""
    """A copy to be read instead: a file of the rows, or a folder with the repository's files."""


def load(where: Where) -> Rows:
    """All rows. No code of a dataset is ever run. Raises UsageError, one sentence, for what cannot be had or read."""
    try:
        if where.place:
            return _copy(where, Path(where.place))
    except UsageError:
        raise
    except Exception as error:  # whatever the libraries raise
        raise UsageError(f"{where.place!r} cannot be read as {where.dataset}: {_said(error)}") from error
    offline, reached = bool(_library("huggingface_hub.constants").HF_HUB_OFFLINE), False
    try:
        reached = not offline and _answers(where.dataset)
        if where.file:
            return _archive(_download(where, reached), where.member)
        return _loaded(where.dataset, where, reached)
    except UsageError:
        raise
    except Exception as error:
        missing = "HF_HUB_OFFLINE is set" if offline else "it cannot be reached" if not _refused(error) else ""
        why = f"{missing}, and it is not in the cache" if missing and not reached else _said(error)
        raise UsageError(
            f"{where.dataset} cannot be had from Hugging Face's hub ({why}); run once where the hub can be reached, or "
            "name a copy: hub:NAME=PATH"
        ) from error


def fingerprint(rows: Rows) -> str:
    """sha256 over all rows as JSON: the same wherever they came from."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return found.hexdigest()


def _copy(where: Where, place: Path) -> Rows:
    if not disk.is_there(place):
        raise UsageError(f"{where.place!r} does not exist")
    if place.is_dir() and where.file:
        place /= where.file
    if place.is_dir():
        return _loaded(str(place), where, reached=True)
    if place.suffix == ".zip":
        return _archive(place, where.member)
    if place.suffix == ".jsonl":
        return _lines(disk.content(place, LARGEST))
    if place.suffix == ".parquet":
        if (size := place.stat().st_size) > LARGEST:
            raise UsageError(f"{where.place!r} has {size:,} bytes, more than any published file here: {LARGEST:,}")
        datasets = _library("datasets")
        datasets.disable_progress_bars()
        rows: Rows = datasets.load_dataset("parquet", data_files=str(place), split="train")
        return rows
    raise UsageError(f"{where.place!r} is no folder, and no .jsonl, .parquet or .zip")


def _archive(file: Path, member: str) -> Rows:
    with zipfile.ZipFile(file) as archive:
        if member not in archive.namelist():
            raise UsageError(f"{file.name} holds no {member}")
        if (size := archive.getinfo(member).file_size) > LARGEST:
            raise UsageError(
                f"{member} in {file.name} has {size:,} bytes, more than any published file here: {LARGEST:,}"
            )
        return _lines(archive.read(member))


def _lines(text: bytes) -> Rows:
    lines = [line for line in text.split(b"\n") if line.strip()]
    if max(map(len, lines), default=0) > disk.LONGEST:
        raise UsageError(f"a line of it has more than {disk.LONGEST:,} bytes")
    rows = [disk.parsed(line) for line in lines]
    if not all(isinstance(row, dict) for row in rows):
        raise UsageError("it is not JSON lines of objects")
    return rows


def _answers(dataset: str) -> bool:
    """Whether the hub answers. Raises what it says where it refuses the dataset."""
    try:
        _library("huggingface_hub").HfApi().dataset_info(dataset, timeout=PATIENCE)
    except Exception as error:  # no network, no such host, no answer in time
        if _refused(error):
            raise
        return False
    return True


def _refused(error: Exception) -> bool:
    """Whether it is the hub that says no."""
    return isinstance(error, _library("huggingface_hub.errors").HfHubHTTPError)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".partition("\n")[0]


def _download(where: Where, reached: bool) -> Path:
    download = _library("huggingface_hub").hf_hub_download
    return Path(download(where.dataset, where.file, repo_type="dataset", local_files_only=not reached))


def _loaded(path: str, where: Where, reached: bool) -> Rows:
    """By `datasets`: what it has cached where the hub was not ``reached``, without trying again."""
    datasets = _library("datasets")
    datasets.disable_progress_bars()
    offline, datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE, not reached
    try:
        rows: Rows = datasets.load_dataset(path, where.config or None, split=where.split)
        return rows
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"published benchmarks need the library {name.partition('.')[0]}: pip install 'kvsuite[local]'"
        ) from error
