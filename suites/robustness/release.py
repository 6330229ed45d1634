"""What a release consists of: ``python -m suites.robustness.release FOLDER`` builds what is committed and leaves the
wheel and the sdist in the folder; beside it ``requirements.txt``, what they need today, and ``sbom.json``, the same as
CycloneDX has it. Who builds the same commit gets the same bytes. ``tox -e release`` installs what it needs."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHON = [sys.executable, "-m"]
BACKEND = "setuptools==84.2.1"
"""A wheel names the version that made it."""
DEPENDENCIES = f"{ROOT}[client,local]"


def built(into: Path, **more: str) -> list[str]:
    """Wheel and sdist; a line of each, its sha256 and its name."""
    os.umask(0o022)  # archives keep the modes of files
    with tempfile.TemporaryDirectory() as name:
        clone, pins = Path(name) / "clone", Path(name) / "pins.txt"
        run("git", "clone", "--quiet", ROOT, clone)
        when = run("git", "-C", clone, "log", "-1", "--format=%ct").strip()
        pins.write_text(BACKEND)
        settings = {"SOURCE_DATE_EPOCH": when, "PIP_CONSTRAINT": str(pins), **more}
        run(*PYTHON, "build", "--outdir", into.absolute(), clone, **settings)
    repack(next(into.glob("*.tar.gz")), int(when))
    return [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in sorted(into.iterdir())]


def repack(sdist: Path, when: int) -> None:
    """Give its members one time, owner and order, which setuptools takes from the machine."""
    made = io.BytesIO()
    with (
        tarfile.open(sdist) as old,
        gzip.GzipFile("", "wb", 9, made, when) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            member.uid, member.gid, member.uname, member.gname, member.mtime = 0, 0, "", "", when
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    sdist.write_bytes(made.getvalue())


def needed(here: Path) -> int:
    """Write ``requirements.txt`` and ``sbom.json``: what pip would install today, with hashes. How many they are."""
    report, wanted, sbom = here / "report.json", here / "requirements.txt", here / "sbom.json"
    words = ["--dry-run", "--ignore-installed", "--report", report, "--constraint", ROOT / "constraints.txt"]
    run(*PYTHON, "pip", "install", *words, DEPENDENCIES)
    found = {x["metadata"]["name"]: x for x in json.loads(report.read_text())["install"]}
    report.unlink()
    pins = [
        f"{name}=={x['metadata']['version']} --hash=sha256:{x['download_info']['archive_info']['hashes']['sha256']}\n"
        for name, x in sorted(found.items())
        if name != "kvsuite"
    ]
    wanted.write_text("".join(pins))
    words = ["--pyproject", ROOT / "pyproject.toml", "--mc-type", "library", "--output-reproducible", "-o", sbom]
    run(*PYTHON, "cyclonedx_py", "requirements", *words, wanted)
    return len(json.loads(sbom.read_text())["components"])


def run(*words: object, fine: Collection[int] = (0,), **more: str) -> str:
    """What a command prints. Raises RuntimeError where it fails."""
    done = subprocess.run([str(x) for x in words], capture_output=True, text=True, check=False, env=os.environ | more)
    if done.returncode not in fine:
        raise RuntimeError(f"{words}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(*built(folder), f"SBOM: {needed(folder.parent)} components", sep="\n")
