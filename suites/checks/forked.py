"""pytest in processes of its own that need not import torch, transformers, pytest's plugins and what kvsuite imports
before it loads a model: a server has done so, and forks."""

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import pytest

from kvsuite import registry

SERVER = multiprocessing.get_context(
    "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
)
MODELS = ("auto.modeling_auto", "auto.tokenization_auto", "llama.modeling_llama")
PLUGINS = ("anyio.pytest_plugin", "hypothesis", "pytest_benchmark.plugin", "xdist.plugin")
OWN = ("kvsuite.plugin.evaluation", "rich.console")  # what `test_plugin` knows to need no torch
LIBRARIES = ("torch", "scipy.stats", "statsmodels.api", *(f"transformers.models.{name}" for name in MODELS))
SERVER.set_forkserver_preload(["pytest", *LIBRARIES, *PLUGINS, *OWN])
PLAIN = "--assert=plain"
"""Asserts are not rewritten, here as in the plugins that are there already: it takes as long as a small run."""


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
    registry.known.cache_clear()  # the server has looked for entry points where it is itself
    sys.exit(pytest.main([*arguments, PLAIN]))
