"""Resources that are not there: ``python -m suites.robustness.resources [FAULT …]`` runs a tiny model once for each
fault (or for those named), with what is missing, and goes on by ``--kv-resume`` without the fault. A fault costs one
method's cells, or ends the run with exit code 4 and one sentence; what was recorded before stays. It prints a line a
fault: what was done, what was said, and whether that is right. Folders are mounted for it, which needs root."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from kvsuite.records import Answer, Job, Record, read
from suites.checks import forked, tiny
from suites.checks.test_resume import results, without_times

BEFORE = 4
"""Records that are made before something is missing."""
LOSES = f"""
import resource
from kvsuite.plugin.session import Session
record, made = Session.record, []
def count(self, one):
    record(self, one)
    made.append(one)
    if len(made) == {BEFORE}:
        resource.setrlimit(resource.NAME, (VALUE, VALUE))
Session.record = count
"""
BREAKS = """
import dataclasses, resource, psutil, torch
from kvsuite.methods.codecs import full, int8
from kvsuite.runs.here import Here
@dataclasses.dataclass(frozen=True)
class Broken(full.Plain):
    def encode(self, x, fitted):
        RAISES
int8.Int8.specs = lambda self, layer, artifact=None: (Broken(), Broken())
answers = Here.answers
def limited(*given):
    most = psutil.Process().memory_info().vms + (1 << 31)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return answers(*given)
Here.answers = limited
"""
BROKEN = "int8"
JUMPS = """
import itertools, time
now, jumps = time.time, itertools.cycle([0, 7 * 3600, -5 * 3600])
time.time = lambda: now() + next(jumps)
"""


@contextlib.contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    """A small disk at a place; what it holds in the end stays there."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", place], check=True)
    try:
        yield
    finally:
        kept = place.with_name(f"{place.name}-kept")
        shutil.copytree(place, kept)
        subprocess.run(["umount", place], check=True)
        shutil.copytree(kept, place, dirs_exist_ok=True)
        shutil.rmtree(kept)


@contextlib.contextmanager
def frozen(place: Path) -> Iterator[None]:
    """A folder is read-only, for root, too."""
    subprocess.run(["mount", "--bind", place, place], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
        yield
    finally:
        subprocess.run(["umount", place], check=True)


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is missing in a run: by Python that its process begins with, or by what holds meanwhile, given the world's
    folder and the run's."""

    what: str
    code: int
    says: str = ""
    """Part of what is said of it: of the sentence that ends the run, or of each failed record."""
    plugin: str = ""
    around: Callable[[Path, Path], AbstractContextManager[object]] = lambda world, folder: contextlib.nullcontext()
    cache: str = "cache"
    """The world's folder that is the run's cache."""


FAULTS = {
    "disk": Fault(
        "the run's folder is on a disk of 20 KB", 4, "cannot be written: No space left on device",
        around=lambda world, folder: mounted(folder / "left", "-o", "size=20k"),
    ),
    "file-size": Fault(
        "no file may have more than 6,000 bytes any more", 4, "cannot be written: File too large",
        LOSES.replace("NAME", "RLIMIT_FSIZE").replace("VALUE", "6000"),
    ),
    "descriptors": Fault(
        "no more files may be opened", 4, "cannot be written: Too many open files",
        LOSES.replace("NAME", "RLIMIT_NOFILE").replace("VALUE", "3"),
    ),
    "memory": Fault(
        "a method asks for 64 GB where 2 GB more may be had", 1, "can't allocate memory",
        BREAKS.replace("RAISES", "return torch.ones(1 << 34),"),
    ),
    "gpu-memory": Fault(
        "a method ends in torch.OutOfMemoryError", 1, "CUDA out of memory",
        BREAKS.replace("RAISES", "raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20 GiB.')"),
    ),
    "clock": Fault("time.time() jumps by hours at every look", 0, plugin=JUMPS),
    "read-only": Fault(
        "the cache folder is read-only, and filled", 0, around=lambda world, folder: frozen(world / "cache")
    ),
    "read-only-empty": Fault(
        "the cache folder is read-only, and empty", 4, "cannot be made: Read-only file system",
        around=lambda world, folder: frozen(world / "empty"), cache="empty",
    ),
}  # fmt: skip


def tried(world: Path, folder: Path, fault: Fault, wanted: dict[Job, Record]) -> tuple[str, str]:
    """What was said of a fault, and what is wrong with that; empty where nothing is."""
    folder.mkdir()
    (world / fault.cache).mkdir(exist_ok=True)
    (folder / "fault.py").write_text(fault.plugin)
    with fault.around(world, folder):
        done = _run(world, folder, "-p", "fault", cache=fault.cache)
    there = [record for _, record in sorted(results(folder / "left").items())] if (folder / "left").is_dir() else []
    lost = [record for record in there if record.status == "failed"]
    lines = [*done.outlines, *done.errlines]
    said = next((line.strip("! ") for line in lines if fault.says in line), "") if fault.code == 4 else ""
    said, every = said or (lost[0].error if lost else "nothing"), "\n".join(lines)
    checks = {
        f"exit code {done.ret}": done.ret == fault.code,
        "not said": fault.says in said,
        "Python's own error": "Traceback" not in every and "INTERNALERROR" not in every,
        "another method failed": {record.method for record in lost} == ({BROKEN} if fault.code == 1 else set()),
        "another record than undisturbed": all(r in lost or wanted.get(r.job) == r for r in there),
        "nothing stayed": len(there) >= BEFORE or fault.cache != "cache",
        "a time that cannot be": _timely(folder / "left") if fault.plugin == JUMPS else True,
    }
    if wrong := "; ".join(name for name, right in checks.items() if not right):
        return said, wrong
    file, left = folder / "left/records.jsonl", folder / "left"
    before = file.read_bytes() if file.is_file() else b""
    again = _run(world, folder, how="--kv-resume" if (left / "run.json").is_file() else "--kv-run")
    if again.ret or not file.read_bytes().startswith(before):
        return said, f"not gone on with: exit code {again.ret}"
    whole = {record.job: without_times(record) for record in read(left).records} == wanted
    return said, "" if whole else "in the end there are other records than undisturbed"


def _timely(folder: Path) -> bool:
    """Whether all durations of answers are some seconds."""
    answers = [record for record in read(folder).records if isinstance(record, Answer)]
    return all(0 <= a.prefill_seconds < 600 and 0 <= a.decode_seconds < 600 for a in answers)


def _run(world: Path, folder: Path, *arguments: str, how: str = "--kv-run", cache: str = "cache") -> pytest.RunResult:
    model = [] if cache == "cache" else ["--kv-tasks", "needle"]
    command = tiny.command(world, "samples", *model, *arguments, how, "left")
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        return forked.run(command, folder, **tiny.variables(world, folder) | {"KVSUITE_CACHE": str(world / cache)})


FETCH = """
import shutil, sys, time
from kvsuite import models
from kvsuite.errors import UsageError
def make(source, target):
    time.sleep(float(sys.argv[2]))
    shutil.copytree(source / "small", target)
try:
    models._once("small", models.Package("kvsuite-small", "1.0", sys.argv[1], "MIT", "small/"), make)
except UsageError as error:
    sys.exit(str(error))
"""


class Fetching:
    """Processes that fetch a small package by pip out of a folder into an empty cache."""

    def __init__(self, folder: Path) -> None:
        self.index, self.cache = folder / "index", folder / "cache"
        self.index.mkdir(parents=True)
        self.sha = self.wheel("text")

    def wheel(self, text: str) -> str:
        """Put it into the index. Returns its SHA-256."""
        file, about = self.index / "kvsuite_small-1.0-py3-none-any.whl", "kvsuite_small-1.0.dist-info"
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in {
                "small/a.txt": text,
                f"{about}/METADATA": "Metadata-Version: 2.1\nName: kvsuite-small\nVersion: 1.0\n",
                f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
                f"{about}/RECORD": "",
            }.items():
                archive.writestr(zipfile.ZipInfo(name), content)
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def start(self, seconds: float = 0.0) -> subprocess.Popen[str]:
        """Fetch it, and take so long to make something of it."""
        own = {"KVSUITE_CACHE": str(self.cache), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.index)}
        command = [sys.executable, "-c", FETCH, self.sha, str(seconds)]
        return subprocess.Popen(command, env=os.environ | own, stderr=subprocess.PIPE, text=True)

    def whole(self) -> bool:
        """Whether the cache holds the package and nothing else."""
        file = self.cache / "small-1.0/a.txt"
        return [f.name for f in self.cache.iterdir()] == ["small-1.0"] and file.read_text() == "text"


def shared(fetching: Fetching) -> tuple[str, bool]:
    """Two processes fill the cache folder at once"""
    both = [fetching.start(2.0) for _ in range(2)]
    said = "".join(process.communicate()[1] for process in both)
    once = said.count("downloading") == 1
    return said, once and fetching.whole() and not any(process.returncode for process in both)


def killed(fetching: Fetching) -> tuple[str, bool]:
    """A process that fills the cache folder is killed"""
    first = fetching.start(600.0)
    while not list(fetching.cache.glob(".making-*/source/small")):
        if first.poll() is not None:
            return str(first.communicate()[1]), False
    first.send_signal(signal.SIGKILL)
    first.wait()
    left = len(list(fetching.cache.iterdir()))
    said = fetching.start().communicate()[1]
    return said, left == 1 and fetching.whole()


def download(fetching: Fetching) -> tuple[str, bool]:
    """A download is not what it should be, and then is"""
    fetching.wheel("damaged")
    first = fetching.start()
    said = first.communicate()[1]
    refused = first.returncode == 1 and said.splitlines()[-1].startswith("the wheel of kvsuite-small==1.0 has sha256")
    fetching.wheel("text")
    last = fetching.start()
    return said, refused and "Traceback" not in said + last.communicate()[1] and fetching.whole()


def damaged(fetching: Fetching) -> tuple[str, bool]:
    """A file in the cache folder was changed"""
    fetching.start().communicate()
    (fetching.cache / "small-1.0/a.txt").write_text("tent")
    said = fetching.start().communicate()[1]
    return said, "is damaged and made again" in said and fetching.whole()


def no_room(fetching: Fetching) -> tuple[str, bool]:
    """The cache folder is on a disk of 4 KB, and then on a larger one"""
    with mounted(fetching.cache, "-o", "size=4k,nr_inodes=4"):
        first = fetching.start()
        said = first.communicate()[1]
        empty = not list(fetching.cache.iterdir())
    refused = first.returncode == 1 and said.splitlines()[-1].endswith("cannot be made: No space left on device")
    fetching.start().communicate()
    return said, empty and refused and fetching.whole()


CACHES = {each.__name__.replace("_", "-"): each for each in (shared, killed, download, damaged, no_room)}


def main(argv: Sequence[str]) -> int:
    """Try them; 1 where one was wrong."""
    wrong, wanted = 0, dict[Job, Record]()
    with tempfile.TemporaryDirectory() as name:
        world, asked = Path(name) / "world", [*argv] or [*FAULTS, *CACHES]
        if FAULTS.keys() & {*asked}:
            world.mkdir()
            tiny.made(world)
            (Path(name) / "undisturbed").mkdir()
            assert _run(world, Path(name) / "undisturbed").ret == 0
            wanted = results(Path(name) / "undisturbed/left")
        for chosen in asked:
            if chosen in FAULTS:
                what = FAULTS[chosen].what
                said, bad = tried(world, Path(name) / chosen, FAULTS[chosen], wanted)
            else:
                what = str(CACHES[chosen].__doc__)
                said, right = CACHES[chosen](Fetching(Path(name) / chosen))
                bad = "" if right else "see there"
            wrong += bool(bad)
            last = (said.strip().splitlines() or ["nothing"])[-1].replace(name, "…")
            print(f"{chosen}: {what}. Said: {last[:200]}. {f'WRONG: {bad}' if bad else 'Right'}.", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
