"""Predictors as JSON files, which say of what kind and version they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kvsuite
from kvsuite import disk
from kvsuite.errors import UsageError


def write(file: Path, kind: str, learned: Mapping[str, Any]) -> None:
    """Raises UsageError where the file cannot be written."""
    text = json.dumps({"kind": kind, "kvsuite": kvsuite.__version__, **learned}, allow_nan=False)
    try:
        disk.write(file, text + "\n")
    except OSError as error:
        raise UsageError(f"{str(file)!r} cannot be written: {error.strerror}") from error


def read(file: Path, kind: str) -> dict[str, Any]:
    """What `write` wrote. Raises UsageError for another file, another kind, and another version of kvsuite."""
    try:
        found: dict[str, Any] = disk.parsed(disk.text(file))
        said, version = found["kind"], found["kvsuite"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{str(file)!r} is no predictor: {error!r}") from error
    if (said, version) != (kind, kvsuite.__version__):
        raise UsageError(f"{str(file)!r} is of kvsuite {version}, {said}; this is {kvsuite.__version__}, {kind}")
    return found
