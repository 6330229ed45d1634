"""``kvsuite paper``: every figure and table of the paper beside what its artifact's data give, and ours.

``paper.json`` holds what the paper says, and why something is not reproduced here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from kvsuite import readers
from kvsuite.analysis.length import beside, length_rows
from kvsuite.analysis.requests import of_arms, paces
from kvsuite.analysis.samples import Broken
from kvsuite.analysis.speed import SpeedRow, attention_alone, speed_rows
from kvsuite.analysis.table import Cell, Column, Note, Row, Table, infos
from kvsuite.analysis.tables.negatives import NOISE, Compared, Counts, counted
from kvsuite.analysis.verbosity import verbosity
from kvsuite.columns import align
from kvsuite.errors import UsageError, unknown
from kvsuite.readers.run import by_task
from kvsuite.records import Predicted, Run, Timing

SHOWN = (0.01, 0.10, 0.32)
"""θ that are shown of the sweep; ``kvsuite negatives`` shows all."""
INTRO = """# The paper's figures and tables, and ours

Gao, Zhou, Sun, Zhang, Wen: *Rethinking Key-Value Cache Compression Techniques for Large Language Model Serving*, MLSys
2025, arXiv 2503.24000. `kvsuite paper FIGURE --run RUN --artifact FOLDER` prints one of them: what the paper says, what
the data of its artifact (github.com/LLMkvsys/rethink-kv-compression) give when they are counted again, and a run of
ours. This page is `kvsuite paper --markdown --run reports/cpu/standard --run reports/cpu/grid --run reports/cpu/tools
--artifact FOLDER`."""
Found = dict[str, str]
"""What was counted → its figure, in words."""


class Artifact:
    """A clone of the paper's artifact, or any folder that holds its scores."""

    def __init__(self, folder: Path) -> None:
        """Raises UsageError where there are no scores in it."""
        known = _known()["artifact"]
        first = next(iter(sorted(folder.rglob(f"{known['baseline']}*_eval.json"))), None)
        if first is None:
            raise UsageError(f"{folder} holds no scores of the artifact ({known['baseline']}*_eval.json)")
        self.folder, self.known = first.parent, known

    @cached_property
    def counts(self) -> Counts:
        """Algorithm 1 by the paper's text, but with the code's ``<=``."""
        prefixes = [self.known["baseline"], *self.known["methods"].values()]
        (base, *others), _ = align([readers.arm(f"artifact:{self.folder}/{prefix}") for prefix in prefixes])
        methods = dict(zip(self.known["methods"], others, strict=True))
        return counted(Compared(base, methods, None), Broken(inclusive=True))

    def figure(self, kind: str) -> Found:
        """What its data give for one kind of figure."""
        return {"thetas": _thetas, "types": _types}[kind](self.counts) if kind not in OURS else {}


def _known() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((files("kvsuite.analysis") / "paper.json").read_text(encoding="utf-8"))
    return found


def _of(n: int, of: int, noise: int | None = None) -> str:
    beside = "" if noise is None else f" ({noise} by noise)"
    return f"{n} of {of}{beside}"


def _thetas(found: Counts) -> Found:
    said = {
        f"{method}, θ = {theta:.0%}": _of(n, found.eligible, counts.get(NOISE))
        for theta, counts in found.sweep.items()
        if theta in SHOWN
        for method, n in counts.items()
        if method != NOISE
    }
    both = {name: n for name, n in found.sets.items() if "|" not in name and n}  # those with none in common are many
    return said | {f"{name}, θ = 10%": _of(n, found.eligible) for name, n in both.items()}


def _types(found: Counts) -> Found:
    return {
        f"{kind}: {method}": _of(n, counts["eligible"], counts.get(NOISE))
        for kind, counts in found.by_type.items()
        for method, n in counts.items()
        if method not in ("eligible", NOISE)
    }


def _length(run: Run) -> Found:
    """Of each method's answers to chats the shares with D ≥ 50 % and D ≤ -50 %."""
    found: Found = {}
    for chats in by_task(run, "length").values():
        for row in length_rows(chats, run.baseline):
            if row.d is not None and row.pairs and (row.control or row.method != run.baseline):
                longer, shorter = row.d
                found[row.name] = f"{100 * shorter:.1f} / {100 * longer:.1f} ({row.pairs} prompts)"
    return found


def _requests(run: Run) -> Found:
    """Of each arm's chats the mean and 95th percentile of seconds end to end, × the baseline's, and how many are
    slower; nothing where prefill and decode were not timed."""
    _, speed = paces(run)
    found: Found = {}
    for chats in by_task(run, "length").values():
        for name, r in of_arms(beside(chats, run.baseline), speed, run.baseline).items():
            found[f"{name}: mean, × {run.baseline}"] = f"{r.mean.mean:.2f} ({r.mean.low:.2f}–{r.mean.high:.2f})"
            found[f"{name}: p95, × {run.baseline}"] = f"{r.quantiles['p95']:.2f}"
            found[f"{name}: slower"] = _of(r.slower, r.pairs)
    return found


def _verbosity(run: Run) -> Found:
    """Of each arm's answers to chats, whether the longer ones are worse; nothing before ``kvsuite verbosity``."""
    found: Found = {}
    for rows in verbosity(run).values():
        for row in rows:
            noise = " (noise)" if row.control else ""
            found[f"{row.name}{noise}: at least 1.5× as long"] = _of(row.longer, row.pairs)
            for what, x in (("", row.change), (", of those", row.longer_change)):
                if x is not None:
                    found[f"{row.name}{noise}: similarity to the reference - {run.baseline}'s{what}"] = f"{x.mean:+.3f}"
            if row.differing:
                found[f"{row.name}{noise}: Q ≤ Q_{run.baseline} and L ≥ L_{run.baseline}"] = _of(
                    row.verbose, row.differing
                )
    return found


def _speeds(run: Run) -> Found:
    """Each method's speed over the uncompressed cache's by batch, at each length that was timed at several."""
    found: Found = {}
    for name, some in (("decode", _decoding(run)), ("attention alone", attention_alone(_decoding(run)))):
        rows = [row for row in speed_rows(some) if row.speedup is not None and row.method != run.baseline]
        for length, method, own in _lines(rows, "length", "width"):
            batches = ", ".join(str(r.width) for r in own)
            what = f"{name}, length {length:,}, batch {batches}: {method}, × {run.baseline}"
            found[what] = ", ".join(f"{r.speedup.mean:.2f}" for r in own if r.speedup is not None)
    return found


def _attention(run: Run) -> Found:
    """What attention takes of a step of the batch over the length, milliseconds."""
    found: Found = {}
    rows = [row for row in speed_rows(attention_alone(_decoding(run))) if row.rate]
    for width, method, own in _lines(rows, "width", "length"):
        what = f"batch {width}, length {', '.join(f'{r.length:,}' for r in own)}: {method}, ms a step"
        found[what] = ", ".join(f"{1000 * width / r.rate:.2f}" for r in own if r.rate)
    return found


def _decoding(run: Run) -> list[Timing]:
    methods = run.facts["methods"]  # among which transformers' own cache is not
    return [r for r in run.records if isinstance(r, Timing) and r.phase == "decode" and r.method in methods]


def _lines(rows: Sequence[SpeedRow], fixed: str, along: str) -> Iterator[tuple[int, str, list[SpeedRow]]]:
    """Cells of one method and one value of ``fixed``, in order of ``along``, where there are several of these."""
    for value in sorted({getattr(row, fixed) for row in rows}):
        for method in dict.fromkeys(row.method for row in rows):
            own = [row for row in rows if (getattr(row, fixed), row.method) == (value, method)]
            if len(own) > 1:
                yield value, method, sorted(own, key=lambda row: getattr(row, along))


def _told(*tools: str) -> Callable[[Run], Found]:
    """What tools are worth, each beside the nulls."""

    def figures(run: Run) -> Found:
        return {
            f"{r.tool}, {r.what}: {r.method}, {r.measure}": f"{r.value:.3g}{r.unit}"
            f" ({', '.join(f'{name} {value:.3g}' for name, value in r.nulls.items())}; n = {r.n})"
            for r in run.records
            if isinstance(r, Predicted) and r.tool in tools
        }

    return figures


OURS: dict[str, Callable[[Run], Found]] = {
    "length": _length,
    "requests": _requests,
    "verbosity": _verbosity,
    "speeds": _speeds,
    "attention": _attention,
    "predictors": _told("throughput", "length", "type of task"),
    "router": _told("router"),
}
"""Kinds of figures to which the artifact has no data."""


def _ours(run: Run, kind: str) -> Found:
    if kind in OURS:
        return OURS[kind](run)
    try:
        compared = Compared.of(run)
    except UsageError:  # nothing scored
        return {}
    return {"thetas": _thetas, "types": _types}[kind](counted(compared, Broken()))


def figures(wanted: Sequence[str], runs: Sequence[Run], artifact: Artifact | None) -> list[Table]:
    """The figures and tables of these keys, or all; ours are the first run's that has any. Raises UsageError for a key
    that is none."""
    known = {figure["key"]: figure for figure in _known()["figures"]}
    if lost := next((key for key in wanted if key not in known), None):
        raise unknown("figure or table of the paper", lost, known)
    return [_figure(known[key], runs, artifact) for key in wanted or known]


def _figure(figure: Mapping[str, Any], runs: Sequence[Run], artifact: Artifact | None) -> Table:
    paper = {row["what"]: row["paper"] for row in figure.get("rows", [])}
    kind = figure.get("ours")
    theirs = artifact.figure(kind) if artifact and kind else {}
    mine = next((found for run in runs if kind and (found := _ours(run, kind))), {})
    sides = {"paper": paper, "artifact": theirs, "ours": mine}
    rows = [
        Row((what,), {side: Cell(found[what]) for side, found in sides.items() if what in found})
        for what in dict.fromkeys([*paper, *theirs, *mine])
    ]
    columns = [Column(side, side) for side in sides]
    said = [Note(f"{figure['why'][0].upper()}{figure['why'][1:]}.")] if "why" in figure else []
    said += infos([figure["differs"]] if "differs" in figure else [])
    return Table(figure["key"], f"{figure['name']}: {figure['what']}", ("what",), columns, rows, said)


def overview() -> Table:
    """Every figure and table, and how it is printed or why it is not reproduced."""
    rows = [
        Row((figure["name"],), {"what": Cell(figure["what"]), "how": Cell(_how(figure))})
        for figure in _known()["figures"]
    ]
    columns = [Column("what", "what"), Column("how", "ours")]
    return Table("paper", "Every figure and table", ("paper",), columns, rows)


def _how(figure: Mapping[str, Any]) -> str:
    return str(figure["why"]) if "why" in figure else f"`kvsuite paper {figure['key']} --run RUN`"
