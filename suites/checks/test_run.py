"""Whole runs on a tiny random model: what is left behind, alone, in parallel, and when a cell breaks."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvsuite import disk, tasks
from kvsuite.plugin import options
from kvsuite.plugin.session import Session
from kvsuite.records import Answer, Forced, Timing, read
from suites.checks.table import has_compiler
from suites.checks.tiny import METHODS, left

CLASS = "kvsuite.cache.layer.LayerCache"
SCORED = f"{CLASS}/cpu, {CLASS}/reference" if has_compiler() else f"{CLASS}/reference"
"""KIVI's rows are too short here for the cpu backend."""


def test_a_run_leaves_records_and_a_report(run):
    result = run("throughput or length or samples")
    assert result.ret == 0, result.outlines[-30:]
    names = METHODS.split(",")
    answers, timings = left(Answer), left(Timing)
    for task, extra in (("needle", 0), ("chat", 3)):  # with sampling the baseline answers again
        assert len([a for a in answers if a.task == task]) == 3 * len(names) + extra
    assert {(t.method, t.phase) for t in timings} == {
        *((name, phase) for name in names if name != "jitter" for phase in ("decode", "prefill")),
        ("transformers", "decode"),
    }
    caches = {(t.method, t.cache) for t in timings if t.method != "transformers"}
    assert {(a.method, a.cache) for a in answers if a.method != "jitter"} == caches
    assert {cache for _, cache in caches} == set(SCORED.split(", "))
    assert all(t.checked is not None and t.checked <= 1 for t in timings if t.method != "transformers")
    assert all(len(t.seconds) == len(t.baseline_seconds) == 2 for t in timings)
    facts = read(Path("left")).facts
    assert facts["settings"]["length"] == [256]
    assert len(facts["model"]["fingerprint"]) == 64
    report = Path("left/report.md").read_text()
    assert facts["expected"] == {"samples": {"chat": 3, "document": 3, "needle": 3}, "timings": len(timings)}
    assert "partial" not in report
    for said in (
        "## decode",
        "## prefill",
        "## document",
        "## needle",
        "## chat",
        f"Scored and timed: the same {SCORED}.",
    ):
        assert said in report
    result.stdout.fnmatch_lines(["Scored and timed: the same *", "report: left/report.html*"])


def test_references_are_forced_behind_their_prompts(run, world):
    """Every token of a reference is predicted, with the log probability of one pass over prompt and reference."""
    assert run("samples", "--kv-tasks", "reference:needle,needle", "--kv-methods", "full,int8").ret == 0
    forced = [r for r in left(Answer) if isinstance(r, Forced)]
    assert {(r.method, r.task, r.type) for r in forced} == {
        (method, "reference:needle", "synthetic") for method in ("full", "jitter", "int8")
    }
    assert {len(column) for r in forced for column in (r.kl, r.flips, r.logs)} == {5}, "the digits"
    model, tokenizer = (c.from_pretrained(world / "model") for c in (AutoModelForCausalLM, AutoTokenizer))
    samples = tasks.task("needle").samples(3, [256], 0, lambda text: len(tokenizer(text)["input_ids"]))
    for sample in samples:
        ids = tokenizer(sample.context + sample.question + sample.reference, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logs = model(ids).logits[0].float().log_softmax(-1)[-6:-1]
        expected = logs[range(5), ids[0, -5:]]
        (own,) = (r.logs for r in forced if (r.method, r.sample) == ("full", sample.id))
        assert torch.allclose(torch.tensor(own), expected, atol=0.02)
    report = Path("left/report.md").read_text()
    assert "## reference:needle" in report
    assert "| int8 | reference |" in report
    result = run("samples", "--kv-tasks", "reference:chat", "--kv-run", "other")
    assert "answers to chat have no reference" in "".join(result.errlines)


def test_speed_is_not_timed_beside_other_work(run):
    result = run("throughput", "-n", "1")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*speed is timed alone: run -m throughput without -n*"])
    assert not Path("left").exists()


@pytest.mark.parametrize("parallel", [[], ["-n", "2"]], ids=["serial", "n2"])
def test_a_mistake_is_told_once_and_first(run, parallel):
    result = run("samples", *parallel, "--kv-preset", "smok")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    said = [line for line in result.errlines if line.strip()]
    assert said == ["ERROR: unknown preset 'smok': did you mean 'smoke'? known are paper, smoke, standard"]


BREAKS = {
    "throws": "raise RuntimeError('the kernel refused')",
    "memory": "raise MemoryError('out of memory')",
    "nan": "return (x[:, :, 0] * float('nan')).to(x.dtype),",
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_cell_costs_itself(run, pytester, how):
    pytester.makepyfile(
        breaking=f"""
        import dataclasses
        from kvsuite.methods.codecs import full, int8
        @dataclasses.dataclass(frozen=True)
        class Broken(full.Plain):
            def encode(self, x, fitted):
                {BREAKS[how]}
        int8.Int8.specs = lambda self, layer, artifact=None: (Broken(), Broken())
        """
    )
    result = run("throughput or samples", "-p", "breaking")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    records = left(Answer) + left(Timing)
    assert {r.method for r in records if r.status == "failed"} == {"int8"}
    assert all(r.error for r in records if r.method == "int8")
    assert not [r for r in records if r.method == "int8" and r.status == "ok"]
    assert len([r for r in records if r.method == "full"]) == 3 + 3 + 2
    assert "FAILED int8" in Path("left/report.md").read_text()
    result.stdout.fnmatch_lines(["*FAILED int8*"])


SLOW = """
import time, types
from kvsuite.engines import decoder, timing, worker
from kvsuite.methods.codecs import int8
encode, late = int8.PerToken.encode, []
def slow(self, x, fitted):
    late.append(1)
    return encode(self, x, fitted)
int8.PerToken.encode = slow
clock = types.SimpleNamespace(perf_counter=lambda: time.perf_counter() + len(late))
decoder.time = timing.time = worker.time = clock
def pytest_collection_modifyitems(items):
    for item in items:
        if hasattr(item.module, "time"):
            item.module.time = clock
"""
"""Each time takes a second more by the clock, and nobody waits."""


def test_a_method_far_slower_than_the_baseline_costs_itself(run, pytester):
    pytester.makepyfile(slow=SLOW)
    result = run("throughput or samples", "-p", "slow", "--kv-timeout", "1", "--kv-backend", "reference")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    late = [r for r in left(Answer) + left(Timing) if "TimeoutError: took more than " in r.error]
    assert {r.method for r in late} == {"int8"}
    assert {type(r) for r in late} >= {Answer, Timing}
    assert not [r for r in left(Answer) + left(Timing) if r.method == "full" and r.status == "failed"]


FAILING = """
from kvsuite.engines.transformers import TransformersEngine
def prefill(self, *args):
    raise RuntimeError("this machine cannot")
TransformersEngine.prefill = prefill
"""


@pytest.mark.parametrize("marker", ["samples", "throughput"])
def test_a_baseline_that_fails_at_first_ends_the_run(run, pytester, marker):
    pytester.makepyfile(failing=FAILING)
    result = run(marker, "-p", "failing", "--kv-samples", "7")
    said = "the baseline fails, so nothing can be compared: *this machine cannot"
    result.stdout.fnmatch_lines([f"*{said}*"])
    records = left(Answer) + left(Timing)
    assert len([r for r in records if r.method == "full"]) == 2, "two failures, no more"
    assert "finished" not in read(Path("left")).facts


def test_a_model_that_cannot_be_loaded_ends_the_run(run, pytester):
    pytester.makepyfile(failing="from kvsuite.engines import transformers\ntransformers.compute_dtype = None")
    result = run("samples", "-p", "failing")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["*the model cannot be loaded: TypeError*"])
    assert not [line for line in result.outlines if line.startswith(("FAILED", "ERROR"))]


WARNING = """
import warnings
from kvsuite.cache import adapter
forward = adapter.forward
def warned(*args, **more):
    warnings.warn("this name goes in the next version", FutureWarning)
    return forward(*args, **more)
adapter.forward = warned
"""


def test_a_library_warning_fails_no_evaluation(run, pytester):
    pytester.makepyfile(warned=WARNING)
    result = run("samples", "-p", "warned", "-W", "error")
    assert result.ret == 0
    assert {r.status for r in left(Answer)} == {"ok"}
    result.stdout.fnmatch_lines(["*FutureWarning: this name goes in the next version*"])


INTERRUPTED = """
from kvsuite.plugin.session import Session
record, made = Session.record, []
def until(self, answer):
    record(self, answer)
    made.append(answer)
    if len(made) == 6:
        raise KeyboardInterrupt
Session.record = until
"""


def test_an_interrupted_run_is_partial(run, pytester):
    pytester.makepyfile(interrupted=INTERRUPTED)
    result = run("samples", "-p", "interrupted")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    facts = read(Path("left")).facts
    assert "finished" not in facts
    assert facts["expected"] == {"samples": {"document": 3, "needle": 3}}
    report = Path("left/report.md").read_text()
    assert report.splitlines()[0].endswith("partial: this run was interrupted")
    assert run("samples", "--kv-run", "whole").ret == 0
    assert "finished" in read(Path("whole")).facts
    assert "partial" not in Path("whole/report.md").read_text()


def test_a_comparison_with_benchmarks_that_nobody_saved_is_told(run):
    result = run("throughput", "--benchmark-compare")
    assert result.ret == 0
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    result.stderr.fnmatch_lines(["*Can't compare. No benchmark files*"])


def test_an_interrupted_run_keeps_its_benchmarks(run, pytester):
    pytester.makepyfile(interrupted=INTERRUPTED.replace("== 6", "== 3"))
    result = run("throughput", "-p", "interrupted", "--benchmark-json", "benchmarks.json")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert "INTERNALERROR" not in result.stdout.str() + result.stderr.str()
    assert len(json.loads(Path("benchmarks.json").read_text())["benchmarks"]) == 3
    assert "speed: 3 of 7 timed cells" in Path("left/report.md").read_text()


def test_a_run_says_what_computes_and_what_is_stored(run):
    assert run("samples", "--kv-dtype", "float32").ret == 0
    where = read(Path("left")).facts["environment"]
    assert (where["compute_dtype"], where["kv_dtype"]) == ("float32", "float32")
    assert where["dtype_reason"].startswith("--kv-dtype float32; weights ")


def test_a_run_is_never_overwritten(run):
    assert run("samples").ret == 0
    result = run("samples")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --kv-run 'left' already holds a run; name another folder, or --kv-resume it"])


def test_a_folder_that_another_process_writes_to_is_refused(run, finished):
    finished("samples", "left")
    for folder, option in (("new", "--kv-run"), ("left", "--kv-resume")):
        Path(folder).mkdir(exist_ok=True)
        with disk.claim(Path(folder)):
            result = run("samples", option, folder)
            assert result.ret == pytest.ExitCode.USAGE_ERROR
            result.stderr.fnmatch_lines([f"ERROR: another process writes its run into '{folder}'"])
        assert Path(folder).is_dir(), "it is the other one's"
        assert run("samples", option, folder).ret == 0


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    sessions = [Session(options.check({})) for _ in range(3)]
    monkeypatch.setattr(time, "strftime", lambda form: "now")
    for session in sessions:
        session.folder = Path("runs") / time.strftime("")
        session.claim()
    assert [session.folder.name for session in sessions] == ["now", "now-2", "now-3"]
    sessions[1].run.describe({})
    for session in sessions:
        session.release()
    assert [folder.name for folder in Path("runs").iterdir()] == ["now-2"], "what is empty is removed"


THROWS = """
from kvsuite.tasks import needle
score = needle.Needle.score
def throws(self, sample, answer):
    if sample.id.endswith("1"):
        return float("9" * 400) * int(float("9" * 400))
    return score(self, sample, answer)
needle.Needle.score = throws
"""


def test_a_scorer_that_throws_costs_its_answers_alone(run, pytester):
    pytester.makepyfile(throws=THROWS)
    result = run("samples", "-p", "throws")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=4, passed=16)
    needles = [a for a in left(Answer) if a.task == "needle"]
    assert len(needles) == len({a.job for a in needles}) == 12
    for answer in needles:
        throws = answer.sample.endswith("1")
        assert (answer.status, answer.score is None) == (("failed", True) if throws else ("ok", False))
        assert not throws or answer.error.startswith("its score: OverflowError: cannot convert float infinity")
    assert run("samples", "--kv-resume", "left").ret == 0, "what failed is done again"
    assert {a.status for a in left(Answer)} == {"ok"}


def test_gates_are_not_passed_where_there_is_no_report(run, finished):
    finished("samples", "left")
    with Path("left/records.jsonl").open("a") as file:
        file.write(Path("left/records.jsonl").read_text().replace('"schema": 1', '"schema": 99').splitlines()[0] + "\n")
    before = Path("left/records.jsonl").read_text()
    assert run("samples", "--kv-resume", "left").ret == pytest.ExitCode.USAGE_ERROR
    Path("left/records.jsonl").write_text(before.replace('"schema": 99', '"schema": 1'))
    Path("left/report.md").unlink()
    Path("left/report.md").mkdir()  # which cannot be written
    result = run("samples", "--kv-resume", "left")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stdout.fnmatch_lines(["no report of left: *"])


SHAPE = """
from kvsuite import shapes
shapes.SHAPES["tiny"] = shapes.ModelShape(12, 4, 2, 16, 64, 64, 99)
"""
ASKED = ("--kv-model", "shape:tiny:layers=6", "--kv-cells", "2x256,1x300,4000x256", "--kv-memory", "0.1")


def test_a_shape_is_timed_in_every_mode_and_what_does_not_fit_is_a_result(run, pytester):
    pytester.makepyfile(shape=SHAPE)
    chosen = ["-p", "shape", "--kv-methods", "int8", "-k", "decode or transformers", "--kv-modes", "paged,eager"]
    result = run("throughput", *ASKED, *chosen)
    assert result.ret == 0, result.outlines[-30:]
    timings = left(Timing)
    cells = {(2, 256), (1, 300), (4000, 256)}
    assert {(t.method, t.phase, (t.width, t.length)) for t in timings} == {
        (m, phase, cell) for m in ("full", "int8", "transformers") for phase in ("decode", "eager") for cell in cells
    }
    whole, large = ([t for t in timings if (t.width > 2) == over] for over in (False, True))
    for t in large:
        assert (t.status, t.seconds) == ("failed", [])
        assert re.fullmatch(
            r"out of memory: the cache needs [\d.]+ GiB, and 0.10 GiB are left of --kv-memory 0.1", t.error
        )
    for t in whole:
        assert (t.status, t.scale, len(t.rest_seconds)) == ("ok", 2.0, 2)
        assert t.checked is None if t.method == "transformers" else t.checked <= 1
        assert t.method == "transformers" or min(t.moved, t.operations, t.bandwidth, t.rate) > 0
        assert t.cache.endswith("/eager") == (t.phase == "eager" and t.method != "transformers")
    facts = read(Path("left")).facts
    assert facts["model"]["layers"] == [6, 12]
    report = Path("left/report.md").read_text()
    for said in ("## decoding by mode", "OOM", "6 of 12 layers ran", "## capacity", "full, % of the limit"):
        assert said in report


def test_a_shape_answers_nothing(run, pytester):
    pytester.makepyfile(shape=SHAPE)
    result = run("samples or throughput", *ASKED, "-p", "shape")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    [said] = [line for line in result.errlines if line.strip()]
    assert said == (
        "ERROR: --kv-model shape:tiny:layers=6: a shape has random weights, whose answers mean nothing; choose "
        "-m throughput, not samples"
    )


def test_a_cell_that_nobody_timed_is_not_green(run, pytester):
    """However pytest-benchmark came to be off."""
    pytester.makepyfile(off="def pytest_runtest_setup(item): item.config._benchmarksession.disabled = True")
    result = run("throughput", "-p", "off", "-k", "test_decode and int8")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    [timing] = left(Timing)
    assert (timing.status, timing.seconds) == ("failed", [])
    assert timing.error == "RuntimeError: pytest-benchmark did not time it: is it switched off?"
