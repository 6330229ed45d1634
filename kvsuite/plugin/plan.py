"""What a run in this process is going to do, and how long it will take on this machine."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest

from kvsuite import tasks
from kvsuite.analysis.minutes import Load, Speeds
from kvsuite.modes import PAGED, phase_of
from kvsuite.records import Job, cell_name

if TYPE_CHECKING:
    from kvsuite.plugin.local import Local

OTHER = 2.0
"""Seconds of a test that neither answers nor times."""
UNPACKED = 3
"""How many times as long a step takes that unpacks all that a cache holds."""
CHECKED = 4
"""Samples that a test of the baseline answers once more."""


@dataclass
class Plan:
    """The chosen tests in order, and the seconds each is expected to take."""

    expected: dict[str, float]
    start: float = field(default_factory=time.perf_counter)
    done: float = 0.0
    """Expected seconds of the tests that have ended."""
    current: float = 0.0
    """Of the test that runs."""

    def begin(self, test: str) -> None:
        """A test starts."""
        self.current = self.expected.get(test, 0.0)

    def end(self) -> None:
        """It has ended."""
        self.done, self.current = self.done + self.current, 0.0

    def left(self, share: float) -> float:
        """Seconds to the end of the run, when ``share`` of the running test is done: what is expected, corrected by
        how long everything took so far."""
        total, done = sum(self.expected.values()), self.done + share * self.current
        spent = time.perf_counter() - self.start
        return (total - done) * (spent / done if done > 0.05 * total else 1.0)


def plan(session: Local, items: Sequence[pytest.Item]) -> Plan:
    """Measure this machine's speeds and estimate every chosen test by what it asks for."""
    speeds, known, seen = session.speeds(), dict[str, Load](), set[str]()
    expected = {}
    for item in items:
        asked = getattr(item, "callspec", None)
        expected[item.nodeid] = _seconds(session, speeds, {} if asked is None else dict(asked.params), known, seen)
    return Plan(expected)


def _load(session: Local, name: str) -> Load:
    samples = session.samples(tasks.task(name))
    prompt = sum(session.count_tokens(s.context + s.question) for s in samples) / len(samples)
    cap = math.inf if tasks.task(name).evaluation == "divergence" else session.options.cap
    answer = sum(min(sample.max_new_tokens, cap) for sample in samples) / len(samples)
    return Load(len(samples), prompt, answer)


def _seconds(session: Local, speeds: Speeds, asked: Mapping[str, Any], known: dict[str, Load], seen: set[str]) -> float:
    o = session.options
    if cell_job(asked) in session.recorded:
        return 0.0
    if "kv_prefill" in asked:
        return speeds.timing_prefill(int(str(asked["kv_prefill"])), o.rounds)
    if "kv_batch" in asked:
        seconds = speeds.timing_decode(int(str(asked["kv_batch"])), o.rounds)
        return seconds if asked.get("kv_mode", PAGED) == PAGED else UNPACKED * seconds
    name = str(asked.get("kv_task"))
    if name not in o.tasks:
        return OTHER
    if name not in known:
        known[name] = _load(session, name)
    load = known[name]
    prompt = speeds.token * load.prompt
    if not {"kv_arm", "kv_method"} & asked.keys():  # the baseline's answers to a few samples once more
        return min(CHECKED, load.samples) * (prompt + speeds.steps(load.answer, 1))
    if name in seen:  # one pass serves all arms
        return 0.0
    seen.add(name)
    jobs = session.jobs(tasks.task(name))
    answers = sum(job not in session.recorded for job in jobs)
    if not answers:
        return 0.0
    passes = o.repeats if tasks.task(name).evaluation == "length" else 1
    share = round(answers / len(jobs) * load.samples * passes)
    return speeds.answering(replace(load, samples=share), answers, session.together)


def cell_job(asked: Mapping[str, Any]) -> Job | None:
    """The timed cell that a test with these parameters is; None for a test of another kind."""
    arm = asked["kv_method"].name if "kv_method" in asked else "transformers"
    mode = str(asked.get("kv_mode", PAGED))
    if "kv_prefill" in asked:
        return Job("throughput", arm, phase_of("prefill", mode), cell_name(1, asked["kv_prefill"]))
    if "kv_batch" in asked:
        return Job("throughput", arm, phase_of("decode", mode), cell_name(asked["kv_batch"], asked["kv_length"]))
    return None


def duration(seconds: float) -> str:
    """A duration as one reads it."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
