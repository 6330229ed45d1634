"""What every report shows of a run, as plain tables: the report plugins only draw them."""

from __future__ import annotations

from collections.abc import Sequence

from kvsuite.analysis.length import LengthRow, length_rows
from kvsuite.analysis.samples import SampleRow, sample_rows
from kvsuite.analysis.speed import OURS, SpeedRow, speed_rows
from kvsuite.analysis.stats import Interval
from kvsuite.readers.run import answers as task_answers
from kvsuite.records import Agreement, Answer, Record, Run, Timing
from kvsuite.report import servers
from kvsuite.report.table import Table
from kvsuite.report.verdicts import verdicts


def tables(run: Run) -> list[Table]:
    """All tables of a run, the verdicts first."""
    found = [*servers.headlines(run), *verdicts(run), *servers.speed(run), *servers.served(run)]
    timings = [r for r in run.records if isinstance(r, Timing)]
    for phase in ("decode", "prefill"):
        cells = speed_rows([t for t in timings if t.phase == phase])
        if cells:
            found.append(_speed(phase, cells, run))
    promises = speed_rows([t for t in timings if t.phase not in ("decode", "prefill")])
    answers = list(task_answers(run))
    for task in dict.fromkeys(a.task for a in answers):
        mine = [a for a in answers if a.task == task]
        if mine[0].evaluation == "length":
            found.append(_length(task, length_rows(mine, run.baseline), mine, run))
        else:
            found.append(_samples(task, sample_rows(mine, run.baseline), mine, run))
    agreements = [r for r in run.records if isinstance(r, Agreement)]
    if promises or agreements:
        found.append(_promises(promises, agreements))
    return found


def setting(run: Run) -> str:
    """Model, number format, threads: what every figure depends on."""
    where = run.facts["environment"]
    if _served(run):
        return f"{run.facts['model']['name']}, served"
    device = where["gpu"] or f"{where['threads']} threads"
    return f"{run.facts['model']['name']}, {where['dtype']}, {device}"


def provenance(records: Sequence[Record]) -> str:
    """That what was scored is what was timed, or that it was not."""
    good = [r for r in records if isinstance(r, (Answer, Timing)) and r.status == "ok" and r.cache.startswith(OURS)]
    scored = {(r.method, r.cache) for r in good if isinstance(r, Answer)}
    timed = {(r.method, r.cache) for r in good if isinstance(r, Timing)}
    both = {method for method, _ in scored} & {method for method, _ in timed}
    if not both:
        return ""
    apart = [f"{method} {cache}" for method, cache in sorted(scored ^ timed) if method in both]
    if apart:
        return f"NOT THE SAME CACHE SCORED AND TIMED: {', '.join(apart)}."
    return f"Scored and timed: the same {', '.join(sorted({cache for method, cache in scored if method in both}))}."


def _speed(phase: str, rows: Sequence[SpeedRow], run: Run) -> Table:
    cells = sorted({(r.width, r.length) for r in rows})
    by = {(r.method, r.width, r.length): r for r in rows}
    drawn = []
    full = [by.get(("full", *cell)) for cell in cells]
    drawn.append(["full, tok/s", *["-" if r is None or r.rate is None else f"{r.rate:,.0f}" for r in full]])
    for method in dict.fromkeys(r.method for r in rows):
        drawn.append([f"{method}, ×", *[_speedup(by.get((method, *cell))) for cell in cells]])
    notes = [
        f"Speed as a multiple of full's, which ran in turn with it ({max(r.rounds for r in rows)} pairs of rounds); ± "
        "is the 95 % t-interval. The row of full against itself is the noise of this machine.",
        _by_what(rows),
    ]
    if phase == "prefill":
        notes[1] = (
            "A prefill with what the method observes, and its compression. One prefill serves all methods of a run."
        )
    if any(r.method == "transformers" for r in rows):
        notes.append(
            "transformers is its own DynamicCache under SDPA, the same sequences: a row beside, not the baseline."
        )
    notes += _errors([(f"{r.method} b{r.width} l{r.length}", r.error) for r in rows if r.failed])
    return Table(f"{phase} · {setting(run)}", ["batch · length", *[f"{w} · {n}" for w, n in cells]], drawn, notes)


def _by_what(rows: Sequence[SpeedRow]) -> str:
    """What stored and attended; a method without a kernel is not to be ranked by its speed."""
    slow = {r.method for r in rows if r.path.endswith("/unfused")}
    if not slow:
        return "Steps and attention are Triton kernels."
    if slow == {r.method for r in rows if r.path and r.method != "transformers"}:
        return "Attention is the PyTorch reference, no kernel: quantized caches are unpacked at every step."
    named = ", ".join(sorted(slow))
    return f"Steps and attention are Triton kernels, but PyTorch (not to be ranked by speed) for {named}."


def _speedup(row: SpeedRow | None) -> str:
    if row is None:
        return "-"
    if row.speedup is None:
        return "FAILED"
    half = (row.speedup.high - row.speedup.low) / 2
    return f"{row.speedup.mean:.2f} ± {half:.2f}"


def _samples(task: str, rows: Sequence[SampleRow], answers: Sequence[Answer], run: Run) -> Table:
    lengths = run.facts["settings"]["length"]
    span = "–".join(str(n) for n in sorted({min(lengths), max(lengths)}))
    title = f"{task} · {rows[0].n} samples of {span} tokens · {setting(run)}, batch {answers[0].width}"
    drawn = [_sample_cells(row) for row in rows]
    columns = ["method", "score", "95 %", f"as {run.baseline}", "MiB", "of full", "prefill tok/s", "decode tok/s"]
    note = (
        f"MiB is what the cache of one sample holds after its prompt ({run.facts['settings']['compress']} compressed), "
        "all layers; 95 % is the interval of the mean score; as full counts answers with the very tokens of full's."
    )
    if _served(run):
        columns, drawn = columns[:4], [row[:4] for row in drawn]
        note = "95 %: interval of the mean score; as baseline: answers that are the baseline's to the letter."
    controls = [(row.method, row.pairs, row.same) for row in rows if run.is_control(row.method)]
    failures = [(row.method, row.error) for row in rows if row.failed]
    return Table(title, columns, drawn, [note, *_floor(run, controls), *_errors(failures)])


def _sample_cells(row: SampleRow) -> list[str]:
    name = row.method + (f" ({row.failed} FAILED)" if row.failed else "")
    if row.score is None or row.nbytes is None:
        return [name, *["-"] * 7]
    speeds = ["-" if x is None else f"{x:,.0f}" for x in (row.prefill, row.decode)]
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    same = f"{row.same}/{row.pairs}"
    return [name, f"{row.score.mean:.2f}", _span(row.score), same, f"{row.nbytes / 2**20:.1f}", ratio, *speeds]


def _length(task: str, rows: Sequence[LengthRow], answers: Sequence[Answer], run: Run) -> Table:
    where = run.facts["settings"]
    how = f"temperature {where['temperature']:g}" if where["temperature"] else "greedy"
    title = f"{task} · {rows[0].n} prompts, at most {max(a.cap for a in answers)} tokens, {how} · {setting(run)}"
    drawn = [_length_cells(row) for row in rows]
    notes = [
        f"Cost is the tokens of all answers against {run.baseline}'s to the same prompts, one cap for both; its "
        "interval resamples prompts. An answer at its cap counts as that long: more cap may show more effect.",
        "1.5× and 2/3 count answers at least that much longer, at most that short: with no effect, as many of both.",
        *_floor(run, [(_arm(row), row.pairs, row.same) for row in rows if run.is_control(row.method)]),
    ]
    if not _served(run):
        notes.append("Of full is bytes held at the end against uncompressed K and V: 1.00: the method hardly acted.")
    other = [row for row in rows if row.repeat]
    if other:
        notes.append("full, other seed is the noise of sampling itself: what stays inside it is not an effect.")
    columns = ["method", "cost", "95 %", "tokens", "at cap", "1.5×", "2/3", f"as {run.baseline}", "of full"]
    if _served(run):
        columns, drawn = columns[:-1], [row[:-1] for row in drawn]
    return Table(title, columns, drawn, notes + _errors([(_arm(row), row.error) for row in rows if row.failed]))


def _arm(row: LengthRow) -> str:
    return f"{row.method}, other seed" if row.repeat else row.method


def _length_cells(row: LengthRow) -> list[str]:
    name = _arm(row) + (f" ({row.failed} FAILED)" if row.failed else "")
    if row.cost is None or row.tokens is None:
        return [name, *["-"] * 8]
    counts = [f"{row.capped}/{row.pairs}", str(row.longer), str(row.shorter), f"{row.same}/{row.pairs}"]
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    return [name, f"{row.cost.mean:.2f}", _span(row.cost), f"{row.tokens:.0f}", *counts, ratio]


def _promises(rows: Sequence[SpeedRow], agreements: Sequence[Agreement]) -> Table:
    drawn = []
    for row in rows:
        if row.speedup is None or row.seconds is None:
            drawn.append([f"{row.phase}: {row.method}", "FAILED"])
        elif row.phase == "width":
            gain = f"{row.speedup.mean * row.width:.1f} × the tok/s of width 1"
            drawn.append([f"decoding at width {row.width}, {row.length} tokens", gain])
        else:
            drawn.append(
                [f"prefill of {row.length} tokens for {row.method}", f"{1 / row.speedup.mean:.2f} × the prefill alone"]
            )
    for a in agreements:
        drawn.append([f"{a.task}: {a.method} and {a.other}", f"same tokens on {a.same} of {a.n} samples"])
    return Table("the core's promises", ["what", "measured"], drawn)


def _served(run: Run) -> bool:
    return "servers" in run.facts


def _floor(run: Run, controls: Sequence[tuple[str, int, int]]) -> list[str]:
    said, noise = [], "Another order of requests" if _served(run) else "Noise of rounding size"
    for name, pairs, same in controls:
        if pairs and same == pairs:
            said.append(f"{name}: all {pairs} answers identical to {run.baseline}'s, so no floor was measured.")
        elif pairs:
            said.append(f"{noise} ({name}) changed {pairs - same} of {pairs} answers.")
    return said


def _errors(failures: Sequence[tuple[str, str]]) -> list[str]:
    return [f"FAILED {name}: {error}" for name, error in failures]


def _span(interval: Interval) -> str:
    return f"{interval.low:.2f}–{interval.high:.2f}"


__all__ = ["provenance", "setting", "tables"]
