"""What others wrote cannot harm whoever reads it: `suites.robustness.hostile` in short, and what none of ours does."""

import contextlib
import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import kvsuite
from kvsuite import disk
from kvsuite.engines import openvino_model, server
from kvsuite.engines.stream import LARGEST, Events, Failure
from kvsuite.errors import UsageError, printable
from kvsuite.predict import cells, files, length, throughput
from kvsuite.readers import aiconfigurator
from kvsuite.tasks import rows
from suites.checks.depth import depth
from suites.robustness import large
from suites.robustness.hostile import SECONDS, attempt
from suites.robustness.targets import (
    GPU,
    GUIDELLM,
    KERNEL,
    OURS,
    SMALL,
    WEIGHTS,
    Target,
    parquet,
    safetensors,
    targets,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", targets(), ids=lambda target: target.name)
def test_hostile_input_ends_well_or_in_a_sentence(target):
    inputs = max(4, depth(25, 1000) // target.dear)
    found = attempt(target, inputs)
    assert found.inputs >= 1
    assert found.longest <= SECONDS
    assert found.refused < found.inputs or not target.taken, "a valid input is taken"


def _saved(kind):
    return json.dumps({"kind": kind, "kvsuite": kvsuite.__version__}).encode()


NO_NUMBER = {"kv_cache_dtype": "fp8", "m": math.nan}
FOUND = {
    "options": {"baseline": "openvino:kv=f16", "variant": ["a=openvino"], "workload": "x" * 5000},
    "lm-eval": b'{"doc_id": 0, "target": "x", "filter": "none", "metrics": [[]], "acc": 0}\n',
    "guidellm": json.dumps({"benchmarks": [GUIDELLM[0]["benchmarks"][0] | {"start_time": [1.0, 2.0]}]}).encode(),
    "report of records": json.dumps(next(x for x in SMALL if x["kind"] == "answer") | {"task": "\ud800"}).encode(),
    "benchmarks": b'{"benchmarks": null}',
    "throughput predictor": _saved(throughput.KIND),
    "length predictor": _saved(length.KIND),
    "tokenizer.json": b"{}",
    "a GPU's tables": GPU + b"\0\0" + parquet({name: [value] for name, value in (KERNEL | NO_NUMBER).items()}),
    "KVzap weights": safetensors(WEIGHTS[2], 16),
}
"""By place, an input that was let through once."""


@pytest.mark.parametrize("name", FOUND)
def test_what_was_let_through_once_is_not_any_more(name, tmp_path):
    [target] = [target for target in targets() if target.name == name]
    with contextlib.suppress(*OURS):
        target.read(FOUND[name], tmp_path)


LARGE = large.inputs(most=1 << 20, many=10_000)


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("target", [t for t in targets() if t.name not in large.TEXTS], ids=lambda target: target.name)
def test_large_input_is_taken_or_refused(target, name):
    said, seconds, gb = large.tried(target, LARGE[name])
    assert said in ("taken", "refused")
    assert seconds < 5
    assert gb < 0.5


def test_what_large_input_does_is_told(monkeypatch):
    monkeypatch.setattr(large, "SECONDS", 0.1)

    def read(content, _):
        return time.sleep(9) if content == b"slow" else os.kill(os.getpid(), signal.SIGKILL) if content else {}["none"]

    one = Target("one", targets()[0].inputs, read)
    assert large.tried(one, b"slow")[0] == "did not end within 0.2 s"
    monkeypatch.undo()
    assert large.tried(one, b"")[0] == "let through KeyError: 'none'"
    assert large.tried(one, b"a")[0] == f"ended with {-signal.SIGKILL}"


BROKEN = """
from suites.robustness import guided, targets
from hypothesis import strategies as st
targets.targets = lambda: [targets.Target("broken", st.integers(0, 3), lambda given, _: 1 // (given - 2))]
guided.place("broken", 100)
"""


def test_input_that_looks_for_new_code_ends_well_or_in_a_sentence(capsys):
    guided = pytest.importorskip("suites.robustness.guided", exc_type=ImportError)
    assert guided.main(["40", "margins"]) == 0
    assert "40 inputs at 1 places, 0 places wrong" in capsys.readouterr().out
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stdout + done.stderr


NEVER = re.compile(r"trust_remote_code(?!=False)|allow_pickle|torch\.load\(")
"""Libraries' ways to run what is read; ruff knows the others (S in pyproject.toml)."""


def test_no_source_of_a_wheel_runs_what_it_reads():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    moved = told["package-dir"]
    folders = [
        ROOT / name.replace("kvsuite.suites", moved["kvsuite.suites"]).replace(".", "/") for name in told["packages"]
    ]
    sources = [file for folder in folders for file in folder.glob("*.py")]
    assert {file.parent.name for file in sources} > {"kvsuite", "suites", "length", "samples", "throughput", "tools"}
    assert [file for file in sources if NEVER.search(file.read_text())] == []


@pytest.mark.parametrize(
    "source",
    [
        *(
            "import pickle\npickle.loads(x)",
            "import subprocess\nsubprocess.run(x, shell=True)",
            "import os\nos.system(x)",
            "eval(x)",
        ),
        *("exec(x)", "import yaml\nyaml.load(x)", "import marshal\nmarshal.loads(x)"),
    ],
)
@pytest.mark.parametrize("folder", ["kvsuite", "suites/samples"])
def test_lint_finds_what_runs_its_input(source, folder):
    command = ["ruff", "check", "--no-cache", "--stdin-filename", str(ROOT / folder / "a.py"), "-"]
    done = subprocess.run(command, input=f"x = 1\n{source}\n", capture_output=True, text=True, cwd=ROOT)
    assert "S" in {line[0] for line in done.stdout.splitlines() if line[1:2].isdigit()}, done.stdout + done.stderr


def test_an_error_is_one_line_that_no_terminal_takes_for_a_command():
    said = str(UsageError("a\x1b[2J\nb\x9b\u202ec\ud800\0" + "d" * 10_000))
    assert said.isprintable()
    assert said.startswith("a\\x1b[2J b\\x9b\\u202ec\\ud800\\x00ddd")
    assert len(said) < 5000
    assert printable("é\n😀 ×") == "é\n😀 ×"


def test_a_file_is_read_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "LONGEST", 100)
    file = tmp_path / "a"
    file.write_bytes(b"x" * 100 + b"\n" + b"y" * 101)
    found = disk.lines(file)
    assert next(found) == (1, b"x" * 100)
    with pytest.raises(UsageError, match="line 2 has more than 100 bytes"):
        next(found)
    with pytest.raises(UsageError, match="more than 200 bytes"):
        disk.content(file, 200)
    assert len(disk.content(file, 202)) == 202
    with pytest.raises(ValueError, match="nested too deeply"):
        disk.parsed("[" * 100_000)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.csv", cells.read),
        ("a.json", cells.read),
        ("a.json", lambda file: files.read(file, "a", {})),
        ("a.yaml", aiconfigurator._facts),
        ("a.parquet", lambda file: aiconfigurator._products(file)),
    ],
)
def test_a_file_that_is_read_as_a_whole_is_refused_beyond_the_bound(name, read, tmp_path, monkeypatch):
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.setattr(disk.content, "__defaults__", (50,))
    monkeypatch.setattr(disk.text, "__defaults__", (50,))
    monkeypatch.setattr(aiconfigurator, "FACTS", 50)
    (tmp_path / name).write_bytes(b"x" * 51)
    with pytest.raises(UsageError, match="has more than 50 bytes"):
        read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_rows_of_a_dataset_are_refused_beyond_the_bound(name, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LARGEST", 50)
    (tmp_path / name).write_bytes(b"x" * 51)
    with pytest.raises(UsageError, match=r"50 bytes|51 bytes, more than .* 50$"):
        rows.load(rows.Where("d", "c", "s", place=str(tmp_path / name)))


def test_a_line_of_a_dataset_is_refused_beyond_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "LONGEST", 10)
    where = rows.Where("d", "c", "s", place=str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_bytes(b'{"a":1234}\n')
    assert rows.load(where) == [{"a": 1234}]
    (tmp_path / "a.jsonl").write_bytes(b'{"a":12345}\n')
    with pytest.raises(UsageError, match="a line of it has more than 10 bytes"):
        rows.load(where)


def test_a_servers_log_is_read_up_to_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "LARGEST", 10)
    (tmp_path / "log").write_text("before" + "x" * 11)
    one = SimpleNamespace(_process=0, log=tmp_path / "log", _began=6)
    assert server.Server._said(one) == "x" * 10


def test_an_event_is_heard_within_bounds():
    events, piece = Events(), b"x" * (1 << 20)
    events.feed(b"data: ")
    for _ in range(LARGEST // len(piece) - 1):
        assert events.feed(piece) == []
    with pytest.raises(Failure, match="more than 16,777,216 bytes"):
        events.feed(piece)


def test_a_gpus_yaml_merges_nothing(tmp_path):
    """A few lines that merge dicts of merged dicts make billions."""
    (tmp_path / "a.yaml").write_text("gpu: {mem_bw: 1, mem_capacity: 2}")
    assert aiconfigurator._facts(tmp_path / "a.yaml") == {"mem_bw": 1, "mem_capacity": 2, "sm_version": 0}
    (tmp_path / "a.yaml").write_text("gpu: {mem_bw: 1, <<: {mem_capacity: 2}}")
    with pytest.raises(UsageError, match="mem_capacity"):
        aiconfigurator._facts(tmp_path / "a.yaml")


def test_a_text_of_any_length_in_a_gguf_file_takes_no_memory(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62))
    assert openvino_model.shape(tmp_path / "a.gguf") == (None, None)


BOMBS = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from kvsuite.errors import UsageError
from kvsuite.tasks.rows import Where, load
try:
    load(Where("d", "c", "s", "a.zip", "b.jsonl", sys.argv[1]))
except UsageError as error:
    print(error)
"""


def test_a_zip_that_unpacks_to_more_than_there_is_memory_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("b.jsonl", bytes(1 << 20))
    packed = bytearray((tmp_path / "a.zip").read_bytes())
    at = packed.rindex(b"PK\x01\x02") + 24  # where the directory says how many bytes the member has
    packed[at : at + 4] = struct.pack("<I", (1 << 30) + 1)
    (tmp_path / "a.zip").write_bytes(packed)
    done = subprocess.run([sys.executable, "-c", BOMBS, str(tmp_path / "a.zip")], capture_output=True, text=True)
    assert "more than any published file" in done.stdout, done.stderr[-2000:]
