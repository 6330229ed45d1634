"""The negative benchmark as a folder: built of one run, read again, and scored with another run's answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from kvsuite import disk
from kvsuite.analysis.benchmark import Scored, Selection, Votes, family, score
from kvsuite.analysis.resample import DRAWS
from kvsuite.analysis.samples import Broken, same_answers
from kvsuite.analysis.stability import Stability, stability
from kvsuite.analysis.tables.negatives import Compared
from kvsuite.columns import Arm, ArmBuilder, Key, align
from kvsuite.errors import UsageError, unknown
from kvsuite.readers.run import answers, arms
from kvsuite.records import Answer, Run
from kvsuite.typed import amiss

ROWS, FACTS = "negatives.jsonl", "benchmark.json"
VERSION = 1
LEAST = 10
"""Samples below which no mean is printed."""


@dataclass(frozen=True)
class Benchmark:
    """Samples of which any candidate is scored on some, and who fell on them."""

    votes: Votes
    quorum: int | None
    facts: Mapping[str, Any]
    """Of the run that chose: model, texts, settings, when it began, and the rule."""
    hashes: Mapping[Key, str]
    """Of the prompts; empty where the run did not know."""

    def select(self, candidate: str, families: Mapping[str, str] | None = None) -> Selection:
        """See `Votes.select`."""
        return self.votes.select(candidate, self.quorum, families)


def build(
    run: Run,
    jurors: Sequence[str] = (),
    quorum: int | None = None,
    rule: Broken | None = None,
    tasks: Sequence[str] = (),
) -> tuple[Benchmark, Stability]:
    """Choose samples by the run's methods, or by ``jurors`` among them, of all its tasks with scores or of ``tasks``.
    Raises UsageError for unknown jurors and tasks, jurors of one family alone, and a run without scores."""
    compared, rule = Compared.of(run), rule or Broken()
    for name in jurors:
        if name not in compared.methods:
            raise unknown("method with scores in the run", name, compared.methods)
    for name in tasks:
        if name not in compared.base.types:
            raise unknown("task of the run", name, compared.base.types)
    scored = [
        at
        for at, (task, score) in enumerate(zip(compared.base.dataset, compared.base.score, strict=True))
        if score == score and task in (tasks or [task])  # chats have none
    ]
    base = compared.base.take(scored)
    methods = {name: compared.methods[name].take(scored) for name in jurors or compared.methods}
    if len({family(name) for name in methods}) < 2:
        raise UsageError("jurors of one family alone can judge no method of theirs: name others with --juror")
    votes = Votes.of(base, methods, rule)
    facts = {key: run.facts.get(key) for key in ("started", "command", "model", "texts", "settings")}
    facts |= {"rule": vars(rule), "samples": len(base), "sampled": run.sampled, "baseline": run.baseline}
    whole = Benchmark(votes, quorum, facts, _hashes(run))
    asked = ["nobody", *methods]
    kept = np.any([whole.select(name).chosen for name in asked], axis=0)
    places = [int(at) for at in np.flatnonzero(kept)]
    return replace(whole, votes=votes.take(places)), stability(votes, base.score, rule)


def _hashes(run: Run) -> dict[Key, str]:
    return {(a.task, a.sample): a.prompt_hash for a in answers(run, "samples")}


def write(folder: Path, benchmark: Benchmark, texts: Mapping[Key, Mapping[str, Any]], card: str) -> None:
    """``negatives.jsonl``, ``benchmark.json`` and the card. ``texts`` is what is known of the samples themselves, by
    task and sample. Raises UsageError where the folder holds one already."""
    if (folder / ROWS).exists():
        raise UsageError(f"{folder} already holds a benchmark; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    base, rows = benchmark.votes.base, []
    for at, (task, sample) in enumerate(base.keys):
        rows.append(
            {
                "id": sample,
                "task": task,
                "type": base.types.get(task, "other"),
                "cluster": base.cluster[at],
                "prompt_hash": benchmark.hashes.get((task, sample), ""),
                **texts.get((task, sample), {}),
                "baseline_answer": base.text[at],
                "baseline_score": float(base.score[at]),
                "fell": [name for name, fell in benchmark.votes.fell.items() if fell[at]],
            }
        )
    disk.write(folder / ROWS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    facts = {"version": VERSION, "jurors": list(benchmark.votes.fell), "quorum": benchmark.quorum, **benchmark.facts}
    disk.write(folder / FACTS, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    disk.write(folder / "README.md", card)


def read(folder: Path) -> Benchmark:
    """What `write` wrote. Raises UsageError, naming the file, for what is none or is not whole."""
    try:
        facts = disk.parsed(disk.text(folder / FACTS))
        version = facts["version"]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{str(folder)!r} is not a negative benchmark: {error}") from error
    if version != VERSION:
        raise UsageError(f"{folder} is a negative benchmark of version {version}, not {VERSION}")
    if said := amiss(facts, {"jurors": list[str], "quorum": int | None}, whole=True):
        raise UsageError(f"{folder / FACTS} is not whole: {said}")
    builder, fell, hashes = ArmBuilder(str(folder)), list[set[str]](), dict[Key, str]()
    for number, line in disk.lines(folder / ROWS):
        where = f"{folder / ROWS} line {number}"
        try:
            row = disk.parsed(line)
            task, sample, names, hashed = row["task"], row["id"], set(row["fell"]), row["prompt_hash"]
            figures = {"score": row["baseline_score"], "text": row["baseline_answer"]}
            builder.add(where, task, sample, cluster=row["cluster"], type=row["type"], **figures)
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{where} is no sample of a benchmark: {error}") from error
        fell.append(names)
        hashes[task, str(sample)] = hashed
    votes = Votes(builder.arm(), {name: np.array([name in names for names in fell]) for name in facts["jurors"]})
    return Benchmark(votes, facts["quorum"], facts, hashes)


@dataclass(frozen=True)
class Row:
    """A candidate on what others chose, of one type of task or of all."""

    scored: Scored
    jurors: tuple[str, ...]
    type: str = ""
    """Empty for all."""
    null: bool = False
    """Whether the candidate is a control: it does nothing."""
    changed: int = 0
    """Samples on which its score is not the baseline's."""


@dataclass(frozen=True)
class Scores:
    """All candidates of a run."""

    base: str
    """Whose answers are replicate 2 of the baseline."""
    control: str
    """Whose are the baseline's once more; empty where there is none."""
    rows: list[Row]
    notes: list[str]


def scores(
    benchmark: Benchmark,
    run: Run,
    families: Mapping[str, str] | None = None,
    allow_missing: bool = False,
    draws: int = DRAWS,
) -> Scores:
    """A run's methods on the samples that methods of other families fell on, by answers that had no part in choosing.

    Replicate 2 of the baseline is the run's own where it gave other answers than those that chose, else its first
    control: in one process a greedy answer is the same each time, and keeps its luck. The next control is B2, any
    further ones are candidates that do nothing. Raises UsageError for the run that chose, other prompts, samples that
    are not there, and a run without a fresh baseline.
    """
    facts = benchmark.facts
    if run.facts.get("started") == facts.get("started"):
        raise UsageError(f"{run.folder} is the run that chose the samples: score answers that had no part in it")
    found, notes = _aligned(benchmark, run, allow_missing)
    kept = {key: at for at, key in enumerate(benchmark.votes.base.keys)}
    some = benchmark.votes.take([kept[key] for key in next(iter(found.values())).keys])
    benchmark = replace(benchmark, votes=some)
    noises = [name for name in found if run.is_control(name)]
    fresh = [name for name in [run.baseline, *noises] if not same_answers(some.base, found[name])]
    if not fresh:
        raise UsageError(
            f"{run.folder}: {run.baseline} gave the very answers that chose, and there is no control with others: "
            "the luck of having been chosen is still in them (add jitter, jitter:seed=1 to the methods)"
        )
    base, *others = fresh
    control = next((name for name in others if name in noises), "")
    rows = []
    for name in found:
        if name not in (run.baseline, base, control):
            selection = benchmark.select(name, families)
            rows += _rows(selection, found[base], found[name], found.get(control), run.is_control(name), draws)
    if run.facts.get("model") != facts.get("model"):
        notes.append(f"another model than {facts['model']['name']} chose these samples")
    return Scores(base, control, rows, list(dict.fromkeys([*notes, *(n for row in rows for n in row.scored.notes)])))


def _aligned(benchmark: Benchmark, run: Run, allow_missing: bool) -> tuple[dict[str, Arm], list[str]]:
    """The run's arms on the benchmark's samples."""
    wanted = set(benchmark.votes.base.keys)
    _check(benchmark.hashes, (a for a in answers(run, "samples") if (a.task, a.sample) in wanted), run)
    known = {method: arm for (method, repeat), arm in arms(run, "samples").items() if not repeat}
    if run.baseline not in known or len(known) == 1:
        raise UsageError(f"{run.folder} holds no scores of a baseline and methods")
    taken = {m: arm.take([at for at, key in enumerate(arm.keys) if key in wanted]) for m, arm in known.items()}
    (_, *others), left_out = align([benchmark.votes.base, *taken.values()], allow_missing)
    return dict(zip(taken, others, strict=True)), left_out


def _check(hashes: Mapping[Key, str], given: Iterable[Answer], run: Run) -> None:
    for a in given:
        if a.prompt_hash and hashes[a.task, a.sample] not in ("", a.prompt_hash):
            raise UsageError(f"{run.folder}: sample {a.sample} of {a.task} has another prompt than the benchmark's")


def _rows(selection: Selection, base: Arm, method: Arm, control: Arm | None, null: bool, draws: int) -> list[Row]:
    """Of one candidate, all types together and each by itself."""
    types = [selection.base.types.get(dataset, "other") for dataset in selection.base.dataset]
    rows = []
    for kind in ("", *sorted(set(types))):
        chosen = selection.chosen & np.array([kind in ("", t) for t in types])
        n = int(chosen.sum())
        one = Scored(selection.candidate, n, ())
        if n >= LEAST:
            one = score(replace(selection, chosen=chosen), base, method, control, draws)
        rows.append(Row(one, selection.jurors, kind, null, int((method.score != base.score)[chosen].sum())))
    return rows


def card(benchmark: Benchmark, stable: Stability) -> str:
    """The dataset card, in markdown."""
    facts, votes = benchmark.facts, benchmark.votes
    rule = facts["rule"]
    at_most = "at most" if rule["inclusive"] else "below"
    below = f"{at_most} the uncompressed one less {rule['theta']:g}"
    if not rule["absolute"]:
        below = f"{at_most} {1 - rule['theta']:.0%} of the uncompressed one"
    kinds = [votes.base.types.get(dataset, "other") for dataset in votes.base.dataset]
    lines = []
    for kind in sorted(set(kinds)):
        mine = np.array([k == kind for k in kinds])
        fell = ", ".join(f"{name} {int((mask & mine).sum())}" for name, mask in votes.fell.items())
        lines.append(f"| {kind} | {int(mine.sum())} | {fell} |")
    template = resources.files("kvsuite").joinpath("templates/negatives.md").read_text(encoding="utf-8")
    return template.format(
        model=facts["model"]["name"],
        rows=len(votes.base),
        samples=facts["samples"],
        baseline=facts["baseline"],
        benign=rule["benign"],
        below=below,
        jurors=", ".join(votes.fell),
        quorum="all" if benchmark.quorum is None else benchmark.quorum,
        least=LEAST,
        types="\n".join(lines),
        **vars(stable),
    )
