"""What every predictor, and the router, is worth on some runs, as records: what ``pytest -m tools`` reports."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from kvsuite import records
from kvsuite.errors import UsageError
from kvsuite.predict import laws, scores
from kvsuite.predict.cells import Cell, read
from kvsuite.predict.length import Lengths
from kvsuite.predict.length_scores import told
from kvsuite.predict.prompts import Embed, prompts_of
from kvsuite.predict.router import Chats, Outcome, Setup, outcomes
from kvsuite.predict.types import held_out, typed
from kvsuite.readers.run import by_task
from kvsuite.records import Predicted, Run
from kvsuite.workloads import Arrivals

LEFT_OUT = ("batch", "length", "model")
PLAIN, MIXED, ROUTED = "plain, least loaded", "mixed, least loaded", "by both"
"""Policies of the router."""
BUSY = 0.6
"""Share of what four plain servers can do at `TOGETHER` sequences each that arrives."""
TOGETHER = 8
REQUESTS, SEEDS = 500, 10


def timed(folders: Sequence[Path]) -> list[Cell]:
    """The timed cells of all runs that have any. Raises UsageError where none has."""
    found, last = list[Cell](), UsageError("no run is named")
    for folder in folders:
        try:
            found += read(folder)
        except UsageError as error:
            last = error
    if not found:
        raise last
    return found


def chats(folders: Sequence[Path]) -> Run:
    """The first run with answers to chats. Raises UsageError where none has."""
    for folder in folders:
        run = records.told(folder)
        if by_task(run, "length"):
            return run
    raise UsageError(f"no answers to chats in {', '.join(map(str, folders))}")


def throughput(cells: Sequence[Cell]) -> list[Predicted]:
    """The errors of predicted tokens per second, each batch, length and model left out in turn."""
    found = []
    for by in LEFT_OUT:
        guesses, _ = scores.left_out(cells, by)
        found += [
            Predicted(
                s.method, tool="throughput", what=f"{s.stage}, each {by} left out", measure="mean error", unit="%",
                n=s.n, value=100 * s.mape, better=s.beats_null,
                nulls={"blind": 100 * s.null_mape, "nearest": 100 * s.nearest_mape, "mean": 100 * s.mean_mape},
            )
            for s in scores.scores(guesses, by)
        ]  # fmt: skip
    if not found:
        raise UsageError("one batch, length or model alone was timed, so none can be left out")
    return found


def length(run: Run, embed: Embed) -> list[Predicted]:
    """The loss and the concordance of predicted lengths, prompts left out."""
    lengths = Lengths.of(run)
    x, found = prompts_of(lengths.entries, embed), []
    rows = told(lengths, x)
    for what in dict.fromkeys(row.what for row in rows):
        same = {row.predictor: row for row in rows if row.what == what}
        learned = same.pop("learned")
        for measure in ("loss", "concordance"):
            value, low, high = getattr(learned, measure)
            if value == value:  # no pair of known order has none
                nulls = {name: figure for name, row in same.items() if (figure := getattr(row, measure)[0]) == figure}
                better = all(row.better for row in same.values() if row.better is not None)
                found.append(
                    Predicted(
                        "learned", tool="length", what=f"{what}, prompts left out", measure=measure, n=learned.n,
                        value=value, low=low, high=high, nulls=nulls, better=better if measure == "loss" else None,
                    )
                )  # fmt: skip
    return found


def task_types(run: Run, embed: Embed) -> list[Predicted]:
    """How often the type of a task is told right. Raises UsageError where all prompts are of one type."""
    known = typed(run)
    if len({k.type for k in known}) < 2:
        raise UsageError(f"all prompts of {run.folder} are of one type")
    a = held_out(prompts_of(known, embed), known)
    learned = a.learned
    return [
        Predicted(
            "learned", tool="type of task", what="prompts left out", measure="right", unit="%", n=a.n,
            value=100 * learned.mean, low=100 * learned.low, high=100 * learned.high,
            nulls={"most frequent type": 100 * a.null.mean}, better=a.gain.low > 0,
        )
    ]  # fmt: skip


def router(cells: Sequence[Cell], run: Run) -> list[Predicted]:
    """Mean seconds end to end of routed requests over four plain servers', simulated with the times of ``cells`` and
    the lengths of ``run``'s chats, for every method that has both. ``by both, blind`` is told no lengths; the oracle
    knows the true ones."""
    plain, *others = laws.fitted(cells).values()
    found = []
    for other in others:
        try:
            texts = Chats.of(run, [plain.method, other.method])
        except UsageError:
            continue
        tokens = statistics.mean(texts.lengths[plain.method])
        rate = TOGETHER / plain.step_seconds(TOGETHER, TOGETHER * 512) / tokens
        setup = Setup((plain, other), texts, Arrivals.parse(f"poisson:{BUSY * 4 * rate:.3g}"), requests=REQUESTS)
        rows = {row.policy.name: row for row in outcomes(setup, SEEDS)}
        found.append(_routed(other.method, rows, setup))
    if not found:
        raise UsageError("no method has both timed cells and answers to chats")
    return found


def _routed(method: str, rows: dict[str, Outcome], setup: Setup) -> Predicted:
    over = {name: row.ratio(rows[PLAIN]) for name, row in rows.items()}
    mine, fleet = over.pop(ROUTED), rows[ROUTED].ratio(rows[MIXED])
    shown = (MIXED, "by throughput", "by both, blind", "oracle")
    return Predicted(
        method, tool="router", what=f"1 + 3 servers, {setup.arrivals}", unit="×", n=SEEDS,
        measure="mean seconds over four plain servers'", value=mine.mean, low=mine.low, high=mine.high,
        nulls={name: over[name].mean for name in shown}, better=fleet.high < 1,
    )  # fmt: skip
