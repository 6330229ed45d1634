"""From a run to what is compared in it: which arm is the baseline, and which its noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from kvsuite.analysis.answered import Answered, apart, shared
from kvsuite.analysis.effects import Part
from kvsuite.analysis.forced import acted
from kvsuite.analysis.length import halves, named
from kvsuite.analysis.serving import blocks, served_rows, token_speeds
from kvsuite.analysis.shortfall import expected, interrupted, timed
from kvsuite.analysis.speed import REFERENCE, log_speeds, speed_rows
from kvsuite.analysis.stats import Estimate
from kvsuite.analysis.table import State
from kvsuite.analysis.trimmed import log_change
from kvsuite.analysis.validity import left_out, unranked
from kvsuite.analysis.verdict import Effect, Named, effect
from kvsuite.margins import Margins
from kvsuite.readers.run import answers, arms
from kvsuite.records import Run, Timing

FULL = "full"
"""What methods in this process are timed against."""


@dataclass(frozen=True)
class Known:
    """What a run holds of one evaluation."""

    repeats: dict[str, list[Answered]]
    """By method."""
    expected: int
    """Samples that every arm was to answer; 0 where that is not known."""


@lru_cache(maxsize=2)
def parts(run: Run) -> list[Part]:
    """The run's methods against ``full``: scored tasks, and chats, without arms whose answers are none, or to other
    prompts."""
    found = [part for known in _known(run) for part in _parts(run, known, controls=False)]
    lost, noisy = left_out(run), acted(run)
    kept = [replace(p, methods={m: a for m, a in p.methods.items() if m not in lost}, acted=noisy) for p in found]
    return [part for part in kept if part.methods]


@lru_cache(maxsize=2)
def noise(run: Run) -> list[Part]:
    """The run's controls against ``full`` as if they were methods: what no effect looks like here."""
    found = []
    for known in _known(run):
        found += _parts(run, known, controls=True)
        one, other = halves(known.repeats.get(run.baseline, []))
        if other:
            found += shared(named(run.baseline, True), one, other, [], known.expected, coupled=False)
    return found


@lru_cache(maxsize=2)
def _known(run: Run) -> list[Known]:
    """Scored tasks, and chats."""
    found = []
    for evaluation in ("samples", "length"):
        repeats: dict[str, list[Answered]] = {}
        good = arms(run, evaluation)
        for who, whole in sorted(arms(run, evaluation, failed=True).items(), key=lambda item: item[0][1]):
            repeats.setdefault(who[0], []).append(Answered(good.get(who) or whole.take([]), whole))
        if evaluation == "length" and run.sampled:  # a server's A/A arm has other seeds, too
            again = [repeats.pop(method) for method in list(repeats) if run.is_control(method)]
            repeats.get(run.baseline, []).extend(arm for arms in again for arm in arms)
        found.append(Known(repeats, sum(expected(run, evaluation).values())))
    return found


def _parts(run: Run, known: Known, controls: bool) -> list[Part]:
    """Methods that answered the same samples share a part: what one of them lacks, the others keep. With several seeds
    of the baseline, sampling is the noise, and the first that no method has in common is what all pairs are made with;
    with one, rounding is, and one control is the floor of another – of several the one that answered most."""
    base = known.repeats.get(run.baseline, [])
    sampled = len(base) > 1
    noises = [method for method in known.repeats if run.is_control(method)]
    parts: dict[object, Part] = {}
    for method, repeats in known.repeats.items():
        if method == run.baseline or run.is_control(method) != controls or not base:
            continue
        others = [other for other in noises if other != method]
        floor = max(others, key=lambda other: sum(len(x.arm) for x in known.repeats[other]), default="")
        control = apart(base, repeats) if sampled else known.repeats.get(floor, [])
        for part in shared(method, base, repeats, control, known.expected, sampled):
            own = method if part.extremes else ""
            key = ("" if sampled else floor, tuple(part.base.keys), part.asked, part.floored, own)
            first = parts.setdefault(key, part)
            parts[key] = replace(first, methods={**first.methods, **part.methods})
    return list(parts.values())


def changes(one: Run, other: Run) -> list[Part]:
    """Every method of two runs: the one's answers as the baseline of the other's. The floor of ``full`` is the one's
    own control; a method has none."""
    found, gone = [], left_out(one) | left_out(other)
    for before, after in zip(_known(one), _known(other), strict=True):
        base = before.repeats.get(one.baseline, [])
        sampled, expected = len(base) > 1, max(before.expected, after.expected)
        noise = next((before.repeats[method] for method in before.repeats if one.is_control(method)), [])
        for method in (m for m in before.repeats if m in after.repeats and m not in gone):
            control = [] if method != one.baseline else apart(base, after.repeats[method]) if sampled else noise
            found += shared(method, before.repeats[method], after.repeats[method], control, expected, sampled)
    return found


def lost(one: Run, other: Run) -> list[str]:
    """What of the one's answers the other lacks, method by method: these are in no figure."""
    before, after = (_answered(run) for run in (one, other))
    said = []
    for method in before:
        gone = len(before[method] - after.get(method, set()))
        if method not in after:
            said.append(f"{method}: no answer in {other.folder}, {gone:,} in {one.folder}.")
        elif gone:
            said.append(
                f"{method}: {gone:,} of {len(before[method]):,} answers failed or are missing in {other.folder}."
            )
    return said


def failures(run: Run) -> list[str]:
    """How many answers of every method failed."""
    found: dict[str, list[bool]] = {}
    for a in answers(run):
        found.setdefault(a.method, []).append(a.status != "ok")
    return [
        f"FAILED {m}: {sum(x)} of {len(x)} answers: verdicts hold whatever they would have been."
        for m, x in found.items()
        if any(x)
    ]


def _answered(run: Run) -> dict[str, set[tuple[str, str, int]]]:
    found: dict[str, set[tuple[str, str, int]]] = {}
    for a in answers(run):
        if a.status == "ok":
            found.setdefault(a.method, set()).add((a.task, a.sample, a.repeat))
    return found


@dataclass(frozen=True)
class Fast:
    """What verdicts on speed rest on."""

    effects: list[Named]
    lost: list[tuple[str, State]]
    """Methods that were to be judged and have no figure."""
    where: str = ""
    """The cell, in words."""


def speeds(run: Run, margins: Margins) -> Fast:
    """Decode speed of every method at the widest, longest cell that was measured, as a multiple of ``full``'s; of
    servers, time per token in the last load (tokens per second would reward long answers). A control's speed is that of
    making noise. What ran without a kernel, and what cannot be believed (`validity`), is not judged by its speed."""
    served = served_rows(run)
    if served:
        hidden, last = {run.baseline, *left_out(run)}, served[-1].cell
        asked = max(len(blocks(run)[last]), run.facts.get("expected", {}).get("blocks", 0))
        judged = [row for row in served if row.cell == last and row.method not in hidden]
        judged = [row for row in judged if not run.is_control(row.method)]
        unknown = unranked(run)
        found = [
            (row.method, _speed(row.ratios["tpot"], margins, row.blocks, (row.blocks, asked), interrupted(run)))
            for row in judged
            if "tpot" in row.ratios and row.method not in unknown
        ]
        fell = {row.method for row in served if row.cell == last and row.failed}
        lost: list[tuple[str, State]] = []
        for row in judged:
            if "tpot" not in row.ratios:
                lost.append((row.method, "failed" if fell & {row.method, run.baseline} else "missing"))
            elif row.method in unknown:
                lost.append((row.method, "cannot tell"))
        return Fast(found, lost, last)
    rows = [row for row in speed_rows([r for r in run.records if isinstance(r, Timing)]) if row.phase == "decode"]
    rows = [row for row in rows if row.method != "transformers" and not run.is_control(row.method)]
    whole = [row for row in rows if row.speedup is not None]
    if not any(_is_kernel(row.path) for row in whole):
        return Fast([], [])
    width, length = at = max((row.width, row.length) for row in whole)
    here = {row.method: row for row in rows if (row.width, row.length) == at and row.method != FULL}
    done, asked = timed(run)
    unfinished = done < asked or interrupted(run)
    largest = (max(run.facts["settings"]["batch"]), max(run.facts["settings"]["length"])) if unfinished else at
    if at == largest:
        done = asked  # nothing that is missing could change these
    found = [
        (m, _speed(row.speedup, margins, row.rounds, (done, asked), at != largest))
        for m, row in here.items()
        if row.speedup is not None and _is_kernel(row.path)
    ]
    methods = [name for name in run.facts["methods"] if not run.is_control(name)]
    known = dict.fromkeys([*here, *(methods if unfinished else [])])
    lost = [(m, "missing") for m in known if m not in here and m != FULL]
    lost += [(m, "failed" if r.failed else "not measured") for m, r in here.items() if r.speedup is None]
    return Fast(found, lost, f"batch {width}, {length} tokens")


def _is_kernel(path: str) -> bool:
    return bool(path) and not path.endswith(REFERENCE)


def _speed(ratio: Estimate, margins: Margins, blocks: int, done: tuple[int, int], partial: bool) -> Effect:
    """``done``: of how many. *partial*, too, where it is not known how many there were to be."""
    found = effect("speed", ratio, margins.speed, -1, blocks, True, *done)
    return replace(found, verdict="partial") if partial else found


def speed_changes(one: Run, other: Run, margins: Margins) -> list[Named]:
    """Every timed cell of two runs and how its speed changed: a method's as a multiple of its baseline's, the baseline
    itself where one machine is known to have computed both. Welch's t on the logarithms of rounds, of servers those of
    blocks: two runs are two sessions."""
    before, after = _rounds(one), _rounds(other)
    hidden = unranked(one) | unranked(other) | ({one.baseline} if elsewhere(one, other) else set())
    found = []
    for (method, cell), rounds in before.items():
        logs = [rounds, after.get((method, cell), [])]
        if method in hidden or min(map(len, logs)) < 2:
            continue
        found.append(
            (f"{method}, {cell}", effect("speed", log_change(*logs), margins.speed, -1, len(logs[1]), ratio=True))
        )
    return found


def elsewhere(one: Run, other: Run) -> list[str]:
    """Why the seconds of two runs' baselines are not compared; nothing for runs that one machine computed alike."""
    machines = [_machine(run) for run in (one, other)]
    unknown = [str(run.folder) for run, machine in zip((one, other), machines, strict=True) if machine is None]
    if unknown:
        why = f"on what hardware {' and '.join(dict.fromkeys(unknown))} ran is not known"
    elif machines[0] != machines[1] or dtypes(one) != dtypes(other):
        why = "the two runs are of different hardware or number formats"
    else:
        return []
    return [f"The speed of {one.baseline} itself is not compared: {why}. Methods' ratios may differ for that, too."]


def _machine(run: Run) -> tuple[object, ...] | None:
    """What computed a run's answers; None where that is not known. Servers may run anywhere: what ``run.json`` says of
    hardware is then the client's."""
    where = run.facts["environment"]
    gpu = run.facts["settings"].get("device") == "cuda"
    known = tuple(where.get(key) for key in ("gpu", "cpu", "cores", "threads")[not gpu :])
    known += (where.get("tensor_parallel", 1),)
    return known if all(known) and "servers" not in run.facts else None


def dtypes(run: Run) -> tuple[str | None, str | None]:
    """The number formats of computing and of K and V; earlier runs had one for both, servers do not say."""
    where = run.facts["environment"]
    one = where.get("dtype")
    return where.get("compute_dtype", one), where.get("kv_dtype", one)


def _rounds(run: Run) -> dict[tuple[str, str], list[float]]:
    """By method and cell, the logarithms of its speeds."""
    found = {(t.method, f"{t.phase} {t.width} · {t.length}"): _logs(t) for t in _timings(run).values()}
    return found | {(method, cell): logs for (cell, method), logs in token_speeds(run).items()}


def _timings(run: Run) -> dict[tuple[str, str, int, int], Timing]:
    timed = (r for r in run.records if isinstance(r, Timing) and r.status == "ok" and r.phase in ("decode", "prefill"))
    return {(t.method, t.phase, t.width, t.length): t for t in timed}


def _logs(timing: Timing) -> list[float]:
    if timing.method == FULL:
        return [-math.log(s) for s in timing.seconds]
    return log_speeds(timing)
