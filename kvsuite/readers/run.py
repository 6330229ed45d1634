"""run: a folder that kvsuite left. ``run:FOLDER#METHOD`` is a method's answers, ``run:FOLDER#METHOD@1`` those with
other noise of sampling (repeat 1)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from kvsuite import records
from kvsuite.columns import Arm, ArmBuilder
from kvsuite.errors import UsageError, unknown
from kvsuite.records import Answer, Forced, Run, is_reference

Documents = dict[tuple[str, str], Forced]
"""By task and sample."""


def read(spec: str, path: str, which: str) -> Arm:
    """The scored and chat answers of one method."""
    run = records.told(Path(path))
    found, forced = arms(run), documents(run)
    if not (found or forced):
        raise UsageError(f"{path} holds no answers to tasks or chats")
    method, _, repeat = which.partition("@")
    if not which:
        known = ", ".join(sorted({m for m, _ in found} | forced.keys()))
        raise UsageError(f"{spec}: say which method, {path}#METHOD; there are {known}")
    if not found and which in forced:
        raise UsageError(f"{spec} holds forced documents alone, no answers")
    if (method, repeat or "0") not in {(m, str(r)) for m, r in found}:
        raise unknown(f"method in {path}", which, (f"{m}@{r}" if r else m for m, r in found))
    return found[method, int(repeat or 0)]


@lru_cache(maxsize=12)  # every table asks for them
def arms(run: Run, evaluation: str = "", failed: bool = False) -> dict[tuple[str, int], Arm]:
    """All answers of a run but forced documents – or those to tasks of one evaluation – by method and repeat. A failed
    answer is missing from its arm, or an entry without figures: it is neither wrong nor short."""
    gathered: dict[tuple[str, int], ArmBuilder] = {}
    known: set[tuple[object, ...]] = set()
    folder, file = str(run.folder), str(run.folder / "records.jsonl")  # paths are slow to spell
    given = [a for a in answers(run, evaluation) if not isinstance(a, Forced)]
    if failed and all(a.status == "ok" for a in given):
        return arms(run, evaluation)
    for a in sorted(given, key=lambda a: a.status != "ok" and failed):  # asked again, it may succeed
        if (a.method, a.repeat) not in gathered:
            gathered[a.method, a.repeat] = ArmBuilder(f"{folder}#{a.method}")
        arm = gathered[a.method, a.repeat]
        figures: dict[str, Any] = {}
        if a.status == "ok":
            figures = {"score": a.score, "capped": a.finish == "length", "text": a.text}
            figures["tokens"] = a.length if a.evaluation == "length" else None
        elif not failed or not a.sample or (a.method, a.repeat, a.task, a.sample) in known:
            continue
        known.add((a.method, a.repeat, a.task, a.sample))
        arm.add(f"{file}#{a.method}", a.task, a.sample, cap=a.cap, cluster=a.cluster, type=a.type, **figures)
    return {key: arm.arm() for key, arm in gathered.items() if len(arm)}


def documents(run: Run) -> dict[str, Documents]:
    """By method, the documents whose continuations were forced through its cache; not those that failed. Raises
    UsageError where a document has figures of other numbers of tokens than another method's."""
    found: dict[str, Documents] = {}
    tokens: dict[tuple[str, str], int] = {}
    for r in run.records:
        if isinstance(r, Forced) and r.status == "ok":
            forced = tokens.setdefault((r.task, r.sample), len(r.kl))
            if {len(r.kl), len(r.flips), len(r.logs)} != {forced}:
                said = f"{len(r.kl)} kl, {len(r.flips)} flips and {len(r.logs)} logs of {r.method}, not {forced} each"
                raise UsageError(f"{run.folder}: document {r.sample} of {r.task} has {said}")
            found.setdefault(r.method, {})[r.task, r.sample] = r
    return found


def named_documents(path: str, which: str) -> tuple[Documents, bool]:
    """Those of the method that ``run:PATH#WHICH`` names, and whether it has no other answers."""
    run, method = records.told(Path(path)), which.partition("@")[0]
    return documents(run).get(method, {}), all(arm != method for arm, _ in arms(run))


def by_task(run: Run, evaluation: str = "") -> dict[str, list[Answer]]:
    """Its answers by task, those at other temperatures among them; see `answers`."""
    found: dict[str, list[Answer]] = {}
    for a in answers(run, evaluation, references=True):
        found.setdefault(a.task, []).append(a)
    return found


@lru_cache(maxsize=12)  # every table asks for them
def answers(run: Run, evaluation: str = "", references: bool = False) -> Sequence[Answer]:
    """A run's answers to tasks, or to those of one evaluation; those at other temperatures only where ``references``
    are asked for."""
    hidden = {method for method in {r.method for r in run.records} if is_reference(method) and not references}
    found = (r for r in run.records if isinstance(r, Answer) and r.task and r.method not in hidden)
    return tuple(a for a in found if evaluation in ("", a.evaluation))
