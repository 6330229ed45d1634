"""What a reader is, and how one is found by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kvsuite import disk
from kvsuite.columns import Arm, Floats
from kvsuite.errors import UsageError
from kvsuite.readers.run import Documents, named_documents
from kvsuite.registry import Registry, function

MOST = 1e18
"""Seconds, or tokens, that are no figure any more."""


@dataclass(frozen=True)
class Load:
    """One load test of a server: per request that was answered, (n,), seconds and tokens; NaN where the source does not
    say. A request that failed is counted, never timed."""

    source: str
    ttft: Floats
    """Time to first token."""
    itl: Floats
    """Mean time between tokens after the first."""
    e2e: Floats
    """Time to last token."""
    prompt_tokens: Floats
    tokens: Floats
    start: Floats
    """When the request was sent, on any clock; NaN where unknown."""
    failed: int
    duration: float
    """Seconds from the first request sent to the last token."""
    setting: dict[str, Any]
    """What must agree for two load tests to be compared: model, rate, concurrency, number of prompts."""

    def __len__(self) -> int:
        return len(self.ttft)

    @property
    def throughput(self) -> float:
        """Generated tokens per second over the whole test."""
        return float(np.nansum(self.tokens)) / self.duration


FORMATS = Registry(
    "format of results", "readers", function("read"), ("kvsuite.readers",), helpers=("base", "aiconfigurator")
)


def formats() -> list[str]:
    """All formats."""
    return sorted(FORMATS.names())


def read(spec: str) -> Arm | Load:
    """What ``FORMAT:PATH#WHICH`` names. Raises UsageError, naming the file, for what is not there or not whole."""
    name, path, which = _named(spec)
    found: Arm | Load = FORMATS.module(name).read(spec, path, which)
    return found


def documents(spec: str) -> tuple[Documents, bool]:
    """The forced documents that ``spec`` names, none but of a run; and whether there are no answers beside them."""
    name, path, which = _named(spec)
    return named_documents(path, which) if name == "run" else ({}, False)


def _named(spec: str) -> tuple[str, str, str]:
    """FORMAT, PATH and WHICH."""
    name, colon, rest = spec.partition(":")
    if not colon or (name not in formats() and disk.matching(_split(spec)[0])):
        name, rest = "run", spec
    return name, *_split(rest)


def _split(named: str) -> tuple[str, str]:
    """PATH and WHICH of ``PATH#WHICH``. A name may hold a ``#`` but WHICH holds no ``/``: PATH is the longest that is
    there, else what comes before the first ``#`` that can be meant."""
    ends = [at for at, sign in enumerate(named) if sign == "#" and "/" not in named[at:]] + [len(named)]
    end = next((end for end in reversed(ends) if disk.matching(named[:end])), ends[0])
    return named[:end], named[end + 1 :]


def arm(spec: str) -> Arm:
    """The answers that ``spec`` names. Raises UsageError where they are times of a load test."""
    found = read(spec)
    if isinstance(found, Load):
        raise UsageError(f"{spec} holds times of requests, no answers")
    return found


def files(pattern: str) -> list[Path]:
    """The files a path or a pattern with ``*`` and ``?`` names, sorted. Raises UsageError where there are none."""
    found = disk.matching(pattern)
    if not found:
        raise UsageError(f"there is no file or folder {pattern!r}")
    return found


def load_json(file: Path, most: int = disk.LARGEST) -> Any:
    """The JSON in a file of ``most`` bytes at most. Raises UsageError where it is cut off or something else."""
    try:
        return disk.parsed(disk.text(file, most))
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{file} cannot be read as JSON; is it cut off? {error}") from error


LONGBENCH = {
    name: kind
    for kind, names in {
        "qa": "narrativeqa qasper multifieldqa_en multifieldqa_zh hotpotqa 2wikimqa musique dureader",
        "summarization": "gov_report qmsum multi_news vcsum",
        "few-shot": "trec triviaqa samsum lsht",
        "synthetic": "passage_count passage_retrieval_en passage_retrieval_zh",
        "code": "lcc repobench-p",
    }.items()
    for name in names.split()
}
"""Task types of LongBench (Bai et al. 2024, table 1)."""
