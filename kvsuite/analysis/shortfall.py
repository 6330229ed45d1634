"""What a run was to measure, and how much of it is there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from kvsuite import tasks
from kvsuite.readers.run import answers
from kvsuite.records import Run, Timing
from kvsuite.tasks.reference import PREFIX

Who = tuple[str, int]
"""A method and its repeat: the baseline answers chats again with other noise."""


@dataclass(frozen=True)
class Share:
    """Answers of one arm to one task."""

    ok: int
    failed: int
    asked: int
    """As run.json expects; of a run that does not say so, those recorded, failed ones included."""


def interrupted(run: Run) -> bool:
    """Whether a run began and never ended. Earlier runs do not say."""
    return "expected" in run.facts and not run.facts.get("finished")


def expected(run: Run, evaluation: str = "") -> dict[str, int]:
    """By task, or task of one evaluation, the samples that every arm was to answer; empty where that is not known."""
    known: dict[str, int] = run.facts.get("expected", {}).get("samples", {})
    return {task: n for task, n in known.items() if evaluation in ("", evaluation_of(run, task))}


def evaluation_of(run: Run, task: str) -> str:
    """What a task's answers are for, also where there are none yet."""
    seen = next((a.evaluation for a in answers(run) if a.task == task), "")
    return seen or (tasks.task(task).evaluation if task.removeprefix(PREFIX) in tasks.names() else "")


@lru_cache(maxsize=2)  # several tables ask for the same run
def shares(run: Run) -> dict[str, dict[Who, Share]]:
    """By task and arm, in order of appearance; then what never appeared."""
    ok: dict[str, dict[Who, set[str]]] = {}
    failed: dict[str, dict[Who, set[str]]] = {}
    for a in answers(run, references=True):
        for found in (ok, failed):
            found.setdefault(a.task, {}).setdefault((a.method, a.repeat), set())
        (ok if a.status == "ok" else failed)[a.task][a.method, a.repeat].add(a.sample)
    wanted, found_shares = expected(run), {}
    for task in dict.fromkeys([*ok, *wanted]):
        arms = [*ok.get(task, {}), *(_arms(run, task) if task in wanted else ())]
        found_shares[task] = {
            who: _share(ok.get(task, {}).get(who, set()), failed.get(task, {}).get(who, set()), wanted.get(task, 0))
            for who in dict.fromkeys(arms)
        }
    return found_shares


def _arms(run: Run, task: str) -> list[Who]:
    """Who was to answer a task."""
    settings, methods = run.facts["settings"], run.facts["methods"]
    if "servers" in run.facts or not settings.get("temperature", 0) or evaluation_of(run, task) != "length":
        return [(method, 0) for method in methods]
    repeats = settings.get("repeats", 1)
    return [*((method, repeat) for repeat in range(repeats) for method in methods), (run.baseline, repeats)]


def total(some: Iterable[Share]) -> Share:
    """Of several repeats."""
    ok, failed, asked = (sum(x) for x in zip(*((s.ok, s.failed, s.asked) for s in some), strict=True))
    return Share(ok, failed, asked)


def _share(ok: set[str], failed: set[str], wanted: int) -> Share:
    failed = failed - ok
    return Share(len(ok), len(failed), max(wanted, len(ok) + len(failed)))


def timed(run: Run) -> tuple[int, int]:
    """Cells whose timing was recorded, failed or not, and how many there were to be."""
    found = sum(isinstance(r, Timing) for r in run.records)
    return found, max(found, run.facts.get("expected", {}).get("timings") or 0)
