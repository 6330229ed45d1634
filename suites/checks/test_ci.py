"""docs/ci.md: a user's project and its CI, from an empty folder, with kvsuite as a wheel; its steps run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kvsuite import start
from kvsuite.analysis.report import analyse
from kvsuite.errors import UsageError
from kvsuite.records import read
from kvsuite.report import summary
from suites.checks.depth import by_night
from suites.checks.test_install import files, go  # noqa: F401  (a fixture)

ROOT = Path(__file__).parents[2]
SMOKE = ROOT / "reports" / "cpu" / "smoke"
PAGE = (ROOT / "docs" / "ci.md").read_text()
COMMANDS = [shlex.split(line, comments=True) for line in PAGE.splitlines() if line.startswith("    kvsuite ")]
ACTION = yaml.safe_load((ROOT / ".github" / "actions" / "kvsuite" / "action.yml").read_text())
WORKFLOWS = [*ROOT.glob(".github/workflows/*.yml"), ROOT / "kvsuite" / "templates" / "github.yml"]
SMALL = 'methods = "int8"\nlength = 256\nsamples = 2\nbatch = 2\ncap = 4\nrounds = 2\n'


@pytest.fixture
def shell(go, world, tmp_path):  # noqa: F811
    """A step's script as a runner runs it, beside a command kvsuite that is the wheel's."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "kvsuite").write_text(f'#!/bin/sh\nexec {sys.executable} -m kvsuite "$@"\n')
    (binaries / "kvsuite").chmod(0o755)

    def run(script, **more):
        own = {"PATH": f"{binaries}:{os.environ['PATH']}", "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
        (go.home / "step.py").write_text(
            f"import subprocess, sys\nsys.exit(subprocess.call(['bash', '-eo', 'pipefail', '-c', {script!r}]))\n"
        )
        done = go("step", **own, **more)
        (go.home / "step.py").unlink()
        assert done.returncode == 0, (script, done.stdout[-3000:], done.stderr[-2000:])
        return done.stdout

    return run


def scripts(steps):
    return [step["run"] for step in steps if "run" in step and not step["run"].startswith("pip ")]


def test_what_init_prints_runs_and_so_does_the_workflow(go, shell, world, tmp_path):  # noqa: F811
    *wrote, following = go("kvsuite", "init").stdout.splitlines()
    assert wrote == ["wrote pyproject.toml", "wrote .github/workflows/kvsuite.yml"]
    assert files(go.home) == {"pyproject.toml", ".github"}
    with (go.home / "pyproject.toml").open("a") as own:
        own.write(f"{SMALL}model = {json.dumps(str(world / 'model'))}\n")
    shell(following.removeprefix("next: "))
    (left,) = (go.home / "runs").iterdir()
    assert {r.evaluation for r in read(left).records if hasattr(r, "evaluation")} == {"samples", "length", "divergence"}
    made = yaml.safe_load((go.home / ".github" / "workflows" / "kvsuite.yml").read_text())
    steps = scripts(made["jobs"]["kvsuite"]["steps"])
    assert len(steps) == 2
    for script in steps:
        shell(script)
    assert "| int8 | " in (tmp_path / "summary.md").read_text()
    assert (go.home / "runs" / "ci" / "report.md").is_file()


def test_the_action_runs_what_it_is_given(go, shell, world, tmp_path):  # noqa: F811
    for script in scripts(ACTION["runs"]["steps"]):
        given = "--kv-methods 'int8, fp8' --kv-samples 2 --kv-length 256 --kv-cap 4 --kv-tasks needle"
        shell(script, EVALUATION="samples", OPTIONS=f"{given} --kv-model '{world / 'model'}'")
    assert "| fp8 | " in (tmp_path / "summary.md").read_text()
    assert set(read(go.home / "runs" / "ci").facts["methods"]) >= {"full", "int8", "fp8"}


def test_every_command_of_the_page_works(go):  # noqa: F811
    for name in ("ci", "main"):
        shutil.copytree(SMOKE, go.home / "runs" / name)
    assert [words[1] for words in COMMANDS] == ["init", "init", "ci-summary", "ci-summary", "gate", "badges"]
    said = [go(*words) for words in COMMANDS]
    assert [done.returncode for done in said] == [0] * len(COMMANDS), [done.stderr for done in said]
    assert "The same answers in both" in said[3].stdout
    assert "The same answers in both" not in said[2].stdout
    assert files(go.home) == {"runs", "badges", "pyproject.toml", ".github", ".gitlab-ci.yml"}
    for label, message in re.findall(r"`(\S+(?: decode)?) \| (.*?)`", PAGE):
        found = [json.loads(file.read_text()) for file in (go.home / "badges").glob("*.json")]
        assert [b["message"].startswith(f"{message} (") for b in found if b["label"] == label] == [True]


def test_nothing_is_overwritten(tmp_path):
    for name in ("pyproject.toml", ".gitlab-ci.yml"):
        (tmp_path / name).write_text("# mine\n")
    settings, ci, _ = start.init(tmp_path, "gitlab")
    assert settings.endswith("add to [tool.pytest.ini_options]: kv_suites = true")
    assert ci.startswith(".gitlab-ci.yml is there and stays as it is; add to it:")
    assert yaml.safe_load(ci.partition("\n\n")[2])["kvsuite"]["script"]
    assert {file.read_text() for file in tmp_path.iterdir()} == {"# mine\n"}


@pytest.mark.parametrize("name", start.SETTINGS)
def test_settings_that_are_there_are_not_hidden(tmp_path, name):
    (tmp_path / name).touch()
    assert start.init(tmp_path, "none")[0].startswith(f"{name} is there and stays as it is")
    assert [file.name for file in tmp_path.iterdir()] == [name]
    (tmp_path / name).write_text("kv_suites = true")
    assert start.init(tmp_path, "none")[0] == f"{name} has kv_suites already"


def test_twice_is_once_and_what_cannot_be_written_is_told(tmp_path):
    first = start.init(tmp_path, "github")
    assert start.init(tmp_path, "github") == [
        "pyproject.toml has kv_suites already", ".github/workflows/kvsuite.yml is there already", first[-1],
    ]  # fmt: skip
    shutil.rmtree(tmp_path / ".github")
    (tmp_path / ".github").touch()
    with pytest.raises(UsageError, match=r"^\.github/workflows/kvsuite\.yml cannot be written: \w"):
        start.init(tmp_path, "github")


def test_a_summary_tells_what_became_worse(tmp_path):
    shutil.copytree(SMOKE, tmp_path / "later")
    records = tmp_path / "later" / "records.jsonl"
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    for row in rows:
        if row.get("method") == "int8" and row.get("evaluation") == "samples":
            row["score"], row["text"] = 0.0, "nothing"
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before, later = read(SMOKE), analyse(read(tmp_path / "later"))
    said = summary.render(later, before, "https://a.example/(x)")
    assert "Worse (p < 5 % after Holm): int8: quality" in said
    assert "[All tables](<https://a.example/(x)>)" in said
    assert "int8: quality" not in summary.render(later)


def test_a_summary_holds_no_html_of_others(tmp_path):
    shutil.copytree(SMOKE, tmp_path / "run")
    for file in (tmp_path / "run").glob("*.json*"):
        file.write_text(re.sub("(?<![a-z])int4(?![a-z])", "</table><img src=x>|", file.read_text()))
    said = summary.render(analyse(read(tmp_path / "run")), read(tmp_path / "run"))
    assert "| &lt;/table>&lt;img src=x>\\| | damaged: KL +0.071" in said
    assert not re.search(r"<\S", said)


def test_runs_that_cannot_be_compared_cost_the_comparison_only():
    said = summary.render(analyse(read(SMOKE)), read(ROOT / "reports" / "cpu" / "noise"))
    assert "## method by method" in said
    assert "**Not compared with " in said


@pytest.mark.parametrize("run", by_night(sorted(SMOKE.parent.glob("*/run.json"))), ids=lambda file: file.parent.name)
def test_every_kind_of_run_has_a_summary(run):
    said = summary.render(analyse(read(run.parent)))
    assert sum(line.startswith("| ---") for line in said.splitlines()) == 1


def test_what_the_workflow_and_the_action_name_is_there():
    for file in WORKFLOWS:
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            for step in job["steps"]:
                if (uses := step.get("uses", "")).startswith("./"):
                    assert (ROOT / uses / "action.yml").is_file()
                    assert set(step.get("with", {})) <= set(ACTION["inputs"])
    assert set(re.findall(r"inputs\.([\w-]+)", str(ACTION["runs"]))) == set(ACTION["inputs"])


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not here")
@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_actionlint_has_nothing_to_say(file):
    done = subprocess.run(["actionlint", file], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
