"""What every arm answered to a task: scores and bytes, or what its answers cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kvsuite.analysis.divergence import Divergence
from kvsuite.analysis.forced import divergences
from kvsuite.analysis.length import LengthRow, length_rows, named
from kvsuite.analysis.samples import SampleRow, sample_rows
from kvsuite.analysis.shortfall import Share, Who, shares, total
from kvsuite.analysis.table import Cell, Column, Note, Row, State, Table, errors, infos, span
from kvsuite.analysis.tables.shared import dtype_notes, failed, floor, served, setting
from kvsuite.readers.run import by_task
from kvsuite.records import REFERENCE, Answer, Run, is_reference
from kvsuite.tasks.reference import PREFIX

PARTED = Column("parted", "parts after", "tokens", "range")
PARTING = (
    "parts after: tokens before the first that differs, median with 95 %; answers that agree to the end part later (∞: "
    "most do)."
)
FRAGMENTED = 0.05
"""Empty slots that are worth a column."""


def answers(run: Run) -> list[Table]:
    """One table a task."""
    arms, found = shares(run), []
    for task, mine in by_task(run).items():
        made = {"length": _length, "divergence": _divergence}.get(mine[0].evaluation, _samples)
        found.append(made(task, mine, arms[task], run))
    return found


def _counted(what: str, shares: Mapping[Who, Share]) -> str:
    """How many samples a task has, and with how many its arms were left."""
    asked, ok = max(s.asked for s in shares.values()), [s.ok for s in shares.values()]
    if min(ok) == asked:
        return f"{asked} {what}"
    return f"partial: {span(ok)} of {asked} {what}"


def _row(arm: str, share: Share, cells: Mapping[str, Cell]) -> Row:
    """An arm's figures, or why there are none; its name says how many of its answers are there if not all are."""
    counts = [f"{share.ok} of {share.asked}"] if share.ok + share.failed < share.asked else []
    counts += [f"{share.failed} FAILED"] if share.failed else []
    state: State = (
        "ok" if share.ok == share.asked else "partial" if share.ok else "failed" if share.failed else "missing"
    )
    lacking = (share.ok, share.asked) if state == "partial" else None
    whole = {key: replace(cell, state=state, lacking=lacking) for key, cell in cells.items()}
    return Row((arm,), whole, (f"{arm} ({', '.join(counts)})" if counts else arm,))


def _lost(shares: Mapping[Who, Share]) -> list[Note]:
    if all(s.ok == s.asked for s in shares.values()):
        return []
    said = "partial: arms with fewer answers have figures of these alone, which may be the short or the easy ones."
    return errors([said])


def _samples(task: str, answers: Sequence[Answer], shares: Mapping[Who, Share], run: Run) -> Table:
    rows = sample_rows(answers, run.baseline)
    lengths = [a.prompt_tokens for a in answers if a.prompt_tokens] or run.facts["settings"]["length"]
    title = (
        f"{task} · {_counted('samples', shares)} of {span(lengths)} tokens · {setting(run)}, batch {answers[0].width}"
    )
    there = {row.method for row in rows}
    rows += [SampleRow(method, 0, 0, "") for method, _ in shares if method not in there]
    columns = [Column("score", "score", "score"), Column("score", "95 %", "score", "ends")]
    columns += [
        Column("same", f"as {run.baseline}"),
        Column("tokens", "tokens", "tokens"),
        Column("cost", "×", "×", "range"),
    ]
    note = "95 %: interval of the mean score; as baseline: answers that are the baseline's to the letter."
    if not served(run):
        tells = any((row.read or 1) < 0.99 or row.fragmentation >= FRAGMENTED for row in rows)
        columns += [Column("held", "MiB", "MiB"), Column("ratio", "of full", "×")]
        columns += [Column("read", "read", "×"), Column("empty", "empty, %", "%")] if tells else []
        columns += [Column("prefill", "prefill tok/s", "tok/s"), Column("decode", "decode tok/s", "tok/s")]
        note = (
            f"MiB is what the cache of one sample holds after its prompt ({run.facts['settings']['compress']} "
            "compressed), all layers; it may grow from there. 95 % is the interval of the mean score; as full counts "
            "answers with the very tokens of full's."
        )
        if tells:
            note += (
                " Read: the part of the bytes held that the last step read; empty: the slots in use at the end that "
                "held no token."
            )
    note += f" Tokens: mean of an answer; ×: those of all answers against {run.baseline}'s."
    columns += [PARTED] if any(row.parted for row in rows) else []
    lengths_of = {row.method: row for row in length_rows(answers, run.baseline)}
    drawn = [_row(row.method, shares[row.method, 0], _sample_cells(row, lengths_of.get(row.method))) for row in rows]
    controls = [(row.method, row.pairs, row.same) for row in rows if run.is_control(row.method)]
    failures = [(row.method, row.error) for row in rows if row.failed]
    told = infos([PARTING]) if PARTED in columns else []
    notes = [*_lost(shares), *_room(rows, run.baseline), Note(note), *told]
    notes += [*floor(run, controls), *dtype_notes(run), *failed(failures)]
    return Table(f"samples:{task}", title, ("method",), columns, drawn, notes)


def _room(rows: Sequence[SampleRow], baseline: str) -> list[Note]:
    """Whether the baseline's score leaves room to lose, and to win."""
    base = next((row for row in rows if row.method == baseline), None)
    if base is None or base.score is None:
        return []
    score, n = base.score, base.n - base.failed
    if score.low <= base.chance:
        known = f"{score.mean:.2f} ({score.low:.2f}–{score.high:.2f}) on {n} samples"
        text = f"Measures nothing here: {baseline} scores {known}, which is not above guessing ({base.chance:.2f})."
        return [Note(text, "warning")]
    return infos([f"{baseline} scores 1 on all {n} samples: a method can only lose."] if score.mean == 1 else [])


def _sample_cells(row: SampleRow, length: LengthRow | None) -> dict[str, Cell]:
    none = row.score is None
    return {
        "tokens": Cell(length.tokens if length else None),
        "cost": Cell.estimated(length.cost if length else None),
        "score": Cell.estimated(row.score),
        "same": Cell() if none else Cell(row.same, of=row.pairs),
        "parted": Cell.estimated(row.parted),
        "held": Cell(None if row.nbytes is None else row.nbytes / 2**20),
        "ratio": Cell(row.ratio),
        "read": Cell(row.read),
        "empty": Cell(None if none else 100 * row.fragmentation),
        "prefill": Cell(row.prefill),
        "decode": Cell(row.decode),
    }


def _divergence(task: str, answers: Sequence[Answer], shares: Mapping[Who, Share], run: Run) -> Table:
    answer, seen = task.startswith(PREFIX), divergences(run, task)
    positions = max((d.divergence.n for d in seen.values()), default=0)
    counted = _counted("references" if answer else "documents", shares)
    title = f"{task} · {counted}, {positions:,} forced tokens · {setting(run)}"
    columns = [
        Column("kl", "KL", "nats"),
        Column("kl", "95 %", "nats", "ends"),
        Column("excess", "beyond noise", "nats"),
    ]
    columns += [Column("p50", "50 % below", "nats"), Column("p99", "99 % below", "nats")]
    columns += [Column("largest", "largest", "nats"), Column("flips", "flips, %", "%", "half")]
    columns += [Column("change", "|Δ log p|", "nats"), Column("perplexity", "perplexity", "×", "range")]
    fed = "The reference answer is fed behind its prompt" if answer else "The document's own continuation is fed"
    note = (
        f"{fed} to every arm's cache token by token; KL of the next token is of "
        f"{run.baseline}'s distribution against the arm's. 95 %: of documents. Beyond noise: less the control's KL. "
        "Flips: another most likely token."
    )
    drawn = []
    for (arm, _), share in shares.items():
        d = seen.get(arm)
        drawn.append(_row(arm, share, {} if d is None else _divergence_cells(d.divergence)))
    failures = dict.fromkeys((a.method, a.error) for a in answers if a.status == "failed")
    notes = [*_lost(shares), Note(note), *dtype_notes(run), *failed(list(failures))]
    return Table(f"divergence:{task}", title, ("method",), columns, drawn, notes, detail=True)


def _divergence_cells(d: Divergence) -> dict[str, Cell]:
    flips = d.flips
    return {
        "kl": Cell.estimated(d.kl),
        "excess": Cell.estimated(d.excess.get("kl")),
        "p50": Cell.estimated(d.p50),
        "p99": Cell.estimated(d.p99),
        "largest": Cell(d.largest),
        "flips": Cell(100 * flips.mean, 100 * flips.low, 100 * flips.high),
        "change": Cell.estimated(d.change),
        "perplexity": Cell.estimated(d.perplexity),
    }


def _length(task: str, answers: Sequence[Answer], shares: Mapping[Who, Share], run: Run) -> Table:
    rows, where = length_rows(answers, run.baseline), run.facts["settings"]
    how = f"temperature {where['temperature']:g}" if where["temperature"] else "greedy"
    cap = max(a.cap for a in answers)
    repeats = max(repeat for _, repeat in shares)
    many = f", {repeats} answers each" if repeats > 1 else ""
    title = f"{task} · {_counted('prompts', shares)}{many}, at most {cap} tokens, {how} · {setting(run)}"
    there, arms = {row.name for row in rows}, _arms(shares, run)
    rows += [LengthRow(method, control, 0, 0, "") for method, control in arms if named(method, control) not in there]
    said = [
        f"Cost is the tokens of all answers against {run.baseline}'s to the same prompts, one cap for both; its "
        "interval resamples prompts. An answer at its cap counts as that long: more cap may show more effect.",
        "1.5× and 2/3 count answers at least that much longer, at most that short"
        + (f", than {run.baseline}'s with other noise" if any(row.control for row in rows) else "")
        + ": with no effect, as many of both. "
        f"D: percent of answers with D = 1 - tokens / {run.baseline}'s at -50 % or less : at 50 % or more.",
    ]
    controls = [(row.name, row.pairs, row.same) for row in rows if run.is_control(row.method)]
    notes = [*_lost(shares), *infos(said), *floor(run, controls)]
    columns = [Column("cost", "cost", "×"), Column("cost", "95 %", "×", "ends"), Column("tokens", "tokens", "tokens")]
    columns += [Column("capped", "at cap"), Column("longer", "1.5×"), Column("shorter", "2/3")]
    columns += [Column("d", "D, %", "pairs"), Column("same", f"as {run.baseline}")]
    if any(row.parted for row in rows):
        columns.append(PARTED)
        notes += infos([PARTING])
    if not served(run):
        columns.append(Column("ratio", "of full", "×"))
        notes.append(
            Note(
                f"Of {run.baseline} is bytes held at the end for each token, against {run.baseline}'s: near 1.00 the "
                "method hardly acted."
            )
        )
        notes += dtype_notes(run)
    if any(row.control for row in rows):
        notes.append(Note("full, other seed is the noise of sampling itself: what stays inside it is not an effect."))
    if any(is_reference(row.method) for row in rows):
        notes.append(Note(f"{REFERENCE}…: the uncompressed cache at that temperature, an effect that one knows."))
    notes += failed([(row.name, row.error) for row in rows if row.failed])
    drawn = [_row(row.name, total(arms[row.method, row.control]), _length_cells(row)) for row in rows]
    return Table(f"length:{task}", title, ("method",), columns, drawn, notes)


def _arms(shares: Mapping[Who, Share], run: Run) -> dict[tuple[str, bool], list[Share]]:
    """Repeats by arm: a method, and the baseline's last as its control."""
    last = max((repeat for method, repeat in shares if method == run.baseline), default=0)
    found: dict[tuple[str, bool], list[Share]] = {}
    for (method, repeat), share in shares.items():
        found.setdefault((method, method == run.baseline and 0 < repeat == last), []).append(share)
    return found


def _length_cells(row: LengthRow) -> dict[str, Cell]:
    counts = {"capped": row.capped, "same": row.same}
    changed = {"longer": row.longer, "shorter": row.shorter}
    return {
        "cost": Cell.estimated(row.cost),
        "tokens": Cell(row.tokens),
        **{key: Cell(count, of=row.pairs) if row.pairs else Cell() for key, count in counts.items()},
        **{key: Cell(count if row.pairs else None) for key, count in changed.items()},
        "d": Cell() if row.d is None else Cell(round(100 * row.d[0]), of=round(100 * row.d[1])),
        "parted": Cell.estimated(row.parted),
        "ratio": Cell(row.ratio),
    }
