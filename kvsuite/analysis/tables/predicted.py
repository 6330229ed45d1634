"""What predictors and the router are worth, each beside those that know less (``pytest -m tools``)."""

from __future__ import annotations

from kvsuite.analysis.table import Cell, Column, Note, Row, Table
from kvsuite.records import Predicted, Run

MEANINGS = {
    "throughput": "Tokens per second of cells that were not learned from. Blind: the uncompressed figure of that batch "
    "and length, whatever the method; nearest: the method's own at the nearest cell learned from; mean: of all of "
    "these. Better: surely than blind.",
    "length": "Tokens of answers to prompts that were not learned from. Loss: pinball, mean over quantiles, less is "
    "better. Concordance: pairs of prompts in the right order; 0.5 is chance. The ceiling is another answer of the "
    "baseline's own. Better: surely less loss than all but the ceiling.",
    "type of task": "Prompts whose type is told right by what was learned from others.",
    "router": "Simulated: 1 plain and 3 compressed servers, over four plain ones. Blind: told no lengths; the oracle "
    "knows the true ones, and so bounds what routing can gain. Better: surely than the mixed fleet, least loaded.",
}


def predicted(run: Run) -> list[Table]:
    """A table a tool."""
    records = [r for r in run.records if isinstance(r, Predicted) and r.status == "ok"]
    return [
        _table(tool, [r for r in records if r.tool == tool])
        for tool in dict.fromkeys(record.tool for record in records)
    ]


def _table(tool: str, found: list[Predicted]) -> Table:
    nulls = list(dict.fromkeys(name for r in found for name in r.nulls))
    columns = [Column("n", "n"), Column("value", "predictor" if tool != "router" else "by both", shows="range")]
    columns += [*(Column(name, name) for name in nulls), Column("better", "better")]
    rows = [
        Row(
            (r.what, r.measure, r.method),
            {
                "n": Cell(r.n), "value": Cell(r.value, r.low, r.high, unit=r.unit),
                **{name: Cell(value, unit=r.unit) for name, value in r.nulls.items()},
                "better": Cell({True: "yes", False: "no", None: ""}[r.better]),
            },
        )
        for r in found
    ]  # fmt: skip
    notes = [Note(MEANINGS[tool])] if tool in MEANINGS else []
    return Table(
        f"tools: {tool}", f"{tool} · beside what knows less", ("what", "measure", "method"), columns, rows, notes
    )
