"""What a comparison of servers shows beside the verdicts: headlines, speed, and what was served."""

from __future__ import annotations

from collections.abc import Sequence

from kvsuite.analysis.garbled import Check
from kvsuite.analysis.runs import broken
from kvsuite.analysis.serving import FIGURES, ServedRow, ServerReport, blocks, checks, goodputs, served_rows, told
from kvsuite.analysis.shortfall import interrupted
from kvsuite.analysis.stats import Estimate
from kvsuite.records import Run
from kvsuite.report.table import Table, span

WARM = 0.1
"""A share of tokens: templates and system prompts are found in any prefix cache."""
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
        if server.warm > WARM:
            said.append(f"WARM {server.method}: {server.warm:.0%} of its prompts' tokens were in its prefix cache.")
        elif server.perhaps_warm:
            said.append(f"WARM? {server.method}: nothing kept its prompts out of a prefix cache, if it has one.")
        said += [f"DIFFERS {server.method}: {feature}." for feature in server.lost]
    for method, check in checks(run).items():
        if check.broken:
            said.append(f"BROKEN {method}: {_broken(check)}")
        elif check.note:
            said.append(f"HARDLY CHECKED {method}, whether its answers are answers: {check.note}.")
    return [Table("headlines", [], [], said)] if said else []


def _broken(check: Check) -> str:
    failed = ", ".join(f"{s.name} {s.count} of {s.n}" + _floor(s.floor) for s in check.signs if s.failed)
    said = f"its answers are no answers: {failed or 'all are hopeless'}."
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
    left_out, wanted = broken(run), run.facts.get("expected", {}).get("blocks", 0)
    if interrupted(run):
        there = {(row.cell, row.method) for row in rows}
        every = [(cell, arm) for cell in run.facts["cells"] for arm in run.facts["methods"]]
        rows += [ServedRow(arm, cell, 0, 0, "") for cell, arm in every if (cell, arm) not in there]
    whole, asked = [row.blocks for row in rows], max(wanted, *map(len, blocks(run).values()))
    partial = f"partial: {span(whole)} of {asked} blocks · " if min(whole) < asked else ""
    drawn = [_cells(row, row.method in left_out, row.method == run.baseline) for row in rows]
    columns = [
        "load",
        "arm",
        "tok/s",
        "×",
        "TTFT s",
        "×",
        "TPOT ms",
        "×",
        "ITL p95",
        "E2E s",
        "×",
        "tokens",
        "at cap",
        "failed",
    ]
    notes = [
        f"× over 1 is faster than the baseline, which took the same requests in turn ({max(whole)} blocks A B B A), "
        "with the 95 % t-interval over blocks. The A/A arm shows what no difference looks like here. Figures are "
        "medians of legs; tok/s counts all answers of a leg, from the first request to the last token.",
        f"{_ends(run, rows)}: tokens is their mean length. TPOT: per token after the first; ITL p95: of the gaps "
        "between tokens, ms.",
    ]
    notes += [f"FAILED {row.method}, {row.cell}: {row.error}" for row in rows if row.failed]
    return [
        Table(f"served · {partial}{run.facts['model']['name']}", columns, drawn, notes, keys=2),
        *_goodput(run, left_out),
    ]


def _ends(run: Run, rows: Sequence[ServedRow]) -> str:
    if run.facts["settings"].get("end") != "forced":
        return "Answers end where the model ends them, or at their cap"
    answers, capped = sum(row.n - row.failed for row in rows), sum(row.capped for row in rows)
    said = "Answers were forced to go on to their cap, past where the model would end them"
    return said if capped == answers else f"{said}, but {answers - capped} of {answers} ended sooner"


def _goodput(run: Run, left_out: set[str]) -> list[Table]:
    found = goodputs(run)
    if not found:
        return []
    ttft, itl = run.facts["settings"]["goodput"]
    rows = []
    for method, good in found.items():
        held = "-" if good.rate is None else f"{good.rate:.3g}"
        missed = "-" if good.missed is None else f"{good.missed:.3g}"
        row = ["BROKEN", "-", "-", ""] if method in left_out else [held, missed, str(len(good.cells)), good.note]
        rows.append([method, *row])
    note = (
        f"Requests a second (Poisson) up to which the p95 of TTFT stays within {ttft:g} s and that of ITL, the gaps "
        f"between tokens, within {itl:g} s; a failed request misses both. One search a server: a difference inside one "
        "step is none."
    )
    cut = ["partial: this run was interrupted; a search may not be at its end."] if interrupted(run) else []
    return [Table("goodput", ["arm", "holds", "misses", "tests", ""], rows, [*cut, note])]


def _cells(row: ServedRow, broken: bool, itself: bool) -> list[str]:
    failed = f"{row.failed}/{row.n}"
    if broken or not row.figures:
        return [row.cell, row.method, *["BROKEN" if broken else "-"] * 9, "-", "-", failed]
    f, r = row.figures, row.ratios
    shown = {name: _shown(f.get(name), *how) for name, how in FORMATS.items()}
    ratios = {name: "1" if itself else _ratio(r.get(name)) for name in FIGURES}
    pairs = [text for name in FIGURES[:3] for text in (shown[name], ratios[name])]
    last = [shown["itl95"], shown["e2e"], ratios["e2e"]]
    return [row.cell, row.method, *pairs, *last, f"{row.tokens:.0f}", f"{row.capped}/{row.n}", failed]


FORMATS = {"rate": (1, 0), "ttft": (1, 2), "tpot": (1e3, 1), "itl95": (1e3, 1), "e2e": (1, 2)}
"""In which unit figures are shown, and with how many decimals."""


def _shown(value: float | None, unit: float, decimals: int) -> str:
    return "-" if value is None else f"{unit * value:,.{decimals}f}"


def _ratio(e: Estimate | None) -> str:
    if e is None:
        return "-"
    return f"{e.mean:.2f} ({e.low:.2f}–{e.high:.2f})" if e.high < 100 else f"{e.mean:.2f} (–)"


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
                f"{s.method}: {s.counters.get('accepted', 0) / s.counters['drafted']:.0%} of drafted tokens accepted."
            )
    asked = {key: [s.method for s in found if s.command == key] for key in dict.fromkeys(s.command for s in found)}
    notes += [f"{', '.join(methods)}: {key}" for key, methods in asked.items()]
    if late > 0.005:
        notes.append(
            f"The client sent a request up to {1e3 * late:.0f} ms late: the load was not quite the one asked for."
        )
    return [Table("what was served", columns, rows, notes)]


def _said(server: ServerReport) -> list[str]:
    facts, counts = server.facts, server.counters
    queries, hits = counts.get("prefix_queries", 0), counts.get("prefix_hits", 0)
    share = f"{100 * hits / queries:.0f} %" if queries else "-"
    preempted = f"{counts['preemptions']:.0f}" if "preemptions" in counts else "-"
    tokens = facts.get("kv_tokens")
    engine = " ".join(str(x) for x in (server.profile, facts.get("version", "")) if x)
    room = f"{tokens:,}" if isinstance(tokens, int) else "-"
    shown = {True: "shown" if server.proof else "not shown", False: "none", None: "not shown"}[facts.get("compressed")]
    return [server.method, engine, str(facts.get("kv_dtype", "-")), room, share, preempted, shown]
