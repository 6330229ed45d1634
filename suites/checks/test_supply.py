"""What releases come from, in short: `suites/robustness/supply.py` in full."""

import io
import re
import tarfile
import tomllib
from pathlib import Path

import yaml

import kvsuite
from suites.robustness.release import BACKEND, repack

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CI, RELEASE = (yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text()) for name in ("ci", "release"))
ACTION = yaml.safe_load((ROOT / ".github/actions/kvsuite/action.yml").read_text())
JOBS = {**CI["jobs"], **RELEASE["jobs"]}
STEPS = [step for job in JOBS.values() for step in job["steps"]] + ACTION["runs"]["steps"]


def test_the_version_heads_the_changelog():
    first = re.search(
        r"^## (\S+)( \(unreleased\))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert first[1] == kvsuite.__version__
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "kvsuite.__version__"}, "it is in one place"


def test_checks_run_on_every_python_and_system():
    pythons = CI["jobs"]["checks"]["strategy"]["matrix"]["python"]
    assert pythons == ["3.11", "3.12", "3.13", "3.14"]
    assert PROJECT["project"]["requires-python"] == f">={pythons[0]}"
    elsewhere = CI["jobs"]["without-kernels"]["strategy"]["matrix"]
    assert elsewhere == {"system": ["macos-latest", "windows-latest"], "python": [pythons[0], pythons[-1]]}


def test_actions_are_pinned_by_commit():
    used = {step["uses"] for step in STEPS if "uses" in step and not step["uses"].startswith("./")}
    assert len(used) == 6
    assert [name for name in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", name)] == []
    commits = {}
    for name in used:
        commits.setdefault(*name.split("@"))
    assert len(commits) == len(used), "one of each"


def test_a_job_may_what_it_must():
    assert CI["permissions"] == RELEASE["permissions"] == {"contents": "read"}
    more = {name: job["permissions"] for name, job in JOBS.items() if "permissions" in job}
    assert more == {"pypi": {"id-token": "write"}, "page": {"contents": "write"}}
    assert not any("run" in step for step in JOBS["pypi"]["steps"]), "nothing of ours runs where PyPI is trusted"
    assert "secrets." not in str(STEPS)
    assert all(
        step["with"]["persist-credentials"] is False
        for step in STEPS
        if step.get("uses", "").startswith("actions/checkout@")
    )


def test_what_workflows_run_is_in_tox():
    environments = set(re.findall(r"^\[testenv:([\w-]+)\]", (ROOT / "tox.ini").read_text(), re.MULTILINE))
    runs = " ".join(step["run"] for step in STEPS if "run" in step)
    named = {name for names in re.findall(r"tox run -e (\S+)", runs) for name in names.split(",")}
    assert named == {"vllm", "openvino", "portable", "supply", "release"}
    assert named <= environments


def test_what_runs_on_macos_and_windows_is_there():
    section = (ROOT / "tox.ini").read_text().partition("[testenv:portable]")[2].partition("[testenv:")[0]
    files = re.findall(r"suites/\S+", section)
    assert {"suites/checks/test_readers.py", "suites/checks/test_client.py", "suites/checks/test_portable.py"} <= {
        *files
    }
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_an_sdist_does_not_tell_when_and_by_whom_it_was_packed(tmp_path):
    made, when = [], 1_000_000_000
    for at, (owner, order) in enumerate([("one", "xy"), ("another", "yx")]):
        for name in order:
            (tmp_path / name).write_text(name)
        with tarfile.open(tmp_path / f"{at}.tar.gz", "w:gz") as archive:
            for name in order:
                member = archive.gettarinfo(tmp_path / name, f"kvsuite/{name}")
                member.uname, member.uid, member.mtime = owner, at, when + at + 0.25
                archive.addfile(member, io.BytesIO(name.encode()))
        repack(tmp_path / f"{at}.tar.gz", when)
        made.append((tmp_path / f"{at}.tar.gz").read_bytes())
    assert made[0] == made[1]
    with tarfile.open(tmp_path / "0.tar.gz") as archive:
        assert {m.name: (archive.extractfile(m).read(), m.mtime) for m in archive} == {
            "kvsuite/x": (b"x", when), "kvsuite/y": (b"y", when)
        }  # fmt: skip


def test_the_backend_that_is_pinned_is_one_that_may_build():
    name, version = BACKEND.split("==")
    (wanted,) = PROJECT["build-system"]["requires"]
    assert wanted.startswith(f"{name}>=")
    assert int(version.partition(".")[0]) >= int(wanted.partition(">=")[2])
