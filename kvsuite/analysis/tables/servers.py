"""What a comparison of servers shows beside the verdicts: headlines, speed, and what was served."""

from __future__ import annotations

from collections.abc import Sequence

from kvsuite.analysis.calls import Called, called
from kvsuite.analysis.pools import Line
from kvsuite.analysis.pressure import Pressed, pressed
from kvsuite.analysis.serving import FIGURES, ServedRow, ServerReport, blocks, goodputs, served_rows, told
from kvsuite.analysis.shortfall import interrupted
from kvsuite.analysis.table import Cell, Column, Note, Row, Severity, State, Table, errors, infos, span
from kvsuite.analysis.tables.shared import failed
from kvsuite.analysis.validity import left_out, outcomes, unranked
from kvsuite.analysis.validity.outcome import OPEN, Kind
from kvsuite.records import Run, Scored, Served


def headlines(run: Run) -> list[Table]:
    """What must be read before any figure: every check that did not pass, once, the baseline's first, then the
    gravest. Of arms that have no figures, what could not be told besides is left out."""
    lost, said = left_out(run), dict[tuple[Kind, str, Severity], list[str]]()
    for o in outcomes(run):
        if o.kind is not None and not (o.arm in lost and o.kind in OPEN):
            severity: Severity = "warning" if o.kind in OPEN or o.tested else "error"
            said.setdefault((o.kind, o.text, severity), []).append(o.arm)
    notes = [
        Note(f"{kind} {', '.join(dict.fromkeys(arms))}: {text}.", severity)
        for (kind, text, severity), arms in said.items()
    ]
    return [Table("headlines", "headlines", notes=notes)] if notes else []


UNITS = {"rate": ("tok/s", 1.0), "ttft": ("s", 1.0), "tpot": ("ms", 1e3), "itl95": ("ms", 1e3), "e2e": ("s", 1.0)}
"""In which unit figures are shown, and how many of it make a second (or a token in one)."""
NAMES = {"rate": "tok/s", "ttft": "TTFT s", "tpot": "TPOT ms", "itl95": "ITL p95", "e2e": "E2E s"}
COUNTS = (Column("tokens", "tokens", "tokens"), Column("capped", "at cap"), Column("failed", "failed"))


def speed(run: Run) -> list[Table]:
    """One row per cell and arm. An arm whose answers are none, or to other prompts, has no figures; one whose times
    cannot be believed is not set beside the baseline."""
    rows = served_rows(run)
    if not rows:
        return []
    lost, hidden, wanted = left_out(run), unranked(run), run.facts.get("expected", {}).get("blocks", 0)
    if interrupted(run):
        there = {(row.cell, row.method) for row in rows}
        every = [(cell, arm) for cell in run.facts["cells"] for arm in run.facts["methods"]]
        rows += [ServedRow(arm, cell, 0, 0, "") for cell, arm in every if (cell, arm) not in there]
    whole, asked = [row.blocks for row in rows], max(wanted, *map(len, blocks(run).values()))
    partial = f"partial: {span(whole)} of {asked} blocks · " if min(whole) < asked else ""
    columns: list[Column] = []
    for name, (unit, _) in UNITS.items():
        columns.append(Column(name, NAMES[name], unit))
        columns += [Column(f"{name} ratio", "×", "×", "range", beside=True)] if name in FIGURES else []
    notes = infos(
        [
            f"× over 1 is faster than the baseline, which took the same requests in turn ({max(whole)} blocks A B B "
            "A), with the 95 % t-interval over blocks; (–): over 100, so nothing is known. The A/A arm shows what no "
            "difference looks like here. Figures are medians of legs; tok/s counts all answers of a leg, from the "
            "first request to the last token.",
            f"{_ends(run, rows)}: tokens is their mean length. TTFT: to the first token; TPOT: per token after it; ITL "
            "p95: of the gaps between tokens, ms; E2E: to the end of an answer.",
        ]
    )
    notes += failed([(f"{row.method}, {row.cell}", row.error) for row in rows if row.failed])
    drawn = [
        Row((row.cell, row.method), _cells(row, lost.get(row.method), row.method == run.baseline, row.method in hidden))
        for row in rows
    ]
    title = f"served · {partial}{run.facts['model']['name']}"
    return [
        Table("served", title, ("load", "arm"), [*columns, *COUNTS], drawn, notes),
        *_goodput(run, hidden),
    ]


def _ends(run: Run, rows: Sequence[ServedRow]) -> str:
    if run.facts["settings"].get("end") != "forced":
        return "Answers end where the model ends them, or at their cap"
    answers, capped = sum(row.n - row.failed for row in rows), sum(row.capped for row in rows)
    said = "Answers were forced to go on to their cap, past where the model would end them"
    return said if capped == answers else f"{said}, but {answers - capped} of {answers} ended sooner"


def _cells(row: ServedRow, lost: State | None, itself: bool, hidden: bool) -> dict[str, Cell]:
    count = {"failed": Cell(row.failed, of=row.n)}
    if lost or not row.figures:
        state: State = lost or ("failed" if row.failed else "missing")
        keys = [key for name in UNITS for key in (name, f"{name} ratio")]
        return dict.fromkeys([*keys, "tokens", "capped"], Cell(state=state)) | count
    figures = {name: Cell(scale * row.figures[name]) for name, (_, scale) in UNITS.items() if name in row.figures}
    ratios = {f"{name} ratio": Cell(1.0) if itself else Cell.estimated(row.ratios.get(name)) for name in FIGURES}
    if hidden:
        ratios = dict.fromkeys(ratios, Cell(state="cannot tell"))
    return {**figures, **ratios, "tokens": Cell(row.tokens), "capped": Cell(row.capped, of=row.n), **count}


def _goodput(run: Run, hidden: set[str]) -> list[Table]:
    found = goodputs(run)
    if not found:
        return []
    ttft, itl = run.facts["settings"]["goodput"]
    rows = []
    for method, good in found.items():
        cells = {"held": good.rate, "missed": good.missed, "tests": len(good.cells), "note": good.note}
        if method in hidden:
            rows.append(Row((method,), dict.fromkeys(cells, Cell(state=left_out(run).get(method, "cannot tell")))))
        else:
            rows.append(Row((method,), {key: Cell(value) for key, value in cells.items()}))
    columns = [Column("held", "holds", "requests/s"), Column("missed", "misses", "requests/s")]
    columns += [Column("tests", "tests"), Column("note", "")]
    note = (
        f"Requests a second (Poisson) up to which the p95 of TTFT stays within {ttft:g} s and that of ITL, the gaps "
        f"between tokens, within {itl:g} s; a failed request misses both. One search a server: a difference inside one "
        "step is none."
    )
    cut = ["partial: this run was interrupted; a search may not be at its end."] if interrupted(run) else []
    return [Table("goodput", "goodput", ("arm",), columns, rows, [*errors(cut), Note(note)])]


def pressure(run: Run) -> list[Table]:
    """What a full pool did to every arm's answers."""
    found = pressed(run)
    if not found:
        return []
    rows = [
        Row((p.arm,), {"preempted": Cell(p.preempted), "changed": Cell(p.changed, of=p.n), "p": Cell(_p(run, p))})
        for p in found
    ]
    columns = [Column("preempted", "preempted"), Column("changed", "other answers"), Column("p", "p")]
    note = (
        f"The same prompts, {found[0].asked} at once. preempted: those that lost their place in the pool then. "
        "other answers: prompts whose answer is another than when few are asked at a time, in either leg. The A/A arm "
        "shows what batching alone does. p: of no more than the baseline's, one-sided, after Holm."
    )
    return [Table("pressure", "under pressure", ("arm",), columns, rows, [Note(note)])]


def _p(run: Run, row: Pressed | Called) -> float | None:
    return None if row.arm == run.baseline or run.is_control(row.arm) else row.adjusted


def calls(run: Run) -> list[Table]:
    """How many tool calls of every arm are calls."""
    found = called(run)
    if not found:
        return []
    rows = [
        Row((c.arm,), {"called": Cell(c.called, of=c.n), "valid": Cell(c.valid, of=c.n), "p": Cell(_p(run, c))})
        for c in found
    ]
    columns = [Column("called", "called"), Column("valid", "valid"), Column("p", "p")]
    note = (
        "Prompts that were answered by a tool call, and by valid ones: a tool that there is, with a JSON object "
        "that has all its arguments, each of its kind; in every leg. One that its cap cut off is none. "
        "p: of no fewer than the baseline's, one-sided, after Holm."
    )
    return [Table("calls", "tool calls", ("arm",), columns, rows, [Note(note)])]


def served(run: Run) -> list[Table]:
    """What every arm's server said of itself, and what shows that compression ran."""
    found = told(run)
    if not found:
        return []
    columns = [Column("engine", "engine"), Column("kv", "KV cache"), Column("room", "room, tokens", "tokens")]
    columns += [Column("hits", "prefix hits"), Column("preempted", "preempted")]
    columns.append(Column("compression", "compression"))
    late = max((s.counters.get("late", 0.0) for s in found), default=0.0)
    notes = [f"{s.method} stores {s.proof}." for s in found if s.proof]
    alike = {line: [s.method for s in found if s.line == line] for line in (s.line for s in found) if line}
    notes += [f"{', '.join(methods)}: {_line(line)}." for line, methods in alike.items()]
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
    notes += _read(run)
    rows = [Row((server.method,), _said(server)) for server in found]
    return [Table("servers", "what was served", ("arm",), columns, rows, infos(notes))]


def _line(line: Line) -> str:
    (small, _), (large, _) = line.pools
    slopes, fixed = line.open
    mib = [f"{size / 2**20:,.1f}" for size in (line.fixed, *fixed)]
    return (
        f"{line.slope:,.0f} bytes a token ({slopes[0]:,.0f} to {slopes[1]:,.0f}) and {mib[0]} MiB besides ({mib[1]} to "
        f"{mib[2]}), by the line through pools of {small:,.0f} and {large:,.0f} tokens; in brackets what blocks of "
        f"{line.block:,.0f} tokens leave open"
    )


def _read(run: Run) -> list[str]:
    """Of how many prompts the baseline's server said how likely the answers are, and why of no more."""
    found = [r for r in run.records if isinstance(r, Scored)]
    if not found:
        return []
    read = len({(r.task, r.sample) for r in found if r.method == run.baseline and r.status == "ok"})
    answered = {
        (r.task, r.sample) for r in run.records if isinstance(r, Served) and r.method == run.baseline and r.task
    }
    failed = next((f": {r.error}" for r in found if r.status != "ok"), "")
    said = "said how likely the answers are (the sign likelihood)"
    return [f"The baseline's server {said} to {read} of the {len(answered)} prompts of tasks{failed}."]


def _said(server: ServerReport) -> dict[str, Cell]:
    facts, counts = server.facts, server.counters
    queries, hits = counts.get("prefix_queries", 0), counts.get("prefix_hits", 0)
    tokens = facts.get("kv_tokens")
    engine = " ".join(str(x) for x in (server.profile, facts.get("version", "")) if x)
    shown = {True: "shown" if server.proof else "not shown", False: "none", None: "not shown"}[facts.get("compressed")]
    return {
        "engine": Cell(engine),
        "kv": Cell(str(facts["kv_dtype"]) if "kv_dtype" in facts else None),
        "room": Cell(tokens if isinstance(tokens, int) else None),
        "hits": Cell(100 * hits / queries if queries else None, unit="%"),
        "preempted": Cell(round(counts["preemptions"]) if "preemptions" in counts else None),
        "compression": Cell(shown),
    }
