"""The versions that are tested are those that may be installed."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def parts(version):
    numbers = [int(part) for part in version.split(".")]
    return numbers + [0] * (3 - len(numbers))


def test_the_oldest_versions_are_those_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["local"]]
    oldest = dict(re.fullmatch(r"([\w-]+)>=([\d.]+)", one).groups() for one in wanted)
    lines = [line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if line[0] != "#"]
    pinned = dict(line.split("==") for line in lines)
    assert pinned.keys() == oldest.keys()
    for name, version in oldest.items():
        if name != "torch":
            assert parts(pinned[name]) == parts(version), name
    here = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    assert pinned["torch"] == here["torch"]
