"""What a comparison of servers shows beside the verdicts: headlines, speed, and what was served."""

from __future__ import annotations

from kvsuite.analysis.garbled import Check
from kvsuite.analysis.serving import ServedRow, Told, checks, goodputs, served_rows, told
from kvsuite.analysis.stats import Estimate
from kvsuite.records import Run
from kvsuite.report.table import Table

SHOWN = 160
"""Characters of an example."""


def headlines(run: Run) -> list[Table]:
    """What must be read before any figure: broken engines, compression that nothing shows, features lost."""
    said = []
    for server in told(run):
        plain = server.method == run.baseline or run.is_control(server.method)
        said += [f"FAILED {server.method}: {why.removeprefix(f'{server.method}: ')}." for why in server.failures]
        if server.method == run.baseline:
            compressed = server.facts.get("compressed")
            stored = server.facts.get("kv_dtype", "unknown")
            if compressed:
                said.append(f"COMPRESSED {server.method}: its own cache is compressed, {stored}.")
            elif compressed is None:
                said.append(f"NOT SHOWN {server.method}: nothing says that its cache is uncompressed.")
        elif not plain and server.facts and not server.proof:
            said.append(f"NOT SHOWN {server.method}: nothing shows that compression ran.")
        said += [f"DIFFERS {server.method}: {feature}." for feature in server.lost]
    for method, check in checks(run).items():
        if check.broken:
            said.append(f"BROKEN {method}: {_broken(check)}")
    return [Table("headlines", [], [], said)] if said else []


def _broken(check: Check) -> str:
    failed = ", ".join(f"{s.name} {s.count} of {s.n}" + _floor(s.floor) for s in check.signs if s.failed)
    said = f"its answers are no answers: {failed}."
    if check.example is not None:
        example = check.example
        both = _cut(example.baseline), _cut(example.variant)
        said += f" {' '.join(example.sample)}: the baseline said {both[0]}, it said {both[1]}."
    return said


def _floor(floor: int | None) -> str:
    return "" if floor is None else f" (A/A {floor})"


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + " …")


def speed(run: Run) -> list[Table]:
    """One row per cell and arm. An arm whose answers are no answers has no figures."""
    rows = served_rows(run)
    if not rows:
        return []
    broken = {method for method, check in checks(run).items() if check.broken}
    drawn = [_cells(row, row.method in broken, row.method == run.baseline) for row in rows]
    columns = ["load", "arm", "tok/s", "×", "TTFT s", "×", "TPOT ms", "×", "E2E s", "×", "tokens", "failed"]
    blocks = max(row.blocks for row in rows)
    notes = [
        f"× over 1 is faster than the baseline, which took the same requests in turn ({blocks} blocks A B B A), with "
        "the 95 % t-interval over blocks. The A/A arm shows what no difference looks like here. Figures are medians of "
        "legs; tok/s counts all answers of a leg, from the first request to the last token.",
        "Answers end where the model ends them: tokens is their mean length. TPOT: per token after the first.",
    ]
    notes += [f"FAILED {row.method}, {row.cell}: {row.error}" for row in rows if row.failed]
    return [Table(f"served · {run.facts['model']['name']}", columns, drawn, notes, keys=2), *_goodput(run, broken)]


def _goodput(run: Run, broken: set[str]) -> list[Table]:
    found = goodputs(run)
    if not found:
        return []
    ttft, itl = run.facts["settings"]["goodput"]
    rows = []
    for method, good in found.items():
        held = "BROKEN" if method in broken else "-" if good.rate is None else f"{good.rate:.3g}"
        missed = "-" if good.missed is None else f"{good.missed:.3g}"
        rows.append([method, held, missed, str(len(good.cells)), good.note])
    note = (
        f"Requests a second (Poisson) up to which the p95 of TTFT stays within {ttft:g} s and that of TPOT within "
        f"{itl:g} s; a failed request misses both. One search a server: a difference inside one step is none."
    )
    return [Table("goodput", ["arm", "holds", "misses", "tests", ""], rows, [note])]


def _cells(row: ServedRow, broken: bool, itself: bool) -> list[str]:
    failed = f"{row.failed}/{row.n}"
    if broken or not row.figures:
        return [row.cell, row.method, *["BROKEN" if broken else "-"] * 8, "-", failed]
    f, r = row.figures, row.ratios
    shown = {"rate": f"{f['rate']:,.0f}", "ttft": f"{f['ttft']:.2f}", "tpot": f"{1e3 * f['tpot']:.1f}"}
    shown["e2e"] = f"{f['e2e']:.2f}"
    pairs = [text for name, value in shown.items() for text in (value, "1" if itself else _ratio(r.get(name)))]
    return [row.cell, row.method, *pairs, f"{row.tokens:.0f}", failed]


def _ratio(e: Estimate | None) -> str:
    if e is None:
        return "-"
    return f"{e.mean:.2f} ({e.low:.2f}–{e.high:.2f})" if e.high < 100 else f"{e.mean:.2f}"


def served(run: Run) -> list[Table]:
    """What every arm's server said of itself, and what shows that compression ran."""
    found = told(run)
    if not found:
        return []
    rows = [_said(server) for server in found]
    columns = ["arm", "engine", "KV cache", "room, tokens", "prefix hits", "preempted", "compression"]
    late = max((s.counters.get("late", 0.0) for s in found), default=0.0)
    notes = [f"{s.method} stores {s.proof}." for s in found if s.proof]
    for s in found:
        if s.counters.get("drafted"):
            notes.append(
                f"{s.method}: {s.counters['accepted'] / s.counters['drafted']:.0%} of drafted tokens accepted."
            )
    asked = {key: [s.method for s in found if s.command == key] for key in dict.fromkeys(s.command for s in found)}
    notes += [f"{', '.join(methods)}: {key}" for key, methods in asked.items()]
    if late > 0.005:
        notes.append(
            f"The client sent a request up to {1e3 * late:.0f} ms late: the load was not quite the one asked for."
        )
    return [Table("what was served", columns, rows, notes)]


def _said(server: Told) -> list[str]:
    facts, counts = server.facts, server.counters
    queries, hits = counts.get("prefix_queries", 0), counts.get("prefix_hits", 0)
    share = f"{100 * hits / queries:.0f} %" if queries else "-"
    preempted = f"{counts['preemptions']:.0f}" if "preemptions" in counts else "-"
    tokens = facts.get("kv_tokens")
    engine = " ".join(str(x) for x in (server.profile, facts.get("version", "")) if x)
    room = f"{tokens:,}" if isinstance(tokens, int) else "-"
    shown = {True: "shown" if server.proof else "not shown", False: "none", None: "not shown"}[facts.get("compressed")]
    return [server.method, engine, str(facts.get("kv_dtype", "-")), room, share, preempted, shown]
