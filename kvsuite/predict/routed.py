"""What routing came to, as tables and as figures for a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvsuite.analysis.stats import Interval
from kvsuite.analysis.table import Cell, Column, Row, Table, infos
from kvsuite.predict.laws import Law
from kvsuite.predict.router import FIGURES, Outcome, Setup

PARTS = (
    ("compressing all", "compressed, least loaded", "plain, least loaded"),
    ("mixing the fleet", "mixed, least loaded", "plain, least loaded"),
    ("routing by both", "by both", "mixed, least loaded"),
    ("routing by both, blind", "by both, blind", "mixed, least loaded"),
    ("keeping fragile plain", "by both, fragile plain", "by both"),
    ("what the oracle has left", "oracle", "by both"),
)
"""What changes from one row to another, and nothing else."""
WORDS = (
    "Seconds end to end, 95 % over {seeds} seeds; every policy gets the same requests. × plain: mean over that of the "
    "first row. tokens: of an answer, mean. in time: requests with a first token within {ttft:g} s and {itl:g} s a "
    "token after it. exposed: requests of fragile types that a compressed server answered. by length, both: of each "
    "method's answer to this prompt; blind: whose it is is not told. Predicted lengths scatter by {error:g} (sd of the "
    "logarithm); the oracle knows the true ones and takes the server that would be done first."
)


def tables(setup: Setup, rows: Sequence[Outcome], seeds: int) -> list[Table]:
    """Every policy, and what each step from one to the next is worth."""
    columns = [
        Column("mean", "mean, s", "s", "range"),
        Column("ratio", "× plain", "×", "range"),
        *(Column(name, f"{name}, s", "s") for name in ("p50", "p95", "p99")),
        Column("tokens", "tokens", "tokens"),
        Column("slo", "in time, %", "%", "half"),
        Column("exposed", "exposed, %", "%"),
    ]
    plain, compressed = setup.laws
    when = setup.arrivals if setup.times is None else "a trace"
    title = (
        f"{plain.method} and {compressed.method} · {setup.plain} + {setup.compressed} servers · {when}"
        f" · {len(setup.times or range(setup.requests)):,} requests"
    )
    said = WORDS.format(seeds=seeds, ttft=setup.ttft, itl=setup.itl, error=setup.error)
    main = Table("routed", title, ("policy",), columns, [_row(row, rows[0]) for row in rows], infos([said]))
    found = [Row((what,), {"ratio": Cell.estimated(r)}) for what, r in parts(rows).items()]
    note = "Mean seconds of one row of the table above over another's, paired by seed."
    changes = Table(
        "parts", "what each part is worth", ("change",), [Column("ratio", "×", "×", "range")], found, infos([note])
    )
    return [main, changes, _laws(setup.laws)]


def parts(rows: Sequence[Outcome]) -> dict[str, Interval]:
    """What changes → mean seconds as a multiple."""
    known = {row.policy.name: row for row in rows}
    return {what: known[one].ratio(known[other]) for what, one, other in PARTS if {one, other} <= known.keys()}


def _row(row: Outcome, first: Outcome) -> Row:
    cells = {name: Cell.estimated(row.figures[name]) for name in ("mean", "p50", "p95", "p99", "tokens")}
    cells |= {name: _percent(row.figures[name]) for name in ("slo", "exposed")}
    return Row((row.policy.name,), cells | {"ratio": Cell.estimated(row.ratio(first))})


def _percent(share: Interval) -> Cell:
    return Cell(100 * share.mean, 100 * share.low, 100 * share.high) if share.mean == share.mean else Cell()


def _laws(laws: Sequence[Law]) -> Table:
    columns = [Column("prefill", "1,024 tokens prefilled, ms", "ms")]
    columns += [Column(f"step {n}", f"step of {n} × 512, ms", "ms") for n in (1, 16, 64)]
    columns += [Column("held", "1,024 tokens held, as", "tokens"), Column("off", "off, %", "%")]
    rows = [
        Row(
            (law.method,),
            {
                "prefill": Cell(1000 * law.prefill_seconds(1024)),
                **{f"step {n}": Cell(1000 * law.step_seconds(n, 512 * n)) for n in (1, 16, 64)},
                "held": Cell(law.held(1024)),
                "off": Cell(100 * law.off),
            },
        )
        for law in laws
    ]
    said = (
        "The times that were simulated: a step's are linear in sequences and in tokens held, a prefill's quadratic. "
        "off: how far the law is from the cells it was fitted to, at worst."
    )
    return Table("laws", "what a server takes", ("method",), columns, rows, infos([said]))


def as_json(setup: Setup, rows: Sequence[Outcome]) -> dict[str, Any]:
    """The figures of both tables."""
    policies = {
        row.policy.name: {name: _ends(row.figures[name]) for name in FIGURES} | {"ratio": _ends(row.ratio(rows[0]))}
        for row in rows
    }
    return {
        "methods": [law.method for law in setup.laws],
        "policies": policies,
        "parts": {what: _ends(ratio) for what, ratio in parts(rows).items()},
    }


def _ends(x: Interval) -> list[float] | None:
    ends = [x.mean, x.low, x.high]
    return ends if all(abs(e) < float("inf") for e in ends) else None
