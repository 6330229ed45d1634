"""``kvsuite init``: the configuration and the CI of a project that uses kvsuite."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from kvsuite import disk
from kvsuite.errors import UsageError

CI = {"github": ".github/workflows/kvsuite.yml", "gitlab": ".gitlab-ci.yml"}
"""Where each kind of CI looks for its file."""
SETTINGS = ("pytest.toml", ".pytest.toml", "pytest.ini", ".pytest.ini", "pyproject.toml", "tox.ini", "setup.cfg")
"""Files that may hold settings of pytest, which reads the first: a new one would hide them, or they it."""
NEXT = 'kvsuite run "throughput or length or samples"'


def init(folder: Path, ci: str) -> list[str]:
    """Write what is not there yet; nothing is overwritten. ``ci`` is a key of `CI`, or none. Returns sentences: what
    was written, and what is to be added by hand. Raises UsageError where nothing can be written."""
    said = [_configure(folder)]
    if ci in CI:
        said.append(_add_ci(folder, CI[ci], _template(f"{ci}.yml")))
    return [*said, f"next: {NEXT}"]


def _configure(folder: Path) -> str:
    name = next((name for name in SETTINGS if (folder / name).exists()), None)
    if name is None:
        return _write(folder, "pyproject.toml", _template("pyproject.toml"))
    text = (folder / name).read_text(encoding="utf-8", errors="replace")
    if "kv_suites" in text:
        return f"{name} has kv_suites already"
    where = "[tool.pytest]" if "[tool.pytest]" in text else "[tool.pytest.ini_options]"
    where = where if name == "pyproject.toml" else "its settings of pytest"
    return f"{name} is there and stays as it is; for pytest -m samples to work add to {where}: kv_suites = true"


def _add_ci(folder: Path, name: str, text: str) -> str:
    if not (folder / name).exists():
        return _write(folder, name, text)
    if (folder / name).read_text(encoding="utf-8", errors="replace") == text:
        return f"{name} is there already"
    return f"{name} is there and stays as it is; add to it:\n\n{text}"


def _write(folder: Path, name: str, text: str) -> str:
    file = folder / name
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        disk.write(file, text)
    except OSError as error:
        raise UsageError(f"{name} cannot be written: {error.strerror}") from error
    return f"wrote {name}"


def _template(name: str) -> str:
    return (resources.files("kvsuite") / "templates" / name).read_text(encoding="utf-8")
