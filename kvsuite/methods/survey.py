"""The methods of the field as the page docs/survey.md lists them, from survey.csv: which run here, and why others do
not."""

from __future__ import annotations

import csv
from collections.abc import Collection, Mapping
from importlib.resources import files

Row = Mapping[str, str]
KINDS = {"Q": "quantizes", "S": "keeps some", "Q+S": "both"}
TABLES = {
    "paper": "## The paper's Table 1",
    "later": "## What came after",
    "formats": "## Formats and scores without a paper of their own",
}
INTRO = """# The methods of the field

Which methods of KV-cache compression run here, what they were held against, and why others do not. This page is made by
`kvsuite methods --survey` from `kvsuite/methods/survey.csv`. The first table has the figures of Table 1 of Gao et al.
(MLSys 2025, arXiv 2503.24000): what each method's authors say of memory, prefill and decoding, in multiples of the
uncompressed cache. They were measured on unlike models, lengths and frameworks and cannot be compared with each other.
[parity.md](parity.md) says how parity was measured, [methods.md](methods.md) what each part does. Dates are years and
months. "Open" is a method that nothing but time keeps out."""
BENCHMARKS = """## The paper's Table 2: benchmarks before it

kvsuite measures what the paper found missing in them: speed under FlashAttention and paged attention, the length of
answers, and single samples that break. None is reproduced here.

| benchmark | what it covers |
|---|---|"""


def rows() -> list[Row]:
    """The data file's."""
    return list(
        csv.DictReader(files("kvsuite.methods").joinpath("survey.csv").read_text(encoding="utf-8").splitlines())
    )


def markdown(parts: Collection[str]) -> str:
    """The page; ``parts``: the names of the parts that there are."""
    found = rows()
    tables = [INTRO]
    for table, title in TABLES.items():
        paper = table == "paper"
        head = ["method", "date", "", "what it does", *(["memory", "prefill", "decode"] if paper else [])]
        head += ["runs here", "parity", "not implemented because"]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += [_line(row, parts, paper) for row in found if row["table"] == table]
        tables.append(title + "\n\n" + "\n".join(lines))
    benchmarks = [f"| {row['name']} | {row['what']} |" for row in found if row["table"] == "benchmark"]
    return "\n\n".join([*tables, "\n".join([BENCHMARKS, *benchmarks])])


def _line(row: Row, parts: Collection[str], paper: bool) -> str:
    here = [f"`{part}`" for part in row["here"].split() if part in parts]
    cells = [row["name"], row["date"], KINDS[row["kind"]], row["what"]]
    if paper:
        cells += [f"{row[key]}×" if row[key] else "" for key in ("memory", "prefill", "decode")]
    reason = row["reason"] or ("" if here else "not yet")
    cells += [", ".join(here), row["parity"] if here else "", reason]
    return "| " + " | ".join(cells) + " |"
