"""What every report shows of a run, as plain tables: the report plugins only draw them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from kvsuite.analysis.latency import BreakEven
from kvsuite.analysis.length import LengthRow, length_rows
from kvsuite.analysis.runs import dtypes
from kvsuite.analysis.samples import SampleRow, sample_rows
from kvsuite.analysis.shortfall import Share, Who, interrupted, shares, timed
from kvsuite.analysis.speed import OURS, REFERENCE, SpeedRow, break_evens, speed_rows
from kvsuite.analysis.stats import Interval
from kvsuite.readers.run import answers as task_answers
from kvsuite.records import Agreement, Answer, Record, Run, Timing
from kvsuite.report import servers
from kvsuite.report.table import Table, span
from kvsuite.report.verdicts import verdicts


def tables(run: Run) -> list[Table]:
    """All tables of a run: what is missing first, then the verdicts."""
    found = [*shortfall(run), *servers.headlines(run), *verdicts(run), *servers.speed(run), *servers.served(run)]
    timings = [r for r in run.records if isinstance(r, Timing)]
    for phase in ("decode", "prefill"):
        cells = speed_rows([t for t in timings if t.phase == phase])
        if cells:
            found.append(_speed(phase, cells, run))
    promises = speed_rows([t for t in timings if t.phase not in ("decode", "prefill")])
    answers, arms = list(task_answers(run)), shares(run)
    for task in dict.fromkeys(a.task for a in answers):
        mine = [a for a in answers if a.task == task]
        draw = _length if mine[0].evaluation == "length" else _samples
        found.append(draw(task, mine, arms[task], run))
    agreements = [r for r in run.records if isinstance(r, Agreement)]
    if promises or agreements:
        found.append(_promises(promises, agreements))
    return found


def shortfall(run: Run) -> list[Table]:
    """What was to be measured and is not there; nothing for a run that has all, or does not say what it was to have."""
    counts = []
    for task, arms in shares(run).items():
        there, asked = sum(s.ok + s.failed for s in arms.values()), sum(s.asked for s in arms.values())
        counts += [f"{task}: {there:,} of {asked:,} answers"] if there < asked else []
    done, asked = timed(run)
    counts += [f"speed: {done} of {asked} timed cells"] if done < asked else []
    if interrupted(run):
        title = "partial: this run was interrupted"
    elif counts:
        title = "partial: this run ended before all was measured"
    else:
        return []
    return [Table(title, [], [], [f"partial · {' · '.join(counts)}."] if counts else [])]


def formats(run: Run) -> str:
    """The number formats of computing and of K and V, where they are not the same."""
    compute, kv = dtypes(run)
    return str(compute) if compute == kv else f"{compute} compute, {kv} K/V"


def setting(run: Run) -> str:
    """Model, number formats, threads: what every figure depends on."""
    where = run.facts["environment"]
    if _served(run):
        return f"{run.facts['model']['name']}, served"
    device = where["gpu"] or f"{where['threads']} threads"
    return f"{run.facts['model']['name']}, {formats(run)}, {device}"


FRAGMENTED = 0.05
"""Empty slots that are worth a column."""


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
    done, asked = timed(run)
    absent = "missing" if done < asked else "-"
    drawn.append(
        ["full, tok/s", *[absent if r is None else _speed_cell(r, f"{r.rate:,.0f}" if r.rate else "") for r in full]]
    )
    for method in dict.fromkeys([*(r.method for r in rows), *(run.facts["methods"] if done < asked else [])]):
        mine = [by.get((method, *cell)) for cell in cells]
        drawn.append([f"{method}, ×", *[absent if r is None else _speed_cell(r, _speedup(r)) for r in mine]])
    notes = missing(run)
    if rounds := max(r.rounds for r in rows):
        notes.append(
            f"Speed as a multiple of full's, which ran in turn with it ({rounds} pairs of rounds); ± is the 95 % "
            "t-interval. The row of full against itself is the noise of this machine."
        )
    if any(r.speedup is None and not r.failed for r in rows):
        notes.append("not measured: fewer than two pairs of rounds ran (--benchmark-disable, --kv-rounds).")
    if phase == "prefill":
        notes.append(
            "A prefill with what the method observes, and its compression. One prefill serves all methods of a run."
        )
    else:
        notes += _by_what(rows, run.facts["environment"]["gpu"])
        notes += _break_evens([r for r in run.records if isinstance(r, Timing) and not run.is_control(r.method)])
    notes += _dtypes(run)
    if any(r.method == "transformers" for r in rows):
        notes.append(
            "transformers is its own DynamicCache under SDPA, the same sequences: a row beside, not the baseline."
        )
    notes += _errors([(f"{r.method} b{r.width} l{r.length}", r.error) for r in rows if r.failed])
    return Table(f"{phase} · {setting(run)}", ["batch · length", *[f"{w} · {n}" for w, n in cells]], drawn, notes)


def missing(run: Run) -> list[str]:
    """How many timed cells are not there."""
    done, asked = timed(run)
    return [f"MISSING: {asked - done} of the {asked} cells that this run was to time."] if done < asked else []


def _by_what(rows: Sequence[SpeedRow], gpu: str | None) -> list[str]:
    """What stored and attended, where the records say it; a method without a kernel is not to be ranked by its
    speed."""
    paths = {r.method: r.path for r in rows if r.path and r.method != "transformers"}
    slow = sorted(method for method, path in paths.items() if path.endswith(REFERENCE))
    if not paths:
        return []
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.method in slow and row.refusal and row.method not in reasons.setdefault(row.refusal, []):
            reasons[row.refusal].append(row.method)
    names = {why: "all methods" if len(who) == len(paths) else ", ".join(who) for why, who in reasons.items()}
    because = [f"{who} on {'gpu' if gpu else 'cpu'}: reference, because {why}." for why, who in names.items()]
    but = f", but PyTorch (not to be ranked by speed) for {', '.join(slow)}" if slow else ""
    backends = {path.rpartition("/")[2] for path in paths.values()}
    if len(slow) == len(paths):
        said = "Attention is the PyTorch reference, no kernel: quantized caches are unpacked at every step."
    elif "cpu" in backends:
        said = f"Steps and attention are C++, compiled for this CPU{but}."
    elif gpu is None:
        said = "There is no GPU: an interpreter ran the kernels that the records name, so these are no speeds."
    else:
        said = f"Steps and attention are Triton kernels{but}."
    return [said, *because]


def _break_evens(timings: Sequence[Timing]) -> list[str]:
    """From which context on a method's step is the faster one, width by width."""
    notes = []
    for width in sorted({t.width for t in timings}):
        found = {method: _break_even(x) for (method, own), x in break_evens(timings).items() if own == width}
        said = "; ".join(f"{method} {words}" for method, words in found.items() if method != "transformers")
        if said:
            notes.append(f"A step is faster than full's, by the line through the lengths, at batch {width}: {said}.")
    return notes


def _break_even(found: BreakEven) -> str:
    if found.length is None:
        return {"everywhere": "at every length", "nowhere": "at no length"}[found.faster]
    bounds = [f"{low:,.0f} to {'∞' if high == math.inf else f'{high:,.0f}'}" for low, high in found.pieces]
    where = f"{found.length:,.0f} tokens ({' or '.join(bounds)})"
    return f"from {where} on" if found.faster == "longer" else f"up to {where}"


def _dtypes(run: Run) -> list[str]:
    compute, kv = dtypes(run)
    if compute == kv:
        return []
    reason = run.facts["environment"].get("dtype_reason")
    return [f"Computed in {compute}; K and V are stored in {kv}{f': {reason}' if reason else ''}."]


NOT_MEASURED = "not measured"


def _speed_cell(row: SpeedRow, figure: str) -> str:
    if row.failed:
        return "FAILED"
    return NOT_MEASURED if row.speedup is None else figure


def _speedup(row: SpeedRow) -> str:
    if row.speedup is None:
        return ""
    half = (row.speedup.high - row.speedup.low) / 2
    return f"{row.speedup.mean:.2f} ± {half:.2f}"


def _counted(what: str, shares: Mapping[Who, Share]) -> str:
    """How many samples a task has, and with how many its arms were left."""
    asked, ok = max(s.asked for s in shares.values()), [s.ok for s in shares.values()]
    if min(ok) == asked:
        return f"{asked} {what}"
    return f"partial: {span(ok)} of {asked} {what}"


def _named(arm: str, share: Share) -> str:
    """An arm, and how many of its answers are there if not all are."""
    counts = [f"{share.ok} of {share.asked}"] if share.ok + share.failed < share.asked else []
    counts += [f"{share.failed} FAILED"] if share.failed else []
    return f"{arm} ({', '.join(counts)})" if counts else arm


def _lost(shares: Mapping[Who, Share]) -> list[str]:
    if all(s.ok == s.asked for s in shares.values()):
        return []
    return ["partial: arms with fewer answers have figures of these alone, which may be the short or the easy ones."]


def _samples(task: str, answers: Sequence[Answer], shares: Mapping[Who, Share], run: Run) -> Table:
    rows = sample_rows(answers, run.baseline)
    lengths = [a.prompt_tokens for a in answers if a.prompt_tokens] or run.facts["settings"]["length"]
    title = (
        f"{task} · {_counted('samples', shares)} of {span(lengths)} tokens · {setting(run)}, batch {answers[0].width}"
    )
    there = {row.method for row in rows}
    rows += [SampleRow(method, 0, 0, "") for method, _ in shares if method not in there]
    tells = any((row.read or 1) < 0.99 or row.fragmentation >= FRAGMENTED for row in rows)
    drawn = [_sample_cells(row, shares[row.method, 0], tells) for row in rows]
    columns = ["method", "score", "95 %", f"as {run.baseline}", "MiB", "of full"]
    columns += [*["read", "empty"][: 2 * tells], "prefill tok/s", "decode tok/s"]
    note = (
        f"MiB is what the cache of one sample holds after its prompt ({run.facts['settings']['compress']} compressed), "
        "all layers; 95 % is the interval of the mean score; as full counts answers with the very tokens of full's."
    )
    if tells:
        note += (
            " Read: the part of the bytes held that the last step read; empty: the slots in use at the end that held "
            "no token."
        )
    if _served(run):
        columns, drawn = columns[:4], [row[:4] for row in drawn]
        note = "95 %: interval of the mean score; as baseline: answers that are the baseline's to the letter."
    controls = [(row.method, row.pairs, row.same) for row in rows if run.is_control(row.method)]
    failures = [(row.method, row.error) for row in rows if row.failed]
    notes = [*_lost(shares), note, *_floor(run, controls), *_dtypes(run)]
    return Table(title, columns, drawn, notes + _errors(failures))


def _sample_cells(row: SampleRow, share: Share, tells: bool) -> list[str]:
    """``tells``: with what was read and what was empty."""
    name = _named(row.method, share)
    if row.score is None or row.nbytes is None:
        return [name, *["-"] * (7 + 2 * tells)]
    speeds = ["-" if x is None else f"{x:,.0f}" for x in (row.prefill, row.decode)]
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    held = [f"{row.nbytes / 2**20:.1f}", ratio]
    if tells:
        held += ["-" if row.read is None else f"{row.read:.2f}", f"{row.fragmentation:.0%}"]
    return [name, f"{row.score.mean:.2f}", _span(row.score), f"{row.same}/{row.pairs}", *held, *speeds]


def _length(task: str, answers: Sequence[Answer], shares: Mapping[Who, Share], run: Run) -> Table:
    rows, where = length_rows(answers, run.baseline), run.facts["settings"]
    how = f"temperature {where['temperature']:g}" if where["temperature"] else "greedy"
    cap = max(a.cap for a in answers)
    title = f"{task} · {_counted('prompts', shares)}, at most {cap} tokens, {how} · {setting(run)}"
    there = {(row.method, row.repeat) for row in rows}
    rows += [LengthRow(*who, 0, 0, "") for who in shares if who not in there]
    drawn = [_length_cells(row, shares[row.method, row.repeat]) for row in rows]
    notes = [
        *_lost(shares),
        f"Cost is the tokens of all answers against {run.baseline}'s to the same prompts, one cap for both; its "
        "interval resamples prompts. An answer at its cap counts as that long: more cap may show more effect.",
        "1.5× and 2/3 count answers at least that much longer, at most that short: with no effect, as many of both.",
        *_floor(run, [(_arm(row), row.pairs, row.same) for row in rows if run.is_control(row.method)]),
    ]
    if not _served(run):
        notes.append(
            f"Of {run.baseline} is bytes held at the end for each token, against {run.baseline}'s: near 1.00 the "
            "method hardly acted."
        )
        notes += _dtypes(run)
    other = [row for row in rows if row.repeat]
    if other:
        notes.append("full, other seed is the noise of sampling itself: what stays inside it is not an effect.")
    columns = ["method", "cost", "95 %", "tokens", "at cap", "1.5×", "2/3", f"as {run.baseline}", "of full"]
    if _served(run):
        columns, drawn = columns[:-1], [row[:-1] for row in drawn]
    return Table(title, columns, drawn, notes + _errors([(_arm(row), row.error) for row in rows if row.failed]))


def _arm(row: LengthRow) -> str:
    return f"{row.method}, other seed" if row.repeat else row.method


def _length_cells(row: LengthRow, share: Share) -> list[str]:
    name = _named(_arm(row), share)
    if row.cost is None or row.tokens is None:
        return [name, *["-"] * 8]
    counts = [f"{row.capped}/{row.pairs}", str(row.longer), str(row.shorter), f"{row.same}/{row.pairs}"]
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    return [name, f"{row.cost.mean:.2f}", _span(row.cost), f"{row.tokens:.0f}", *counts, ratio]


def _promises(rows: Sequence[SpeedRow], agreements: Sequence[Agreement]) -> Table:
    drawn = []
    for row in rows:
        if row.speedup is None or row.seconds is None:
            drawn.append([f"{row.phase}: {row.method}", "FAILED" if row.failed else NOT_MEASURED])
        elif row.phase == "width":
            gain = f"{row.speedup.mean * row.width:.1f} × the tok/s of width 1"
            drawn.append([f"decoding at width {row.width}, {row.length} tokens", gain])
        else:
            drawn.append(
                [f"prefill of {row.length} tokens for {row.method}", f"{1 / row.speedup.mean:.2f} × the prefill alone"]
            )
    for a in agreements:
        same = f"same tokens on {a.same} of {a.n} samples"
        drawn.append([f"{a.task}: {a.method} and {a.other}", "FAILED" if a.status == "failed" or not a.n else same])
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


__all__ = ["formats", "missing", "provenance", "setting", "shortfall", "tables"]
