"""Predictors as JSON files, which say of what kind and version they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import kvsuite
from kvsuite import disk
from kvsuite.analysis.resample import Floats
from kvsuite.errors import UsageError
from kvsuite.typed import Shape, amiss


def write(file: Path, kind: str, learned: Mapping[str, Any]) -> None:
    """Raises UsageError where the file cannot be written."""
    text = json.dumps({"kind": kind, "kvsuite": kvsuite.__version__, **learned}, allow_nan=False)
    try:
        disk.write(file, text + "\n")
    except OSError as error:
        raise UsageError(f"{str(file)!r} cannot be written: {error.strerror}") from error


def read(file: Path, kind: str, shape: Shape) -> dict[str, Any]:
    """What `write` wrote. Raises UsageError for another file, kind or ``shape``, and another version of kvsuite."""
    try:
        found: dict[str, Any] = disk.parsed(disk.text(file))
        said, version = found["kind"], found["kvsuite"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{str(file)!r} is no predictor: {error!r}") from error
    if (said, version) != (kind, kvsuite.__version__):
        raise UsageError(f"{str(file)!r} is of kvsuite {version}, {said}; this is {kvsuite.__version__}, {kind}")
    if wrong := amiss(found, shape, whole=True):
        raise UsageError(f"{str(file)!r} is no predictor: {wrong}")
    return found


def arrays(said: Mapping[str, Any], sizes: Mapping[str, int], **axes: str) -> list[Floats]:
    """Arrays of finite numbers by the names of their axes, a letter each; one letter is one size, and ``sizes`` has
    those that are known. Raises UsageError for what is none."""
    found, known = [], dict(sizes)
    for name, letters in axes.items():
        try:
            x = np.array(said[name], dtype=float)
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise UsageError(f"a saved predictor's {name} are no numbers: {error!r}") from error
        same = x.ndim == len(letters) and all(
            known.setdefault(a, n) == n for a, n in zip(letters, x.shape, strict=True)
        )
        if not (same and x.size and np.isfinite(x).all()):
            raise UsageError(f"a saved predictor's {name} do not fit its other numbers")
        found.append(x)
    return found
