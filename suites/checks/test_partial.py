"""What a report says of a run that lacks answers or timings: interrupted, failed, or never begun."""

import functools
import io
from dataclasses import replace
from pathlib import Path

import pytest

from kvsuite.analysis.effects import compare
from kvsuite.analysis.report import analyse
from kvsuite.analysis.runs import noise, parts, speeds
from kvsuite.cli import main
from kvsuite.margins import Margins
from kvsuite.records import Answer, Run, RunFolder, Timing, read
from kvsuite.report import markdown, terminal
from suites.checks.drawn import tables

N = 8
HARMFUL = "harmful"
ENVIRONMENT = {
    "cpu": "one", "cores": 2, "gpu": None, "threads": 2, "dtype": "bfloat16", "python": "3.11", "packages": {},
    "git": None, "kvsuite": "0",
}  # fmt: skip
FACTS = {
    "started": "today", "command": ["-m", "samples"], "preset": "smoke", "model": {"name": "tiny", "fingerprint": "1"},
    "methods": ["full", "jitter", "m", "other"], "environment": ENVIRONMENT,
    "margins": {"quality": 0.2, "broken": 0.2, "length": 0.2},
    "settings": {"batch": [1, 8], "length": [512, 1024], "compress": "prompt", "temperature": 1.0, "cap": 96},
}  # fmt: skip
EXPECTED = {"expected": {"samples": {"needle": N}}}


def needles(method, score=1.0, n=N, failed=()):
    found = [
        Answer(method, task="needle", sample=f"n{i}", score=score, tokens=[i], text=f"{method} {i}", nbytes=10, cap=9)
        for i in range(n)
    ]
    return [replace(a, status="failed", error="time", score=None) if i in failed else a for i, a in enumerate(found)]


def chats(method, n=N, repeat=0, length=20):
    known = {"evaluation": "length", "task": "chat", "repeat": repeat, "cap": 96, "nbytes_end": 90, "dense_end": 80}
    return [Answer(method, sample=f"c{i}", tokens=[repeat] * length, text=f"{method} {i}", **known) for i in range(n)]


def run(*records, **facts):
    return Run(Path("left"), {**FACTS, **facts}, [r for some in records for r in some])


def whole(**scores):
    scores = {"full": 1.0, "jitter": 1.0, "m": 0.0, "other": 0.0} | scores
    return [needles(method, score) for method, score in scores.items()]


@functools.cache
def drawn(found):
    return {table.title.partition(" · ")[0]: table for table in tables(found)}


def verdict(found, method="m", endpoint="quality"):
    [row] = [row for row in drawn(found)["verdicts"].rows if row[:2] == [method, endpoint]]
    return row[5]


def shown(found, width=80):
    file = io.StringIO()
    terminal.write(analyse(found).tables, file, width)
    return file.getvalue()


# answers that are missing


@pytest.mark.parametrize("who", ["m", "full"])
def test_a_verdict_from_missing_answers_is_none(who):
    """The one that was asked for: 6 of 8 answers said 'harmful' without a mark."""
    rest = [needles(method, score) for method, score in (("full", 1.0), ("jitter", 1.0), ("m", 0.0)) if method != who]
    cut = [*rest, needles(who, float(who == "full"), 6)]
    assert verdict(run(*whole(), **EXPECTED, finished="now")) == HARMFUL
    found = run(*cut, **EXPECTED)
    assert verdict(found) == "partial 6/8"
    assert any(note.startswith("partial") for note in drawn(found)["verdicts"].notes)
    [row] = [row for row in drawn(found)["verdicts"].rows if row[0] == "m"]
    assert (row[2], row[6]) == ("-100.0 pt", "-"), "the figures are kept"
    assert verdict(run(*cut)) == HARMFUL, "an earlier run does not say how many there were to be"


def test_only_what_lacks_answers_is_partial():
    found = run(*whole()[:3], needles("other", 0.0, 3), **EXPECTED, finished="now")
    assert (verdict(found), verdict(found, "other")) == (HARMFUL, "partial 3/8")


@pytest.mark.parametrize("more", [EXPECTED, {}], ids=["said", "not said"])
def test_failed_answers_are_bounds_in_every_run(more):
    """7 lost and 1 failed of 8 are harm, whatever that would have been; 2 lost and 6 failed are undecided."""
    found = run(*whole()[:3], needles("other", 0.0, failed=(1,)), **more)
    assert (verdict(found), verdict(found, "other")) == (HARMFUL, HARMFUL)
    assert verdict(run(*whole()[:3], needles("other", 0.0, failed=range(2, 8)), **more), "other") == "undecided"
    [row] = compare(parts(run(needles("full"), needles("m", failed=(1, 5)), **more)))
    worst, best = row.effect("quality").estimate.extremes
    assert (worst.pairs, best.pairs, row.effect("quality").lacking) == ((0, 2, N), (0, 0, N), None)
    assert row.effect("quality").estimate.mean == 0
    [row] = compare(parts(run(needles("full", 0.0, failed=(1, 5)), needles("m", 0.0), **more)))
    assert [x.pairs for x in row.effect("quality").estimate.extremes] == [(0, 2, N), (0, 0, N)], "the baseline's, too"
    title, [*names] = drawn(found)["needle"].title, [row[0] for row in drawn(found)["needle"].rows]
    assert "partial: 7–8 of 8 samples" in title
    assert names == ["full", "jitter", "m", "other (1 FAILED)"]


def test_a_method_that_was_never_begun_has_a_row():
    found = run(*whole()[:3], **EXPECTED)
    assert verdict(found, "other") == "partial 0/8"
    assert drawn(found)["needle"].rows[-1] == ["other (0 of 8)", *["missing", "-"], *["missing"] * 8]
    assert "partial: 0–8 of 8 samples" in drawn(found)["needle"].title
    assert "other (" not in shown(run(*whole()[:3]))


def test_a_method_whose_answers_all_failed_has_a_row():
    found = run(*whole()[:3], needles("other", failed=range(N)))
    assert verdict(found, "other") == "partial 0/8"
    assert verdict(run(needles("full", failed=range(N)), needles("m"))) == "partial 0/8"


def test_what_a_control_lacks_is_taken_from_no_method():
    """Its failures shrank every comparison; now they cost the figures that need it."""
    base, m = needles("full"), needles("m", 0.0)
    few = needles("jitter", 1.0, failed=range(3))
    few[3] = replace(few[3], score=0.0)
    [row] = compare(parts(run(base, m, few)))
    quality, broken = row.effect("quality"), row.effect("broken")
    assert (quality.n, quality.estimate.pairs, row.n) == (N, (0, N, N), N)
    worst, best = broken.estimate.extremes[::-1]
    assert (broken.n, broken.lacking, worst.pairs, best.pairs) == (5, None, (7, 0, N), (4, 0, N))
    assert row.finding("net harm").counts == (8, 0)
    assert row.finding("churn").counts == (4, 0), "beyond the one that noise changed"
    [control] = compare(noise(run(base, m, few)))
    assert [x.pairs for x in control.effect("quality").estimate.extremes] == [(0, 4, N), (0, 1, N)]


def test_the_control_that_answered_most_is_the_floor():
    base, m, few = needles("full"), needles("m", 0.0), needles("jitter", 1.0, failed=range(3))
    other = [replace(a, score=0.0) if a.sample == "n0" else a for a in needles("jitter:seed=1")]
    [row] = compare(parts(run(base, m, few, other)))
    assert row.effect("broken").estimate.extremes is None


def test_a_method_that_fails_costs_no_other_a_sample():
    found = {row.method: row for row in compare(parts(run(*whole()[:3], needles("other", failed=range(5)))))}
    assert (found["m"].n, found["other"].n) == (N, 3)


def test_the_second_round_of_the_baseline_counts():
    known = {"expected": {"samples": {"chat": N}}}
    once = [chats(method) for method in FACTS["methods"]]
    found = run(*once, chats("full", 5, repeat=1, length=30), **known)
    rows = {row[0]: row for row in drawn(found)["chat"].rows}
    assert "full, other seed (5 of 8)" in rows
    assert "partial: 5–8 of 8 prompts" in drawn(found)["chat"].title
    [control] = [row for row in drawn(found)["verdicts"].rows if row[0] == "full, other seed"]
    assert control[5] == "noise 5/8"
    assert verdict(found, "m", "length") == verdict(run(*once), "m", "length")
    assert "full, other seed (0 of 8)" in {row[0] for row in drawn(run(*once, **known))["chat"].rows}
    greedy = {**FACTS["settings"], "temperature": 0}
    assert "other seed" not in shown(run(*once, **known, settings=greedy))


def test_a_scored_task_that_was_never_begun_is_missing_from_the_others():
    known = {"expected": {"samples": {"needle": N, "chat": 5, "unheard-of": 2}}}
    found = run(*whole(), **known)
    assert verdict(found) == HARMFUL, "chats are another matter"
    found = run(
        *whole(), [replace(a, task="more") for a in needles("jitter")], expected={"samples": {"needle": N, "more": N}}
    )
    assert verdict(found) == "partial 8/16"


# the first line


def test_an_interrupted_run_says_so_first(capsys, tmp_path, monkeypatch):
    known = {"expected": {"samples": {"needle": N, "chat": N}, "timings": 4}}
    found = run(*whole()[:3], [timing("m")], **known)
    title, note = "partial: this run was interrupted", "partial · needle: 24 of 32 answers · chat: 0 of 40 answers"
    assert tables(found)[0].title == title
    assert tables(found)[0].notes == [f"{note} · speed: 1 of 4 timed cells."]
    assert markdown.render(analyse(found)).splitlines()[0] == f"# kvsuite report · tiny · {title}"
    left = RunFolder(tmp_path)
    smoke = read(Path(__file__).parents[2] / "reports/cpu/smoke").facts
    left.describe(smoke | {name: found.facts[name] for name in ("expected", "methods")} | {"finished": None})
    for record in found.records:
        left.append(record)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split("\n")[:2] == ["", title]
    assert read(tmp_path).facts["expected"] == known["expected"]


def test_it_is_red():
    file = io.StringIO()
    colored = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")
        patch.setenv("TERM", "xterm")
        terminal.write(analyse(run(*whole(), **EXPECTED)).tables, colored, 80)
    assert "\x1b[31mpartial: this run was interrupted" in colored.getvalue()
    terminal.write(analyse(run(*whole())).tables, file, 80)
    assert "partial" not in file.getvalue()


def test_a_run_that_ended_with_all_says_nothing():
    for facts in ({**EXPECTED, "finished": "now"}, {}):
        assert not any(table.title.startswith("partial") for table in tables(run(*whole(), **facts)))
    short = tables(run(*whole()[:3], **EXPECTED, finished="now"))[0]
    assert short.title == "partial: this run ended before all was measured"


# speed


def timing(method="m", width=8, length=1024, rounds=4, path="m/triton", **more):
    seconds = {"seconds": [0.2] * rounds, "baseline_seconds": [0.1] * rounds}
    where = {"cache": "kvsuite.cache.layer.LayerCache/triton", "checked": 0.5, "path": path}
    return Timing(method, width=width, length=length, tokens=8, **where | seconds | more)


GPU = {"environment": ENVIRONMENT | {"gpu": "a GPU"}}


def test_a_cell_that_failed_or_is_missing_is_no_absent_one():
    failed = timing("other", status="failed", error="it broke", seconds=[], baseline_seconds=[])
    found = run([timing("full"), timing(), failed], **GPU, expected={"timings": 3}, finished="now")
    assert [row[1] for row in drawn(found)["decode"].rows] == ["40", "0.50 (0.50–0.50)", "0.50 (0.50–0.50)", "FAILED"]
    assert (verdict(found, "m", "speed"), verdict(found, "other", "speed")) == (HARMFUL, "FAILED")
    found = run([timing("full"), timing()], **GPU, expected={"timings": 4})
    rows = {row[0]: row[1] for row in drawn(found)["decode"].rows}
    assert (rows["jitter, ×"], rows["other, ×"]) == ("missing", "missing")
    assert "MISSING: 2 of the 4 cells that this run was to time." in drawn(found)["decode"].notes
    assert verdict(found, "other", "speed") == "missing"
    assert markdown.render(analyse(found)).count("MISSING: 2 of the 4 cells") == 2, "above every timed cell, too"


def test_full_has_the_speed_of_its_rounds_beside_a_method_that_was_chosen_alone():
    """As under ``-k m``; its own cell, where there is one, goes before."""
    alone = run([timing(), timing("other")], **GPU, expected={"timings": 2}, finished="now")
    assert drawn(alone)["decode"].rows[0] == ["full, tok/s", "80"]
    beside = run([timing("full"), timing()], **GPU)
    assert drawn(beside)["decode"].rows[0] == ["full, tok/s", "40"]
    nothing = timing(status="failed", error="out of memory", seconds=[], baseline_seconds=[])
    assert drawn(run([nothing], **GPU))["decode"].rows[0] == ["full, tok/s", "-"]


def test_a_verdict_on_speed_is_of_the_largest_cell_or_none():
    small = [timing("full", length=512), timing(length=512)]
    assert verdict(run(small, **GPU, expected={"timings": 2}, finished="now"), "m", "speed") == HARMFUL, (
        "asked for by -k"
    )
    found = run(small, **GPU, expected={"timings": 4})
    assert verdict(found, "m", "speed") == "partial 2/4"
    assert verdict(run(small, **GPU, expected={}), "m", "speed") == "partial", "how many there were to be is not said"
    assert any("as a multiple, at batch 8, 512 tokens." in note for note in drawn(found)["verdicts"].notes)
    failed = [replace(t, length=1024, status="failed", error="out of memory", seconds=[]) for t in small]
    assert verdict(run(small, failed, **GPU), "m", "speed") == HARMFUL
    assert speeds(run([timing(path="m/unfused")]), Margins()).effects == []
