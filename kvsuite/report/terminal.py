"""The summary at the end of a run in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

WIDE = 100
"""Columns from which headers stay on one line."""


def write(facts: Sequence[Mapping[str, Any]], file: TextIO, width: int) -> None:
    """One table per task, methods as rows, the baseline and the control first."""
    console = Console(file=file, width=width, highlight=False)
    for task in dict.fromkeys(fact["task"] for fact in facts if fact["kind"] == "samples"):
        rows = [fact for fact in facts if fact["kind"] == "samples" and fact["task"] == task]
        console.print()
        console.print(_samples(rows, width))
        console.print(_notes(rows), style="dim")
    for fact in (fact for fact in facts if fact["kind"] == "agreement"):
        said = f"full {fact['what']}: the same tokens on {fact['same']} of {fact['n']} samples of {fact['task']}"
        console.print(f"{said} ({fact['dtype']}).", style="dim")
    costs = [fact for fact in facts if fact["kind"] == "cost"]
    if costs:
        console.print()
        console.print(_costs(costs))


def _samples(rows: Sequence[Mapping[str, Any]], width: int) -> Table:
    first = rows[0]
    lengths = "–".join(str(n) for n in sorted({min(first["lengths"]), max(first["lengths"])}))
    title = (
        f"{first['task']} · {first['n']} samples of {lengths} tokens · "
        f"{first['model']}, {first['dtype']}, {first['threads']} threads, batch {first['width']}"
    )
    table = Table(title=title, box=None, title_justify="left", pad_edge=False, padding=(0, 1))
    table.add_column("method", overflow="fold", min_width=15)
    gap = " " if width >= WIDE else "\n"
    for words in ("score", "95 %", "as full", "MiB", "of full", "prefill tok/s", "decode tok/s"):
        table.add_column(words.replace(" tok", gap + "tok"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row))
    return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    name = row["method"] + (f"  ({row['failed']} FAILED)" if row["failed"] else "")
    if row["score"] is None:
        return [name, *["-"] * 7]
    speeds = ["-" if row[key] is None else f"{row[key]:,.0f}" for key in ("prefill", "decode")]
    same, ratio = ("-", "-") if not row["pairs"] else (f"{row['same']}/{row['pairs']}", f"{row['ratio']:.2f}")
    interval = f"{row['low']:.2f}–{row['high']:.2f}"
    return [name, f"{row['score']:.2f}", interval, same, f"{row['nbytes'] / 2**20:.1f}", ratio, *speeds]


def _costs(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("what", box=None, pad_edge=False, padding=(0, 1))
    for words in ("ms", "×", "of", "ms"):
        table.add_column(words, justify="left" if words == "of" else "right")
    for row in rows:
        ms = [f"{1000 * row[key]:.1f}" for key in ("seconds", "baseline")]
        table.add_row(row["what"], ms[0], f"{row['ratio']:.2f}", row["of"], ms[1])
    return table


def _notes(rows: Sequence[Mapping[str, Any]]) -> str:
    """What must be read beside the table."""
    said = [
        f"MiB is what the cache of one sample holds after its prompt ({rows[0]['compress']} compressed), all layers; "
        "95 % is the interval of the mean score; as full counts answers with the very tokens of full's."
    ]
    controls = [row for row in rows if row["method"].startswith("jitter") and row["pairs"]]
    for row in controls:
        if row["same"] == row["pairs"]:
            said.append(f"{row['method']}: all answers identical to full's, so no floor was measured.")
        else:
            changed = row["pairs"] - row["same"]
            said.append(f"Noise of one rounding ({row['method']}) changed {changed} of {row['pairs']} answers.")
    said.append("Speeds are those of the PyTorch reference, without kernels: what ran, not what a method could reach.")
    return "\n".join(said)
