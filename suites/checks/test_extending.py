"""docs/add-a-method.md and docs/extending.md are followed as a newcomer would: files are written, commands run."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from kvsuite.methods import component
from kvsuite.records import read
from suites.checks import forked
from suites.checks.table import ELSEWHERE, METHODS
from suites.checks.tiny import ROOT, SMALL

PAGES = "".join((ROOT / "docs" / page).read_text() for page in ("add-a-method.md", "extending.md"))
FILES = dict(re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", PAGES, re.DOTALL))
COMMANDS = [line.strip() for line in PAGES.splitlines() if re.match(r"    (pytest|kvsuite|printf) ", line)]
SAID = {
    "every-other,": "every-other:recent=8",
    "kvsuite methods": "every-other",
    "sums.py": "sums",
    "printf": "",
    "lines.py": "mine",
    "methods loud": "loud:budget=0.5",
    "methods codebook": "codebook",
    "loudest.py": "most to lose: ",
}


@pytest.fixture
def folder(tmp_path, go):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_pages_have_the_files_and_commands_that_are_checked():
    assert sorted(FILES) == ["codebook.py", "every_other.py", "lines.py", "loud.py", "loudest.py", "sums.py"]
    assert [sum(key in command for command in COMMANDS) for key in SAID] == [1] * len(SAID) == [1] * len(COMMANDS)


def test_every_command_of_the_pages_runs(folder, world):
    small = [*SMALL, "--kv-model", str(world / "model"), "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    for at, command in enumerate(COMMANDS):
        if command.startswith("pytest"):
            own = [*shlex.split(command)[1:], "--kv-run", f"runs/{at}", str(ROOT / "suites" / "samples")]
            installed = [ROOT / "docs" / "examples", ROOT / "suites" / "checks" / "plugin"]  # their entry points
            path = os.pathsep.join([os.environ["PYTHONPATH"], *map(str, installed)])
            ran = forked.run([*small, *own], folder, PYTHONPATH=path)
            code, told = ran.ret, "\n".join([*ran.outlines, *ran.errlines])
        else:
            words = command.replace("kvsuite", f"{sys.executable} -m kvsuite", 1)
            options = {"cwd": folder, "capture_output": True, "text": True, "check": False}
            ran = subprocess.run(words, shell=True, **options)  # noqa: S602  (as a page says it is typed)
            code, told = ran.returncode, ran.stdout + ran.stderr
        assert code == 0, (command, told[-3000:])
        [said] = [said for key, said in SAID.items() if key in command]
        assert said in " ".join(told.split()), (command, told[-3000:])
    runs = [read(run).facts["plugins"] for run in sorted((folder / "runs").iterdir())]
    assert [[*plugins] for plugins in runs] == [["every_other.py"], [], [], ["sums.py"], ["loudest.py"]]


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "examples").glob("*.py")), ids=lambda file: file.name)
def test_the_pages_methods_are_the_files_that_are_checked_as_entry_points(file):
    """What they promise `table.py` and what it names check."""
    assert FILES[file.name] == file.read_text()
    assert len(file.read_text().splitlines()) <= 60
    assert component(file.stem).__module__ == file.stem
    assert file.stem in {*METHODS, *ELSEWHERE}
