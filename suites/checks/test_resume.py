"""A run that was killed goes on where it was: nothing is lost, nothing that was recorded is done again."""

import dataclasses
import json
import os
import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvsuite.plugin import SESSION, evaluation
from kvsuite.records import Agreement, Answer, Timing, decode, read
from suites.checks import forked
from suites.checks.depth import depth

SECONDS = ("prefill_seconds", "shared_seconds", "decode_seconds", "decode_share", "seconds", "baseline_seconds")


def without_times(record):
    times = {name: None for name in SECONDS if hasattr(record, name) and not isinstance(record, Answer)}
    times |= dict.fromkeys(SECONDS[:4]) if isinstance(record, Answer) else {}
    return dataclasses.replace(record, **times)


def results(folder):
    """Job → what came out, times aside; every job once."""
    lines = [line for file in Path(folder).glob("records*.jsonl") for line in file.read_bytes().splitlines()]
    whole = [decode(line.decode()) for line in lines if line.endswith(b"}")]
    found = {record.job: without_times(record) for record in whole}
    assert len(found) == len(whole), "nothing that was recorded is done again"
    return found


def kill_after(process, lines, seconds):
    """kill -9 of all of it, so many lines after the first record is there, or seconds."""
    while process.is_alive() and sum(f.read_bytes().count(b"\n") for f in Path("left").glob("records*")) < lines:
        time.sleep(0.01)
    time.sleep(seconds)
    alive = process.is_alive()
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return alive


@pytest.fixture
def undisturbed(finished):
    finished("samples or length", "whole")
    return results("whole")


@pytest.mark.parametrize(("parallel", "kills"), [([], depth(3, 20)), (["-n", "2"], depth(1, 20))], ids=str)
def test_a_run_that_is_killed_at_any_moment_goes_on(run, go, pytester, undisturbed, parallel, kills):
    dice, killed = random.Random(0), 0
    for at in range(kills):
        resume = ["--kv-resume", "left"] if Path("left/run.json").is_file() else ["--kv-run", "left"]
        before = len(results("left")) if Path("left").is_dir() else 0
        lines = dice.randrange(before + 1, max(before + 2, len(undisturbed) * (at + 1) // kills))
        process = forked.start(go("samples or length", *parallel, *resume), pytester.path)
        killed += kill_after(process, lines, dice.uniform(0, 0.05))
    assert killed, "at least one was still running"
    there = results("left")
    result = run("samples or length", "--kv-resume", "left", *parallel)
    assert result.ret == 0, result.outlines[-30:]
    assert results("left") == undisturbed
    assert results("left").items() >= there.items()
    assert sorted(p.name for p in Path("left").iterdir()) == ["records.jsonl", "report.html", "report.md", "run.json"]
    assert read(Path("left")).facts["finished"]
    assert "partial" not in Path("left/report.md").read_text()


def test_timed_cells_are_not_timed_again(run, pytester):
    pytester.makepyfile(dies=DIES)
    assert run("throughput", "-p", "dies").ret == -signal.SIGKILL
    before = (Path("left") / "records.jsonl").read_bytes()
    assert before.count(b"\n") == 4
    result = run("throughput", "--kv-resume", "left")
    assert result.ret == 0, result.outlines[-30:]
    assert result.parseoutcomes()["skipped"] == 4
    assert (Path("left") / "records.jsonl").read_bytes().startswith(before)
    assert len(results("left")) == 7 == len([r for r in read(Path("left")).records if isinstance(r, Timing)])
    again = run("throughput", "--kv-resume", "left")
    assert again.parseoutcomes()["skipped"] == 7
    assert len(results("left")) == 7


DIES = """
import os, signal
from kvsuite.plugin.session import Session
record, made = Session.record, []
def until(self, answer):
    record(self, answer)
    made.append(answer)
    if len(made) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
Session.record = until
"""


def test_a_worker_that_dies_is_replaced_and_its_answers_stay(run, pytester, undisturbed):
    pytester.makepyfile(dies=DIES.replace("len(made) == 4", "self.worker == 'gw0' and len(made) == 4"))
    result = run("samples or length", "-n", "2", "-p", "dies")
    assert result.ret == pytest.ExitCode.TESTS_FAILED, "the test that killed it"
    result.stdout.fnmatch_lines(["*replacing crashed worker gw0*"])
    assert {job: r for job, r in results("left").items() if job in undisturbed} == undisturbed


def test_what_failed_is_done_again(run, pytester):
    broken = "from kvsuite.methods.codecs import int8\nint8.Int8.specs = None"
    pytester.makepyfile(broken=broken)
    assert run("samples", "-p", "broken").ret == pytest.ExitCode.TESTS_FAILED
    assert run("samples", "--kv-resume", "left").ret == 0
    assert {r.status for r in read(Path("left")).records} == {"ok"}
    lines = (Path("left") / "records.jsonl").read_text().splitlines()
    assert len([line for line in lines if '"failed"' in line]) == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kv-cap", "5"], "*'left' cannot be resumed: its settings differed (cap: 6 and 5)*"),
        (["--kv-run", "other"], "*--kv-run names a new run's folder, --kv-resume an old one's: give one of them*"),
    ],
)
@pytest.mark.parametrize("parallel", [[], ["-n", "2"]], ids=["serial", "n2"])
def test_another_run_is_not_resumed(run, finished, arguments, said, parallel):
    finished("samples", "left")
    before = (Path("left") / "records.jsonl").read_bytes()
    result = run("samples", "--kv-resume", "left", *arguments, *parallel)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([said])
    assert (Path("left") / "records.jsonl").read_bytes() == before


def test_a_version_that_changed_is_told(run, finished):
    finished("samples", "left")
    facts = json.loads(Path("left/run.json").read_text())
    facts["environment"]["packages"]["torch"] = "2.0"
    Path("left/run.json").write_text(json.dumps(facts))
    result = run("samples", "--kv-resume", "left")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*its machine or its versions differed (packages: torch: '2.0' and *"])


def test_a_run_that_goes_on_may_measure_more(run):
    assert run("samples", "--kv-methods", "int8").ret == 0
    before = results("left")
    assert run("samples or length").ret == pytest.ExitCode.USAGE_ERROR, "without --kv-resume"
    assert run("samples or length", "--kv-resume", "left").ret == 0
    assert results("left").items() > before.items()
    found = read(Path("left"))
    assert found.facts["methods"] == ["full", "jitter", "int8", "h2o:budget=64"]
    assert found.facts["expected"]["samples"] == {"document": 3, "needle": 3, "chat": 3}
    assert "partial" not in Path("left/report.md").read_text()


def test_a_run_that_goes_on_may_have_more_tasks_but_the_same_texts(run):
    assert run("samples", "--kv-tasks", "needle").ret == 0
    before = results("left")
    assert run("samples", "--kv-tasks", "document", "--kv-resume", "left").ret == pytest.ExitCode.USAGE_ERROR
    assert run("samples", "--kv-tasks", "needle,document", "--kv-resume", "left").ret == 0
    assert results("left").items() > before.items()
    found = read(Path("left"))
    assert found.facts["settings"]["tasks"] == ["needle", "document"]
    assert found.facts["texts"].keys() == {"needle", "document"}
    assert found.facts["expected"]["samples"] == {"needle": 3, "document": 3}
    facts = found.facts | {"texts": found.facts["texts"] | {"needle": "others"}}
    Path("left/run.json").write_text(json.dumps(facts))
    result = run("samples", "--kv-tasks", "needle,document,json", "--kv-resume", "left")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*its texts differed (needle: 'others' and *"])


def test_an_interrupted_run_says_how_to_go_on(run, pytester):
    pytester.makepyfile(interrupted=DIES.replace("os.kill(os.getpid(), signal.SIGKILL)", "raise KeyboardInterrupt"))
    result = run("samples", "-p", "interrupted")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    result.stdout.fnmatch_lines(["interrupted; go on with: pytest *-m samples *--kv-resume left"])


def test_only_what_is_chosen_runs_and_a_test_takes_as_long_as_its_jobs(run):
    result = run("samples or length or throughput", "-k", "int8", "--durations", "0", "-vv")
    assert result.ret == 0, result.outlines[-30:]
    found = read(Path("left"))
    assert found.facts["methods"] == ["full", "jitter", "int8"]
    assert {r.method for r in found.records if isinstance(r, Answer)} == {"full", "jitter", "int8"}
    assert {r.method for r in found.records if isinstance(r, Timing)} == {"int8"}
    assert not [r for r in found.records if isinstance(r, Agreement)]
    report = Path("left/report.md").read_text()
    assert "partial" not in report
    rates = [line for line in report.splitlines() if line.startswith("| full, tok/s")]
    assert len(rates) == 2, "decode and prefill"
    assert not [line for line in rates if "| - |" in line], "full was timed in turn with int8"
    [line] = [x for x in result.outlines if "call" in x and "test_samples.py::test_answers[int8-needle]" in x]
    took = sum(r.seconds for r in found.records if isinstance(r, Answer) and (r.method, r.task) == ("int8", "needle"))
    assert float(line.split("s ")[0]) == pytest.approx(took, abs=0.02)


class Worker:
    """As xdist's scheduler sees one."""

    def __init__(self, name):
        self.gateway, self.shutting_down, self.given = SimpleNamespace(id=name), False, []

    def send_runtest_some(self, places):
        self.given += places

    def shutdown(self):
        self.shutting_down = True


@pytest.mark.parametrize("left", [1, 2])
def test_who_replaces_a_dead_worker_gets_all_that_it_left(left):
    """Of its first group of tests nothing is left, of its second one test or two, of its third all."""
    tasks = {"a": 2, "b": 2, "c": 2, "d": 2}
    tests = [f"f.py::test[{at}-{task}-x]" for task, count in tasks.items() for at in range(count)]
    session = SimpleNamespace(options=SimpleNamespace(tasks=[*tasks]))
    config = SimpleNamespace(
        option=SimpleNamespace(dist="load", loadscopereorder=False), stash={SESSION: session},
        getvalue=lambda name: ["2*popen"], getoption=lambda name, default=None: default,
    )  # fmt: skip
    found = evaluation.pytest_xdist_make_scheduler(config, None)
    first, other, new = map(Worker, ("gw0", "gw1", "gw2"))
    for worker in (first, other):
        found.add_node(worker)
        found.add_node_collection(worker, tests)
    found.schedule()
    work = found.assigned_work
    work[first], work[other] = {"a": {tests[0]: True, tests[1]: True}}, {}
    work[first]["b"] = {tests[2]: left == 1, tests[3]: False}
    work[first]["c"] = {tests[4]: False, tests[5]: False}
    found.workqueue.clear()
    other.shutdown()
    assert found.remove_node(first) == tests[3 if left == 1 else 2]
    found.add_node(new)
    found.add_node_collection(new, tests)
    found.schedule()
    assert len(new.given) >= 2, "it runs one when it knows the next"
    found.mark_test_complete(new, new.given[0])
    assert new.given == [at for at in (2, 3, 4, 5) if at > 2 or left == 2]
