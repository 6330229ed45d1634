"""From a run to what is compared in it: which arm is the baseline, and which its noise."""

from __future__ import annotations

import math
from dataclasses import replace

from kvsuite.analysis.effects import Part
from kvsuite.analysis.serving import checks, served_rows, token_speeds
from kvsuite.analysis.speed import speed_rows
from kvsuite.analysis.stats import log_change
from kvsuite.analysis.verdict import Effect, effect
from kvsuite.columns import Arm, Key, align, stack
from kvsuite.margins import Margins
from kvsuite.readers.run import answers, arms
from kvsuite.records import Run, Timing

FULL = "full"
"""What methods in this process are timed against."""
OTHER_SEED = "other seed"


def parts(run: Run) -> list[Part]:
    """The run's methods against ``full``: scored tasks, and chats. What is broken is left out."""
    found = [part for known in _arms(run) for part in _parts(run, known, controls=False)]
    left_out = broken(run)
    kept = [replace(p, methods={m: a for m, a in p.methods.items() if m not in left_out}) for p in found]
    return [part for part in kept if part.methods]


def broken(run: Run) -> set[str]:
    """Arms of servers whose answers are none: these have no verdict and no rank."""
    return {method for method, check in checks(run).items() if check.broken}


def noise(run: Run) -> list[Part]:
    """The run's controls against ``full`` as if they were methods: what no effect looks like here."""
    found = []
    for known in _arms(run):
        found += _parts(run, known, controls=True)
        base = known.get(run.baseline, [])
        if len(base) > 1 and (pair := _shared(base[:1], base[1:2], [])):
            found.append(Part(pair[0], {f"{run.baseline}, {OTHER_SEED}": pair[1]}))
    return found


def _arms(run: Run) -> list[dict[str, list[Arm]]]:
    """For scored tasks and for chats, the repeats of every method."""
    found = []
    for evaluation in ("samples", "length"):
        repeats: dict[str, list[Arm]] = {}
        for (method, _), arm in sorted(arms(run, evaluation).items(), key=lambda item: item[0][1]):
            repeats.setdefault(method, []).append(arm)
        if evaluation == "length" and run.sampled:  # a server's A/A arm has other seeds, too
            again = [repeats.pop(method) for method in list(repeats) if run.is_control(method)]
            repeats.get(run.baseline, []).extend(arm for arms in again for arm in arms)
        found.append(repeats)
    return found


def _parts(run: Run, known: dict[str, list[Arm]], controls: bool) -> list[Part]:
    """Methods that answered the same samples share a part. With several seeds of the baseline, sampling is the noise
    and the next seed the control; with one, rounding is, and one control is the floor of another."""
    base = known.get(run.baseline, [])
    sampled = len(base) > 1
    noises = [method for method in known if run.is_control(method)]
    shared: dict[tuple[str, tuple[Key, ...]], tuple[Arm, dict[str, Arm], Arm | None]] = {}
    for method, repeats in known.items():
        if method == run.baseline or run.is_control(method) != controls or not base:
            continue
        floor = run.baseline if sampled else next((other for other in noises if other != method), "")
        control = base[1:] + base[:1] if sampled else known.get(floor, [])
        count = min(len(repeats), len(base), len(control) or 1)
        if trio := _shared(base[:count], repeats[:count], control[:count]):
            mine, arm, noise = trio
            shared.setdefault((floor, tuple(mine.keys)), (mine, {}, noise))[1][method] = arm
    return [Part(mine, methods, floor, coupled=sampled) for mine, methods, floor in shared.values()]


def _shared(base: list[Arm], method: list[Arm], control: list[Arm]) -> tuple[Arm, Arm, Arm | None] | None:
    """Repeats of three arms, on the samples that all of them answered; without the control where it answered none of
    them, and None where the others share none."""
    mine, arm, *floor = (stack(x) for x in (base, method, control) if x)
    shared = set(mine.keys) & set(arm.keys)
    if not shared:
        return None
    if floor and shared.isdisjoint(floor[0].keys):
        floor = []
    (mine, arm, *floor), _ = align([mine, arm, *floor], allow_missing=True)
    return mine, arm, floor[0] if floor else None


def changes(one: Run, other: Run) -> list[Part]:
    """Every method of two runs: the one's answers as the baseline of the other's. The floor of ``full`` is the one's
    own control; a method has none."""
    found, left_out = [], broken(one) | broken(other)
    for before, after in zip(_arms(one), _arms(other), strict=True):
        base = before.get(one.baseline, [])
        sampled = len(base) > 1
        noise = next((before[method] for method in before if one.is_control(method)), [])
        for method in (m for m in before if m in after and m not in left_out):
            control = [] if method != one.baseline else base[1:] + base[:1] if sampled else noise
            count = min(len(before[method]), len(after[method]), len(control) or 1)
            if trio := _shared(before[method][:count], after[method][:count], control[:count]):
                mine, arm, floor = trio
                found.append(Part(mine, {method: arm}, floor, coupled=sampled))
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
    """How many answers of every method failed: these are in no figure."""
    found: dict[str, list[bool]] = {}
    for a in answers(run):
        found.setdefault(a.method, []).append(a.status != "ok")
    return [f"FAILED {m}: {sum(x)} of {len(x)} answers, which are in no verdict." for m, x in found.items() if any(x)]


def _answered(run: Run) -> dict[str, set[tuple[str, str, int]]]:
    found: dict[str, set[tuple[str, str, int]]] = {}
    for a in answers(run):
        if a.status == "ok":
            found.setdefault(a.method, set()).add((a.task, a.sample, a.repeat))
    return found


def speeds(run: Run, margins: Margins) -> list[tuple[str, Effect]]:
    """Decode speed of every method at the widest, longest cell, as a multiple of ``full``'s; of servers, time
    per token in the last load (tokens per second would reward long answers). What ran without a kernel, and what is
    broken, is not judged by its speed."""
    served = served_rows(run)
    if served:
        left_out = {run.baseline} | broken(run)
        return [
            (row.method, effect("speed", row.ratios["tpot"], margins.speed, -1, row.blocks, None, ratio=True))
            for row in served
            if row.cell == served[-1].cell and "tpot" in row.ratios
            if row.method not in left_out and not run.is_control(row.method)
        ]
    rows = speed_rows(list(_timings(run).values()))
    cells = [(row.width, row.length) for row in rows if row.phase == "decode"]
    return [
        (row.method, effect("speed", row.speedup, margins.speed, -1, row.rounds, None, ratio=True))
        for row in rows
        if row.phase == "decode" and (row.width, row.length) == max(cells) and row.speedup is not None
        if row.method not in (FULL, "transformers") and row.path and not row.path.endswith("/unfused")
    ]


def speed_changes(one: Run, other: Run, margins: Margins) -> list[tuple[str, Effect]]:
    """Every timed cell of two runs and how its speed changed: a method's as a multiple of its baseline's, the baseline
    itself where the machine is the same. Welch's t on the logarithms of rounds, of servers those of blocks: two runs
    are two sessions."""
    before, after = _rounds(one), _rounds(other)
    machine = ("cpu", "gpu", "cores", "threads", "dtype")
    same = all(one.facts["environment"].get(key) == other.facts["environment"].get(key) for key in machine)
    left_out = broken(one) | broken(other) | (set() if same else {one.baseline})
    found = []
    for (method, cell), rounds in before.items():
        logs = [rounds, after.get((method, cell), [])]
        if method in left_out or min(map(len, logs)) < 2:
            continue
        change, _ = log_change(*logs)
        found.append((f"{method}, {cell}", effect("speed", change, margins.speed, -1, len(logs[1]), None, ratio=True)))
    return found


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
    return [math.log(b / s) for s, b in zip(timing.seconds, timing.baseline_seconds, strict=True)]
