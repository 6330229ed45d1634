"""kvsuite as a wheel, built and installed once for all workers of a run."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory, testrun_uid):
    """The wheel's file."""
    folder = tmp_path_factory.getbasetemp().parent / f"wheel-{testrun_uid}"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            _build(folder)
            (folder / "done").touch()
    return next(folder.glob("*.whl"))


def _build(folder):
    for name in ("kvsuite", "suites"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    _pip("wheel", "--no-build-isolation", "--wheel-dir", folder, folder / "source")
    _pip("install", "--target", folder / "installed", next(folder.glob("*.whl")))


def _pip(command, *arguments):
    words = [sys.executable, "-m", "pip", command, "--no-deps", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(words, check=True)


@pytest.fixture(scope="session")
def installed(wheel):
    """The folder it is installed in."""
    return wheel.parent / "installed"
