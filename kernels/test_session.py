"""The GPU session, without a GPU: every line of it but CUDA's own calls has run before it gets to one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from suites.checks.depth import only_nightly

HERE = Path(__file__).parent
SECTIONS = {"copy", "libraries", "decode", "h2o", "ragged", "step", "graph", "append", "fill", "prefill mass", "sweep"}


@only_nightly
def test_the_whole_session_on_tiny_shapes(tmp_path):
    environment = {**os.environ, "TINY": "1", "PYTHON": sys.executable}
    command = ["bash", str(HERE / "gpu_session.sh"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in (tmp_path / "tests.txt").read_text()
    data = json.loads((tmp_path / "kernels.json").read_text())
    assert list(data["cells"]) == data["plan"]
    assert {cell["section"] for cell in data["cells"].values() if cell["state"] == "done"} == SECTIONS
    assert not [key for key, cell in data["cells"].items() if cell["state"] == "failed"]
    report = (tmp_path / "kernels.md").read_text()
    assert "times mean nothing" in report.splitlines()[0]
    assert report.count("\n## ") == 9
    assert not [word for word in (" met |", "missed") if word in report]


@pytest.fixture
def session(monkeypatch):
    """The script as a module."""
    monkeypatch.setattr(sys, "path", [str(HERE), *sys.path])
    spec = importlib.util.spec_from_file_location("session", HERE / "session.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_cell_of_every_section_runs(session, tmp_path, monkeypatch):
    whole = session.Bench.plan
    monkeypatch.setattr(session.Bench, "plan", lambda bench: [*{c.section: c for c in whole(bench)[::-1]}.values()])
    assert session.main(["--tiny", "--out", str(tmp_path)]) == 0
    cells = json.loads((tmp_path / "kernels.json").read_text())["cells"].values()
    assert {cell["section"]: cell["state"] for cell in cells} == dict.fromkeys(SECTIONS, "done")


def test_a_cell_that_throws_is_recorded_and_the_others_go_on(session, tmp_path, monkeypatch, capsys):
    def throws():
        raise ValueError("the reason")

    def plan(bench):
        cells = {"a": dict, "b": throws, "c": dict}
        return [session.Cell("made up", name, run) for name, run in cells.items()]

    monkeypatch.setattr(session.Bench, "plan", plan)
    assert session.main(["--tiny", "--out", str(tmp_path)]) == 1
    cells = json.loads((tmp_path / "kernels.json").read_text())["cells"]
    assert [cell["state"] for cell in cells.values()] == ["done", "failed", "done"]
    assert cells["made up: b"]["message"] == "ValueError: the reason"
    assert "made up: b: failed, ValueError: the reason" in (tmp_path / "kernels.md").read_text()
    assert "1 failed of 3" in capsys.readouterr().out


def test_a_spent_budget_is_said_and_what_is_wrong_is_not_timed(session, tmp_path, monkeypatch):
    whole = session.Bench.plan
    monkeypatch.setattr(session.Bench, "plan", lambda bench: whole(bench)[:3])
    arguments = ["--tiny", "--out", str(tmp_path)]
    assert session.main([*arguments, "--minutes", "0"]) == 0
    late = "**Not measured for lack of time** (3): copy: device to device; libraries: 1 × 64; decode: full, 1 × 64"
    assert late in (tmp_path / "kernels.md").read_text()

    monkeypatch.setattr(sys.modules["session_inputs"].kernels, "attend", lambda kv, q, *rest: 1.05 * q)
    assert session.main([*arguments, "--resume"]) == 1
    cells = json.loads((tmp_path / "kernels.json").read_text())["cells"]
    assert [cell["state"] for cell in cells.values()] == ["done", "done", "failed"]
    assert "Wrong: output is wrong by" in cells["decode: full, 1 × 64"]["message"]
    assert "us" not in cells["decode: full, 1 × 64"]["result"]
