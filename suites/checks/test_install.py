"""kvsuite as a wheel, far from this checkout: from an empty folder, in a user's project, beside a project that has
nothing to do with it, and with parts from outside."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kvsuite.records import Answer, Timing, read
from suites.checks.depth import depth

ROOT = Path(__file__).parents[2]
PLUGIN = {"kvsuite", "kvsuite.plugin", "kvsuite.plugin.declared", "kvsuite.plugin.hooks", "kvsuite.presets"}
"""What an unrelated project imports."""
SMALL = ["--kv-methods", "int8", "--kv-length", "256", "--kv-samples", "2", "--kv-batch", "2", "--kv-cap", "4"]


@pytest.fixture
def go(installed, world, tmp_path):
    """Run a module in a folder of its own, with the wheel installed and nothing of this checkout in sight."""
    home = tmp_path / "home"
    home.mkdir()
    own = {
        "PYTHONPATH": str(installed), "KVSUITE_CACHE": str(world / "cache"), "OMP_NUM_THREADS": "1", "COLUMNS": "120",
        "HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONDONTWRITEBYTECODE": "",
    }  # fmt: skip

    def run(*words, **more):
        command = [sys.executable, "-m", *words]
        environment = os.environ | own | more
        return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)

    run.home = home
    return run


def told(result):
    return [line for line in result.stderr.splitlines() if line.strip()]


def files(folder):
    """What is in a folder but Python's and pytest's caches, which some settings leave elsewhere or out, and
    pytest-benchmark's empty folder."""
    return {path.name for path in folder.iterdir()} - {"__pycache__", ".benchmarks", ".pytest_cache"}


def collected(result):
    return [line for line in result.stdout.splitlines() if "::" in line]


def test_the_wheel_holds_what_is_imported_and_the_evaluations(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {Path(name) for name in archive.namelist() if ".dist-info/" not in name}
    files = [
        path.relative_to(ROOT) for path in [*ROOT.glob("kvsuite/**/*"), *ROOT.glob("suites/**/*")] if path.is_file()
    ]
    wanted = [
        file
        for file in files
        if "__pycache__" not in file.parts
        and file.parts[1] not in ("checks", "core", "findings", "peers", "robustness")
    ]
    assert found == {Path("kvsuite", file) if file.parts[0] == "suites" else file for file in wanted}
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow a package that transformers imports"


def test_from_an_empty_folder_with_a_model_of_the_hubs_cache(go, world, tmp_path):
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / "abc"
    shutil.copytree(world / "model", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    rows = [{"prompt": f"Say {i}.", "reference": str(i), "id": i} for i in range(4)]
    (go.home / "my prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = ["--kv-model", "org/tiny", "--kv-run", "left", "--kv-tasks", "needle,jsonl:my prompts.jsonl#contains"]
    result = go("kvsuite", "run", "samples", *SMALL, *model, "-v")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    run = read(go.home / "left")
    answers = [r for r in run.records if isinstance(r, Answer)]
    assert {(a.task, a.method) for a in answers} == {
        (task, method) for task in ("needle", "my prompts") for method in ("full", "jitter", "int8")
    }
    assert len(answers) == 2 * 3 * 2
    assert run.facts["model"]["name"] == "tiny"
    assert run.facts["texts"].keys() == {"needle", "my prompts"}
    assert run.facts["settings"]["tasks"] == ["needle", "my prompts#contains"]
    assert "test_samples.py::test_answers[int8-my prompts] PASSED" in result.stdout
    assert "::" not in (go.home / "left" / "records.jsonl").read_text(), "records know nothing of pytest's names"
    assert files(go.home) == {"left", "my prompts.jsonl"}
    assert told(go("kvsuite", "run", "samples", *SMALL, "--kv-model", "org/other")) == [
        "ERROR: 'org/other' is no folder here and cannot be had from Hugging Face's hub (HF_HUB_OFFLINE is set, and it "
        "is not in the cache); run `hf download org/other` where the hub can be reached"
    ]


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ("throughputs", "unknown marker 'throughputs' in -m: did you mean 'throughput'?"),
        ("samples and", "Wrong expression passed to '-m'"),
    ],
)
def test_a_wrong_evaluation_is_told_in_a_sentence(go, marker, said):
    result = go("kvsuite", "run", marker)
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in result.stderr
    assert "Traceback" not in result.stdout + result.stderr


PROJECT = """
[tool.pytest.ini_options]
kv_suites = true
{more}
[tool.kvsuite]
methods = "int8"
length = 256
samples = 2
batch = 2
cap = 4
rounds = 2
model = {model}
run = "left"
"""


@pytest.fixture
def project(go, world):
    """A user's project: a test of its own, and one line for kvsuite's."""
    (go.home / "tests").mkdir()
    (go.home / "tests" / "test_own.py").write_text("def test_own():\n    pass\n")

    def configure(more=""):
        text = PROJECT.format(more=more, model=json.dumps(str(world / "model")))
        (go.home / "pyproject.toml").write_text(text)

    configure()
    go.configure = configure
    return go


def test_one_line_of_configuration_makes_evaluations_work(project):
    result = project("pytest", "-m", "throughput")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    records = read(project.home / "left").records
    assert {(r.method, r.phase) for r in records if isinstance(r, Timing)} == {
        *((method, phase) for method in ("full", "int8") for phase in ("decode", "prefill")),
        ("transformers", "decode"),
    }
    assert "Name (time in" not in result.stdout, "pytest-benchmark's own table says it in other words"


def test_workers_collect_the_evaluations_too(project):
    project.configure('testpaths = ["tests"]')
    result = project("pytest", "-m", "samples or length", "-n", depth("1", "2"), "-k", "test_answers")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    answers = [r for r in read(project.home / "left").records if isinstance(r, Answer)]
    assert {(a.task, a.method) for a in answers} == {
        (task, method) for task in ("document", "needle", "chat") for method in ("full", "jitter", "int8")
    }
    assert len(answers) == 3 * 3 * 2 + 2, "each once, and sampled ones of the baseline once more"


APART = ["", 'testpaths = ["tests"]', 'norecursedirs = ["kvsuite"]']
LAYOUTS = depth(["\n".join(APART)], APART)


def test_evaluations_are_collected_where_they_are_asked_for_and_once(project, installed):
    show = ["pytest", "--collect-only", "-q"]
    wanted = [
        line.rpartition("/")[2] for line in collected(project(*show, "--pyargs", "kvsuite.suites", "-m", "length"))
    ]
    assert len(wanted) > 5
    for more in LAYOUTS:
        project.configure(more)
        assert [x.rpartition("/")[2] for x in collected(project(*show, "-m", "length"))] == wanted
        plain = collected(project(*show))
        assert [x.rpartition("/")[2] for x in plain] == ["test_own.py::test_own"]
    assert collected(project(*show, "tests", "-m", "length")) == [], "who names what is collected gets that"
    project.configure()
    inside = project.home / ".venv" / "lib"
    shutil.copytree(installed, inside)
    (project.home / ".venv" / "pyvenv.cfg").touch()
    found = collected(project(*show, "-m", "length", PYTHONPATH=str(inside)))
    assert [x.rpartition("/")[2] for x in found] == wanted
    assert ".venv" in found[0]
    found = collected(project("kvsuite", "run", "length", "--collect-only", "-q", PYTHONPATH=str(inside)))
    assert [x.rpartition("/")[2] for x in found] == wanted


UNRELATED = """
import pytest

@pytest.fixture
def kv_store():
    return {}

@pytest.mark.length
def test_length(kv_store):
    assert len(kv_store) == 0

@pytest.mark.lengthy
def test_other():
    pass
"""
SPY = """
import sys
from pathlib import Path
def pytest_unconfigure(config):
    Path("modules.txt").write_text(" ".join(m for m in sys.modules if m.partition(".")[0] == "kvsuite"))
"""


WORDS = [["-m", "lengthy"], ["-n", "2"], *depth([], [[], ["-m", "not length"]])]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_an_unrelated_project_notices_nothing(go, words):
    (go.home / "test_unrelated.py").write_text(UNRELATED)
    (go.home / "conftest.py").write_text(SPY)
    (go.home / "pytest.ini").write_text("[pytest]\nmarkers =\n    length: of a list\n")
    command = ["pytest", "-q", "-p", "no:cacheprovider", *words]
    without = go(*command, "-p", "no:kvsuite.plugin")
    assert (go.home / "modules.txt").read_text() == "", "it knew nothing of it"
    result = go(*command)
    assert set((go.home / "modules.txt").read_text().split()) == PLUGIN
    assert result.returncode == without.returncode == 0, result.stdout
    assert re.sub(r"\d+\.\d+s", "", result.stdout) == re.sub(r"\d+\.\d+s", "", without.stdout)
    assert result.stderr == without.stderr == ""
    assert files(go.home) == {"conftest.py", "modules.txt", "pytest.ini", "test_unrelated.py"}


def test_a_marker_of_the_same_name_fetches_nothing(go):
    (go.home / "test_unrelated.py").write_text(UNRELATED)
    result = go("pytest", "-q", "-p", "no:cacheprovider", "-m", "length", KVSUITE_CACHE="/dev/null/nowhere")
    assert result.returncode == 0
    assert result.stdout.splitlines()[0].startswith(".")
    assert files(go.home) == {"test_unrelated.py"}


def test_the_plugin_imports_next_to_nothing(go):
    code = "import sys, pytest; before = set(sys.modules); import kvsuite.plugin; print(*(set(sys.modules) - before))"
    (go.home / "look.py").write_text(code)
    assert set(go("look").stdout.split()) == PLUGIN


def test_what_workers_would_stumble_over_is_told_before_they_start(go):
    (go.home / "test_own.py").write_text(
        "import pytest\n@pytest.mark.samples\ndef test_it(kv_method, kv_session):\n    pass\n"
    )
    result = go("pytest", "-n", "2")
    assert "the evaluation must be known before the workers start: choose it by -m" in result.stdout
    (go.home / "pyproject.toml").write_text("[tool.kvsuite]\nmethods = 'kiwi'\n")
    result = go("pytest", "-n", "2")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert told(result)[0].startswith("ERROR: unknown method 'kiwi': did you mean 'kivi'?")


def test_cells_are_not_timed_without_pytest_benchmark(project):
    result = project("pytest", "-m", "throughput", "-p", "no:benchmark")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert told(result) == [
        "ERROR: cells are timed by pytest-benchmark, which is not there: pip install 'kvsuite[local]', or choose "
        "-m 'samples or length'"
    ]


PARTS = {
    "newest": """
from dataclasses import dataclass
from kvsuite.methods import Selector

@dataclass(frozen=True)
class Newest(Selector):
    name = "newest"
    stores = "the newest tokens"
    source = "test"
    budget: int = 64

    def tokens(self, length):
        return self.budget

    def score(self, seen, tokens):
        import torch

        return torch.arange(seen.k.shape[1]).float().expand(len(seen.k), -1)
""",
    "counting": """
from kvsuite.tasks import Sample, Task

class Counting(Task):
    name = "counting"
    type = "qa"

    def fetch(self):
        return []

    def samples(self, count, lengths, seed, tokens):
        return [Sample(f"counting-{i}", "1 2 3 " * 20, "and then?", "4", 4) for i in range(count)]

    def score(self, sample, answer):
        return float(sample.reference in answer)
""",
    "plain": """
from pathlib import Path
from kvsuite.columns import ArmBuilder

def read(spec, path, which):
    arm = ArmBuilder(spec)
    for at, line in enumerate(Path(path).read_text().split()):
        arm.add(Path(path), "all", at, score=float(line))
    return arm.arm()
""",
    "headline": """
def pytest_kv_report(report, terminalreporter):
    terminalreporter.write_line(f"headline: {len(report.run.records)} records")
""",
}
GROUPS = {"newest": "methods", "counting": "tasks", "plain": "readers", "headline": "reports"}


@pytest.mark.parametrize("how", depth(["entry point"], ["file", "entry point"]))  # by day test_extending has files
def test_parts_from_outside(go, world, installed, how):
    folder = go.home / "outside"
    folder.mkdir()
    for name, text in PARTS.items():
        (folder / f"{name}.py").write_text(text)
    more = {}
    given = [word for name in PARTS for word in ("--kv-plugin", f"outside/{name}.py")]
    if how == "entry point":
        given, more = [], {"PYTHONPATH": os.pathsep.join([str(installed), str(folder)])}
        dist = folder / "outside-1.dist-info"
        dist.mkdir()
        (dist / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1\n")
        points = (f"[kvsuite.{group}]\n{name} = {name}\n" for name, group in GROUPS.items())
        (dist / "entry_points.txt").write_text("".join(points))
    command = ["kvsuite", "run", "samples", *SMALL, "--kv-run", "left", "--kv-model", str(world / "model")]
    command += ["--kv-methods", "newest:budget=32", "--kv-tasks", "counting"]
    result = go(*command, *given, **more)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    run = read(go.home / "left")
    assert {(r.task, r.method) for r in run.records if isinstance(r, Answer)} == {
        ("counting", method) for method in ("full", "jitter", "newest:budget=32")
    }
    assert f"headline: {len(run.records)} records" in result.stdout
    assert run.facts["plugins"].keys() == {f"{name}.py" for name in PARTS if given}
    for name, scores in (("a", "1 1 1 1"), ("b", "1 0 1 0")):
        (go.home / name).write_text(scores)
    asked = ["kvsuite", "negatives", "--baseline", "plain:a", "--candidate", "m=plain:b", "--json", *given]
    assert '"m"' in go(*asked, **more).stdout
    listed = json.loads(go("kvsuite", "methods", "--json", *given, **more).stdout)
    assert "newest" in {row["name"] for row in listed}


def test_a_file_of_the_users_that_does_not_work_is_told(go):
    (go.home / "wrong.py").write_text("import nothing_of_this_name\n")
    (go.home / "taken.py").write_text(PARTS["newest"].replace('"newest"', '"h2o"'))
    for file, said in (
        ("nowhere.py", "--kv-plugin 'nowhere.py' is no Python file"),
        (
            "wrong.py",
            "--kv-plugin 'wrong.py' cannot be imported: ModuleNotFoundError: No module named 'nothing_of_this_name'",
        ),
        ("taken.py", "taken.py: there is a method 'h2o' already; choose another name"),
    ):
        result = go("kvsuite", "run", "samples", "--kv-plugin", file)
        assert result.returncode == pytest.ExitCode.USAGE_ERROR
        (line,) = told(result)
        assert line.endswith(said)
        assert said in go("kvsuite", "methods", "--kv-plugin", file).stderr


def test_the_configuration_file_names_files_beside_itself(go):
    (go.home / "newest.py").write_text(PARTS["newest"])
    (go.home / "pyproject.toml").write_text('[tool.kvsuite]\nplugin = "newest.py"\nmethods = "newest"\n')
    (go.home / "below").mkdir()
    (go.home / "below" / "test_it.py").write_text(
        "import pytest\n@pytest.mark.samples\ndef test_it(kv_method):\n    pass\n"
    )
    found = collected(go("pytest", "--collect-only", "-q", "-m", "samples", "--rootdir", str(go.home), "below"))
    assert [re.search(r"\[(.+)\]", line)[1] for line in found] == ["full", "jitter", "newest"]
