"""The verdict on every method of a run, endpoint by endpoint, with the controls' own rows beside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from kvsuite.analysis import forced
from kvsuite.analysis.effects import Comparison, Finding, compare, decided
from kvsuite.analysis.runs import failures, noise, parts, speeds
from kvsuite.analysis.shortfall import evaluation_of, shares
from kvsuite.analysis.table import Cell, Column, Note, Row, Table, errors, infos
from kvsuite.analysis.tables.decision import decision
from kvsuite.analysis.validity import left_out, withheld
from kvsuite.analysis.verdict import Effect, Named
from kvsuite.margins import Margins
from kvsuite.records import Run

COLUMNS = (
    Column("effect", "effect"),
    Column("effect", "interval", shows="ends"),
    Column("effect", "p", shows="p"),
    Column("effect", "verdict", shows="verdict"),
    Column("seen", "as seen", "samples"),
    Column("needs", "needs", "samples"),
    Column("visible", "visible"),
)
UNITS = {
    "kl": "nats", "perplexity": "×", "reference": "nats", "quality": "pt", "broken": "%", "length": "×",
    "truncation": "%", "speed": "×",
}  # fmt: skip
"""Of each endpoint: points of the score, shares, multiples of the baseline."""
ENDPOINTS = {
    "kl": "KL divergence of the next token from the baseline's, beyond the control's, in nats",
    "perplexity": "of the forced text, as a multiple",
    "reference": "log probability of a token of the reference answers, forced behind their prompts, in nats",
    "quality": "mean score, in points of 100",
    "broken": "of the eligible samples (score at least their dataset's mean), those that lost more than a tenth of "
    "their score, beyond what noise breaks",
    "length": "tokens of the answers to chats, as a multiple",
    "truncation": "answers to chats at most half as long, beyond those of noise",
    "speed": "decode steps a second (of servers: time per token), as a multiple",
}
NEEDS = (
    " Samples that decide 4 times of 5 – as seen: if the effect is as seen; needs: that a method without an effect is "
    "within its margin. visible: the smallest effect that these samples would have told from none 4 times of 5."
)
WORDS = (
    "harmful: all of the interval is beyond the margin; within margin: none of it; undecided: neither; not excluded: "
    "likewise, of an endpoint that can only convict; "
    "capped: answers end at the cap, so longer ones would not be seen."
)
UNTOLD = " cannot tell: a headline says why what was measured clears no method."
PARTIAL = Note(
    "partial a/b: only a of b samples (of speed: rounds or cells) could be compared, since others are "
    "missing. Those that are there may be the short ones, so these figures decide nothing.",
    "error",
)


def verdicts(run: Run) -> tuple[list[Table], list[Named]]:
    """One row per method and primary endpoint, and what stands beside them; none for a run without answers. And the
    endpoints themselves."""
    margins = Margins.of(run.facts)
    fast = speeds(run, margins)
    elsewhere = [*forced.effects(run, margins), *fast.effects]
    methods, beside = decided(compare(parts(run), margins), margins, elsewhere, withheld(run))
    controls = compare(noise(run), margins)
    rows = [effect_row(row.method, e) for row in methods for e in distinct(row)]
    rows += _unanswered(run, methods)
    rows += [effect_row(name, e) for name, e in beside]
    rows += [Row((name, "speed"), {"effect": Cell(state=why)}) for name, why in fast.lost]
    rows += [Row((name, "all"), {"effect": Cell(state=why)}) for name, why in sorted(left_out(run).items())]
    if not rows:
        return [], []
    hidden = any(len(distinct(row)) < len(row.effects) for row in methods)
    noises = [effect_row(row.method, e) for row in controls for e in distinct(row)]
    rows += [Row(r.key, {"effect": replace(r.cells["effect"], p=None, verdict="noise")}) for r in noises]
    said = [
        f"{WORDS}{UNTOLD * bool(withheld(run))} p: of no harm beyond the margin, one-sided, after Holm over all rows "
        f"but the noise.{needs(rows)}",
        endpoints(rows, fast.where)
        + (" broken has no row where it is quality with the sign turned." if hidden else ""),
        *(["noise: the controls, measured as if they were methods: what no effect looks like."] if noises else []),
        *_floor(methods),
    ]
    margin = Note(f"{margins_text(margins)}.")
    notes = [*partial(rows), *infos(said), *errors(failures(run)), margin]
    table = Table("verdicts", "verdicts", ("method", "endpoint"), COLUMNS, rows, notes)
    effects = [*beside, *((row.method, e) for row in methods for e in row.effects)]
    return [*decision(run, effects), table, *_beside([*methods, *controls])], effects


def effect_row(name: str, e: Effect) -> Row:
    """An endpoint of one method."""
    scale = 1 if UNITS[e.endpoint] in ("×", "nats") else 100
    cell = Cell(
        scale * e.estimate.mean,
        scale * e.estimate.low,
        scale * e.estimate.high,
        unit=UNITS[e.endpoint],
        p=e.adjusted,
        verdict=e.verdict,
        limits=(round(scale * e.limits[0], 9), round(scale * e.limits[1], 9)),
        state="partial" if e.lacking or e.verdict == "partial" else "ok",
        lacking=e.lacking,
    )
    open_ = e.verdict in ("undecided", "not excluded")
    more = {"seen": e.decides, "needs": e.needed} if open_ else {}
    cells = {"effect": cell} | {key: Cell(n) for key, n in more.items() if math.isfinite(n)}
    if open_ and math.isfinite(e.visible):
        cells["visible"] = Cell(scale * (e.visible + e.ratio), unit=UNITS[e.endpoint])
    return Row((name, e.endpoint), cells)


def partial(rows: Iterable[Row]) -> list[Note]:
    """What *partial* means, where a row is."""
    return [PARTIAL] if any(cell.state == "partial" for row in rows for cell in row.cells.values()) else []


def needs(rows: Iterable[Row]) -> str:
    """What *needs* means, where a row has a number of samples there."""
    return NEEDS if any(row.cells.keys() & {"needs", "visible"} for row in rows) else ""


def endpoints(rows: Iterable[Row], where: str = "") -> str:
    """What the endpoints of some rows are, and in which cell speed was judged."""
    there = {row.key[-1] for row in rows}
    said = {**ENDPOINTS, "speed": ENDPOINTS["speed"] + (f", at {where}" if where else "")}
    return " ".join(f"{name}: {what}." for name, what in said.items() if name in there)


def distinct(row: Comparison) -> list[Effect]:
    """Its endpoints, without *broken* where that is *quality* with its sign turned: scores of 0 and 1, of which none
    healed and noise took none."""
    quality, broken = row.effect("quality"), row.effect("broken")
    if quality is None or broken is None or (broken.n, broken.verdict) != (quality.n, quality.verdict):
        return row.effects
    same = math.isclose(broken.estimate.mean, -quality.estimate.mean, abs_tol=1e-9)
    return [e for e in row.effects if e is not broken] if same else row.effects


def _unanswered(run: Run, compared: list[Comparison]) -> list[Row]:
    """A row for every method that was to be compared and has no answer in common with the baseline."""
    there = {(row.method, e.endpoint) for row in compared for e in row.effects}
    answered, found = shares(run), []
    for endpoint, evaluation in (("quality", "samples"), ("length", "length")):
        ok: dict[str, int] = {}
        asked: dict[str, int] = {}
        for task, arms in answered.items():
            if evaluation_of(run, task) != evaluation:
                continue
            for (method, repeat), share in arms.items():
                if not repeat:
                    ok[method] = ok.get(method, 0) + share.ok
                    asked[method] = asked.get(method, 0) + share.asked
        for method in ok:
            plain = method == run.baseline or run.is_control(method)
            if not plain and (method, endpoint) not in there and not (ok[method] and ok.get(run.baseline, 0)):
                none = Cell(verdict="partial", state="partial", lacking=(0, asked[method]))
                found.append(Row((method, endpoint), {"effect": none}))
    return found


BESIDE = ["net harm", "churn", "longer", "shorter", "cap hits", "empty", "loops"]


def _beside(rows: list[Comparison]) -> list[Table]:
    """Exploratory: on how many samples only the method shows something, and only the other arm."""
    shown = [name for name in BESIDE if any(row.finding(name) for row in rows)]
    drawn = []
    for row in rows:
        cells = {name: _counted(found) for name in shown if (found := row.finding(name))}
        if (logs := row.finding("log length")) and logs.estimate is not None:
            mean, low, high = (math.exp(x) for x in (logs.estimate.mean, logs.estimate.low, logs.estimate.high))
            cells["log length"] = Cell(mean, low, high, p=logs.adjusted)
        name = f"{row.method} (partial)" if any(e.verdict == "partial" for e in row.effects) else row.method
        drawn.append(Row((row.method,), cells, (name,)))
    note = Note(
        "Samples that only the method : only the other arm shows it on; * p < 5 % after Benjamini and Hochberg. net "
        "harm: broke, healed. churn: changed either way; longer (3/2), shorter (2/3): beyond the control's. cap hits, "
        "empty, loops (ends in the same words four times over): full's. geometric length: mean of the logarithms, as a "
        "multiple, with 95 % and p of flipped signs, adjusted likewise."
    )
    columns = [Column(name, name, "pairs") for name in shown]
    if any("log length" in row.cells for row in drawn):
        columns += [Column("log length", "geometric length", "×", "range"), Column("log length", "p", shows="p")]
    return [Table("beside", "beside the verdicts, exploratory", ("method",), columns, drawn, [note])] if shown else []


def _counted(found: Finding) -> Cell:
    only = (None, None) if found.counts is None else found.counts
    return Cell(only[0], of=only[1], p=found.adjusted)


def margins_text(margins: Margins) -> str:
    """The margins, in words."""
    signs = {"quality": "-{:g} points", "length": "±{:g} %", "speed": "-{:g} %", "kl": "+{:g} nats"}
    signs["reference"] = "-{:g} nats"
    shown = {name: getattr(margins, name) * (1 if UNITS[name] == "nats" else 100) for name in Margins.names()}
    said = ", ".join(f"{name} {signs.get(name, '+{:g} %').format(x)}" for name, x in shown.items())
    return f"margins: {said}" + (f"; {' and '.join(margins.veto)} can only convict" if margins.veto else "")


def _floor(rows: Sequence[Comparison]) -> list[str]:
    broken, scored = ({e.endpoint for row in rows for e in row.effects} & {x} for x in ("broken", "quality"))
    if scored and not broken:
        return ["broken beyond noise: no floor measured; no control changed an answer of those compared."]
    none = {row.eligible for row in rows if row.floor == 0 and row.eligible}
    return [f"the control broke 0 of {n}: noise could break up to {3 / n:.1%} (3/n); tested against 0." for n in none]
