"""What a deployment needs to know, first: one row per method, from its bytes to the words that decide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from kvsuite.analysis.costs import sample_seconds
from kvsuite.analysis.forced import divergences
from kvsuite.analysis.latency import BreakEven
from kvsuite.analysis.samples import held_share
from kvsuite.analysis.speed import break_evens
from kvsuite.analysis.table import Cell, Column, Note, Row, Table
from kvsuite.analysis.verdict import SPEED, Effect, Named, overall
from kvsuite.records import Answer, Run, Timing

COLUMNS = (
    Column("decision", "decision"),
    Column("held", "of full", "×"),
    Column("speed", "speed", "×"),
    Column("from", "faster from", "tokens"),
    Column("kl", "KL", "nats"),
    Column("flips", "flips, %", "%"),
    Column("perplexity", "perplexity, %", "%"),
    Column("reference", "reference", "nats"),
    Column("quality", "tasks, pt", "pt"),
    Column("length", "length", "×"),
)
MEANING = (
    "of full: bytes held after the prompt. speed: of decode steps; and the context from which they are the faster, by "
    "the line through the lengths that were timed (any: at all, never: at none). "
    "KL, flips (another most likely token), perplexity: on forced text; KL beyond the control's. reference: change of "
    "the log probability of a token of the right answer. tasks: of the mean score. A method is damaged by what is "
    "harmful below; no damage is within every margin that must be held. Bytes and speed damage nothing."
)
SAID = {
    "kl": "KL {:+.3f}",
    "perplexity": "perplexity {:+.0%}",
    "reference": "reference answers {:+.2f} nats",
    "quality": "tasks {:+.0f} pt",
    "broken": "{:.0%} broken",
    "length": "{:.2f}× as long",
    "truncation": "{:.0%} truncated",
}
MANY, NAMED = 3, 10
"""Kinds of damage, and methods, that are named."""
UNITS = {
    "kl": "documents", "perplexity": "documents", "reference": "reference answers", "quality": "samples",
    "broken": "samples", "length": "chats", "truncation": "chats",
}  # fmt: skip
EVALUATIONS = {"documents": "divergence", "reference answers": "divergence", "samples": "samples", "chats": "length"}


def decision(run: Run, decided: Sequence[Named]) -> list[Table]:
    """The headline and the table; nothing for a run of which no method has an endpoint."""
    effects: dict[str, list[Effect]] = {}
    for method, e in decided:
        effects.setdefault(method, []).append(e)
    damage = {m: own for m, es in effects.items() if (own := [e for e in es if e.endpoint != SPEED])}
    if not damage or "servers" in run.facts:
        return []
    shares, evens = held(run), _break_evens(run)
    verdicts = {method: overall(own) for method, own in damage.items()}
    rows = []
    for method, own in damage.items():
        speed = next((e for e in effects[method] if e.endpoint == SPEED), None)
        words = _damaged(own) if verdicts[method] == "harmful" else _cleared(speed, evens.get(method))
        if verdicts[method] == "undecided":
            words = _open(run, own)
        cells = _cells(run, method, own, speed, evens.get(method), shares)
        rows.append(Row((method,), {"decision": Cell(words, verdict=verdicts[method]), **cells}))
    shown = [c for c in COLUMNS if any(row.cells.get(c.key, Cell()).value not in (None, "capped") for row in rows)]
    return [
        _headline(verdicts, shares),
        Table("decision", "method by method", ("method",), shown, rows, [Note(MEANING)]),
    ]


def _headline(verdicts: Mapping[str, str], held: Mapping[str, float]) -> Table:
    def named(verdict: str) -> list[str]:
        return [method for method, found in verdicts.items() if found == verdict]

    said = []
    if safe := named("within margin"):
        shares = " and ".join(", ".join(f"{held[m]:.2f}" for m in safe if m in held).rsplit(", ", 1))
        said.append(f"{', '.join(safe)}: no damage found" + (f", {shares} of the bytes" if shares else ""))
    said += [f"{_some(who)}: {what}" for verdict, what in LATER.items() if (who := named(verdict))]
    return Table("headline", "; ".join(said))


LATER = {"harmful": "damaged", "undecided": "cannot tell yet"}


def _some(methods: Sequence[str]) -> str:
    """Their names, or some of them: the table has them all."""
    more = len(methods) - NAMED
    return ", ".join(methods[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _damaged(effects: Iterable[Effect]) -> str:
    harmful = [e for e in effects if e.verdict == "harmful"]
    if any(e.endpoint == "quality" for e in harmful):  # which says the same
        harmful = [e for e in harmful if e.endpoint != "broken"]
    said = [SAID[e.endpoint].format(_figure(e)) for e in harmful]
    return f"damaged: {', '.join(said[:MANY])}"


def _figure(e: Effect) -> float:
    if e.endpoint == "perplexity":
        return e.estimate.mean - 1
    return 100 * e.estimate.mean if e.endpoint == "quality" else e.estimate.mean


def _cleared(speed: Effect | None, even: BreakEven | None) -> str:
    """Of a method without damage."""
    if speed is None or speed.verdict == "partial":
        return "no damage; speed not measured"
    if speed.estimate.low >= 1 or speed.verdict == "within margin":
        return "use it"
    if even is not None and even.faster == "longer" and even.length is not None:
        return f"use it above {even.length:,.0f} tokens"
    return "no damage, but slower" if speed.verdict == "harmful" else "no damage; speed: cannot tell"


def _open(run: Run, effects: Sequence[Effect]) -> str:
    """What is missing for a verdict: samples of the kind that takes most, and the minutes they take with all arms."""
    if any(e.verdict == "partial" for e in effects):
        return "partial: answers are missing"
    waiting = [e for e in effects if e.verdict == "undecided" and e.estimate.known]
    if not waiting:
        return "cannot tell: answers end at the cap" if any(e.verdict == "capped" for e in effects) else "cannot tell"
    worst = max(waiting, key=lambda e: min(e.decides, e.needed) / max(e.n, 1))
    wanted = min(worst.decides, worst.needed)
    if not math.isfinite(wanted):
        return f"cannot tell: at the margin of {worst.endpoint}"
    more, kind = max(math.ceil(wanted) - worst.n, 1), UNITS[worst.endpoint]
    minutes = more * sample_seconds(run, EVALUATIONS[kind]) / 60
    return f"cannot tell: {more:,} more {kind}, {max(1, math.ceil(minutes)):,} min"


def _cells(
    run: Run,
    method: str,
    effects: Sequence[Effect],
    speed: Effect | None,
    even: BreakEven | None,
    held: dict[str, float],
) -> dict[str, Cell]:
    named = {e.endpoint: e for e in effects}
    seen = divergences(run).get(method)
    found = {"held": Cell(held.get(method)), "speed": Cell(speed.estimate.mean if speed else None)}
    if even is not None:
        words = {"everywhere": "any", "nowhere": "never", "shorter": "-"}
        found["from"] = Cell(even.length if even.faster == "longer" else words[even.faster])
    if seen is not None:
        by = seen.divergence
        found["kl"] = Cell(named["kl"].estimate.mean if "kl" in named else by.kl.mean)
        found |= {"flips": Cell(100 * by.flips.mean), "perplexity": Cell(100 * (by.perplexity.mean - 1))}
    if reference := named.get("reference"):
        found["reference"] = Cell(reference.estimate.mean)
    if quality := named.get("quality"):
        found["quality"] = Cell(100 * quality.estimate.mean)
    if length := named.get("length"):
        found["length"] = Cell(length.estimate.mean, state="ok") if length.verdict != "capped" else Cell("capped")
    return found


def held(run: Run) -> dict[str, float]:
    """Bytes held after the prompt, as a part of the baseline's for the same prompts; those of chats are short."""
    answered: dict[str, dict[tuple[str, str, int], Answer]] = {}
    for r in run.records:
        if isinstance(r, Answer) and r.status == "ok" and r.evaluation != "length":
            answered.setdefault(r.method, {})[r.task, r.sample, r.repeat] = r
    base = answered.pop(run.baseline, {})
    found = {method: held_share(own, base) for method, own in answered.items()}
    return {method: share for method, share in found.items() if share is not None}


def _break_evens(run: Run) -> dict[str, BreakEven]:
    """At the widest batch that was timed at several lengths."""
    found = break_evens([r for r in run.records if isinstance(r, Timing)])
    widest = max((width for _, width in found), default=0)
    return {method: even for (method, width), even in found.items() if width == widest}
