"""A run's records as CSV files that travel inside a page."""

from __future__ import annotations

import base64
import csv
import dataclasses
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvsuite.records import Record, Run, Timing

LONG = ("prompt", "text", "reasoning", "calls")
"""Words of a model, which are no figures."""
ACTIVE = ("=", "+", "-", "@", "\t", "\r")
"""How a text begins that a spreadsheet would compute."""
MOST = 600_000
"""Characters that the files of a page may take, of all its runs; what does not fit stays in ``records.jsonl``."""


@dataclass(frozen=True)
class File:
    """One kind of records."""

    name: str
    rows: int
    data: str
    """gzip, base64; empty where it is too large for a page."""


def files(run: Run, room: int = MOST) -> list[File]:
    """One a kind of records, in order of appearance."""
    kinds: dict[str, list[Record]] = {}
    for record in run.records:
        kinds.setdefault(record.kind, []).append(record)
    found = []
    for kind, records in kinds.items():
        data = base64.b64encode(gzip.compress(_csv(records).encode(errors="replace"), mtime=0)).decode()
        room -= len(data)
        found.append(File(f"{kind}.csv", len(records), data if room >= 0 else ""))
    return found


def _csv(records: Sequence[Record]) -> str:
    """Every field but a model's words. A list is its length, but for the seconds of a timed cell."""
    written = io.StringIO()
    names = [f.name for f in dataclasses.fields(records[0]) if f.name not in LONG]
    rows = csv.writer(written)
    rows.writerow(names)
    rows.writerows([*_cells(record, names)] for record in records)
    return written.getvalue()


def _cells(record: Record, names: Sequence[str]) -> Iterator[Any]:
    for name in names:
        value = getattr(record, name)
        if isinstance(value, list):
            yield " ".join(map(repr, value)) if isinstance(record, Timing) else len(value)
        elif isinstance(value, dict):
            yield json.dumps(value, ensure_ascii=False)
        else:
            yield f"'{value}" if isinstance(value, str) and value.startswith(ACTIVE) else value
