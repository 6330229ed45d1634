"""docs/extending.md is followed as a newcomer would: its files are written, its commands run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from suites.checks.tiny import ROOT, SMALL

PAGE = (ROOT / "docs" / "extending.md").read_text()
FILES = dict(re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [line.strip() for line in PAGE.splitlines() if re.match(r"    (pytest|kvsuite|printf) ", line)]
SAID = {
    "every-other,": "every-other:recent=8",
    "kvsuite methods": "every-other",
    "sums.py": "sums",
    "printf": "",
    "lines.py": "mine",
    "loudest.py": "most to lose: ",
}


@pytest.fixture
def folder(tmp_path, go):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_page_has_the_files_and_commands_that_are_checked():
    assert sorted(FILES) == ["every_other.py", "lines.py", "loudest.py", "sums.py"]
    assert [sum(key in command for command in COMMANDS) for key in SAID] == [1] * len(SAID) == [1] * len(COMMANDS)


def test_every_command_of_the_page_runs(folder, world):
    small = [*SMALL, "--kv-model", str(world / "model"), "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    for command in COMMANDS:
        words = command
        if command.startswith("pytest"):
            given = [w for at, w in enumerate(small) if "--kv-methods" not in (w, small[at - 1])]
            words = " ".join([sys.executable, "-m", command, *given, str(ROOT / "suites" / "samples")])
        elif command.startswith("kvsuite"):
            words = f"{sys.executable} -m {command}"
        done = subprocess.run(words, shell=True, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
        [said] = [said for key, said in SAID.items() if key in command]
        assert said in " ".join(done.stdout.split()), (command, done.stdout[-2000:])
    assert Path(folder / "runs").is_dir()
