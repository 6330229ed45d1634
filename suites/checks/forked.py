"""pytest in processes of its own that need not import torch and transformers: a server has done so, and forks."""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import pytest

SERVER = multiprocessing.get_context("forkserver")
MODELS = ("auto.modeling_auto", "llama.modeling_llama")
SERVER.set_forkserver_preload(
    ["pytest", "torch", "scipy.stats", "statsmodels.api", *(f"transformers.models.{name}" for name in MODELS)]
)


STDOUT, STDERR = "forked-stdout", "forked-stderr"


def start(arguments: list[str], folder: Path, **more: str) -> multiprocessing.Process:
    """``python -m pytest`` in a folder, with this process' environment and ``more``, in a process group of its own.
    What it says goes to files of the folder."""
    process = SERVER.Process(target=_main, args=(arguments, folder, os.environ | more))
    process.start()
    return process


def run(arguments: list[str], folder: Path, **more: str) -> pytest.RunResult:
    """The same, to its end. A signal that ended it is told as by `subprocess`."""
    process = start(arguments, folder, **more)
    process.join()
    files = folder / STDOUT, folder / STDERR
    lines = [file.read_text().splitlines() for file in files]
    for file, texts, stream in zip(files, lines, (sys.stdout, sys.stderr), strict=True):
        file.unlink()
        print(*texts, sep="\n", file=stream)
    return pytest.RunResult(process.exitcode, *lines, duration=0)


def _main(arguments: list[str], folder: Path, environment: dict[str, str]) -> None:
    """In the forked process: become what a shell would have started."""
    os.setpgid(0, 0)
    for name, stream in ((STDOUT, 1), (STDERR, 2)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # asked of the environment anew
    sys.argv = ["pytest", *arguments]
    sys.path[:0] = [str(folder), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    there = "ignore::pytest.PytestAssertRewriteWarning"  # transformers has imported a plugin of pytest, anyio
    sys.exit(pytest.main([*arguments, "-W", there]))
