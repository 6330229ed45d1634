"""What predictors say, and what they are worth, as tables and as figures for a program."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kvsuite.analysis.stats import Estimate
from kvsuite.analysis.table import Cell, Column, Note, Row, Table, infos
from kvsuite.predict.kernels import Left
from kvsuite.predict.length import LEVELS
from kvsuite.predict.length_scores import LengthScore
from kvsuite.predict.scores import Score
from kvsuite.predict.throughput import Answer
from kvsuite.predict.types import Accuracy

SCORED = (
    "Errors are of tokens per second, as parts of what was measured; n cells, none of which was learned from. Blind: "
    "the uncompressed figure of that batch and length, whatever the method (of the uncompressed cache itself, "
    "interpolated). Nearest: the method's own figure at the nearest cell that was learned from. Mean: of all of these. "
    "Within 90 %: the share of cells inside the interval of the answer. Better: whether the error is surely less than "
    "blind's, 95 %."
)
SHOWN = 4
"""Of the reasons why places were refused."""
TOLD = (
    "Each prompt was predicted by what was learned without it. Concordance: of two prompts of one fold under one "
    "method, whose order is known (the shorter answer is not capped), the share told in the right order (Harrell); 0.5 "
    "is chance. Loss: pinball, mean over the quantiles {levels}; of a change in log ratios, else in tokens. No change, "
    "and another answer, are one number for all quantiles, which costs them. Learned is better: whether its loss is "
    "surely less, 95 %, resampling prompts."
)


def throughput(rows: Sequence[Score], refused: Sequence[str]) -> Table:
    """By method and stage."""
    columns = [Column("n", "n"), Column("median", "median error", "%"), Column("mape", "mean error", "%")]
    columns += [
        Column("null_mape", "blind", "%"),
        Column("nearest_mape", "nearest", "%"),
        Column("mean_mape", "mean", "%"),
    ]
    columns += [Column("coverage", "within 90 %", "%"), Column("better", "better")]
    drawn = [
        Row(
            (row.left_out, row.stage, row.method),
            {
                "n": Cell(row.n),
                **{
                    name: Cell(100 * getattr(row, name))
                    for name in ("median", "mape", "null_mape", "nearest_mape", "mean_mape")
                },
                "coverage": Cell(100 * row.coverage),
                "better": Cell("yes" if row.beats_null else "no better than the null"),
            },
        )
        for row in rows
    ]
    notes = [*infos([SCORED, *dict.fromkeys(row.basis for row in rows if row.basis)])]
    notes += [Note(f"not predicted: {why}", "warning") for why in refused[:SHOWN]]
    notes += [Note(f"and {len(refused) - SHOWN} more reasons of this kind", "warning")] if len(refused) > SHOWN else []
    return Table(
        "predicted",
        "throughput · predictions of what was left out",
        ("left out", "stage", "method"),
        columns,
        drawn,
        notes,
    )


def score_json(row: Score) -> dict[str, Any]:
    """One row of `throughput`."""
    names = (
        "method",
        "stage",
        "left_out",
        "n",
        "mape",
        "null_mape",
        "beats_null",
        "nearest_mape",
        "mean_mape",
        "median",
        "coverage",
    )
    return {name: getattr(row, name) for name in names} | {"verdict": row.worth.verdict, "basis": row.basis}


def answers(method: str, rows: Sequence[Answer]) -> Table:
    """What was asked of one method."""
    columns = [
        Column("rate", "tok/s", "tok/s"),
        Column("rate", "90 %", "tok/s", "ends"),
        Column("seconds", "time", "ms"),
    ]
    columns.append(Column("seconds", "90 %", "ms", "ends"))
    drawn = [Row((a.stage, str(a.batch), f"{a.length:,}"), _answer(a)) for a in rows]
    notes = infos(list(dict.fromkeys(a.basis for a in rows if a.basis)))
    notes += infos(["Time: of a prefill, to the first token; of decoding, between two tokens of a sequence."])
    return Table("answers", f"{method} · predicted", ("stage", "batch", "length"), columns, drawn, notes)


def _answer(a: Answer) -> dict[str, Cell]:
    tokens = a.rate * a.seconds
    return {
        "rate": Cell(a.rate, tokens / a.high, tokens / a.low),
        "seconds": Cell(1000 * a.seconds, 1000 * a.low, 1000 * a.high),
    }


def answer_json(a: Answer) -> dict[str, Any]:
    """One row of `answers`."""
    names = ("stage", "batch", "length", "rate", "seconds", "low", "high", "basis")
    return {name: getattr(a, name) for name in names}


def lengths(rows: Sequence[LengthScore], types: Accuracy | None) -> list[Table]:
    """By what is predicted and by whom; then how often the type of a task was told right."""
    columns = [
        Column("n", "n"),
        Column("prompts", "prompts"),
        Column("concordance", "concordance"),
        Column("concordance", "95 %", "", "ends"),
    ]
    columns += [Column("loss", "loss"), Column("loss", "95 %", "", "ends"), Column("better", "learned is better")]
    drawn = [
        Row(
            (row.what, row.predictor),
            {
                "n": Cell(row.n), "prompts": Cell(row.prompts), "concordance": Cell(*row.concordance),
                "loss": Cell(*row.loss), "better": Cell("" if row.better is None else "yes" if row.better else "no"),
            },
        )
        for row in rows
    ]  # fmt: skip
    said = infos([TOLD.format(levels=", ".join(f"{q:g}" for q in LEVELS))])
    found = [Table("lengths", "length · predictions for prompts left out", ("of", "predictor"), columns, drawn, said)]
    if types:
        cells = {
            "n": Cell(types.n),
            "right": _share(types.learned),
            "null": _share(types.null),
            "gain": _share(types.gain),
        }
        columns = [Column("n", "n")]
        for key, name in (("right", "right"), ("null", "most frequent type"), ("gain", "more")):
            columns += [Column(key, name, "%"), Column(key, "95 %", "%", "ends")]
        found.append(
            Table("types", "type of task · told from prompts left out", ("",), columns, [Row(("type",), cells)])
        )
    return found


def told_json(row: LengthScore) -> dict[str, Any]:
    """One row of `lengths`."""
    found: dict[str, Any] = {n: getattr(row, n) for n in ("what", "predictor", "n", "prompts")}
    for name in ("concordance", "loss"):
        figures = [None if math.isnan(x) else x for x in getattr(row, name)]
        found |= dict(zip((name, f"{name}_low", f"{name}_high"), figures, strict=True))
    return found | {"learned_is_better": row.better}


def _share(found: Estimate) -> Cell:
    return Cell(100 * found.mean, 100 * found.low, 100 * found.high)


def types_json(found: Accuracy) -> dict[str, Any]:
    """The classifier's accuracy."""
    parts = {name: getattr(found, name) for name in ("learned", "null", "gain")}
    figures = {name: {"mean": e.mean, "low": e.low, "high": e.high} for name, e in parts.items()}
    return {"n": found.n, "groups": found.groups, **figures}


def asked(cap: int, rows: Sequence[dict[str, Any]]) -> Table:
    """What a length predictor says of one prompt, by method; a quantile at the cap is that or more."""
    columns = [Column(f"{q:g}", f"{100 * q:g} %", "tokens") for q in LEVELS] + [
        Column("change", "change"),
        Column("change", "90 %", "×", "ends"),
    ]
    drawn = []
    for row in rows:
        cells: dict[str, Cell] = {q: Cell(value) for q, value in row["length"].items()}
        if row["change"]:
            low, middle, high = (row["change"][f"{q:g}"] for q in (LEVELS[0], 0.5, LEVELS[-1]))
            cells["change"] = Cell(middle, low, high, unit="×")
        drawn.append(Row((row["method"],), cells))
    said = [f"Quantiles of the answer's tokens; {cap}, the cap, means that or more. Change: of the baseline's length."]
    said += [f"Type of task: {rows[0]['type']}."] if rows and rows[0]["type"] else []
    return Table("asked", "length · predicted", ("method",), columns, drawn, infos(said))


KERNELS = (
    "The speed of fp8 attention in a decode step over bf16's, on a GPU that was left out; medians of "
    "|predicted / measured - 1|. Known of it are its bf16 times. Bytes: half the bytes, twice the speed. Nearest: the "
    "figure in the same cell of the GPU with the nearest memory bandwidth. Side: of cells that are more than 5 % from "
    "1, those told to be faster, or slower, as they are."
)


def kernels(engine: str, rows: Sequence[Left], refused: Sequence[str]) -> Table:
    """By GPU and kernel."""
    columns = [
        Column("n", "n"),
        Column("error", "error", "%"),
        Column("bytes_error", "bytes", "%"),
        Column("nearest_error", "nearest", "%"),
    ]
    columns += [
        Column("nearest", "of"),
        Column("sign", "side", "%"),
        Column("coverage", "within 90 %", "%"),
        Column("from", "learned from"),
    ]
    drawn = []
    for row in rows:
        cells = {
            name: Cell(100 * x)
            for name in ("error", "bytes_error", "nearest_error", "sign", "coverage")
            if (x := getattr(row, name)) is not None
        }
        learned = f"EXTRAPOLATED: {len(row.learned_from)} GPUs" if row.extrapolated else ", ".join(row.learned_from)
        drawn.append(
            Row((row.gpu, row.kernels), cells | {"n": Cell(row.n), "nearest": Cell(row.nearest), "from": Cell(learned)})
        )
    notes = [*infos([KERNELS]), *(Note(f"refused: {why}", "warning") for why in refused)]
    return Table(
        "kernels", f"{engine} · fp8 over bf16 attention on a GPU left out", ("GPU", "kernels"), columns, drawn, notes
    )


def kernel_json(row: Left) -> dict[str, Any]:
    """One row of `kernels`."""
    return asdict(row)
