"""pytest in processes of its own that need not import torch and transformers: a server has done so, and forks."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

SERVER = multiprocessing.get_context("forkserver")
MODELS = ("auto.modeling_auto", "llama.modeling_llama")
SERVER.set_forkserver_preload(
    ["pytest", "torch", "scipy.stats", "statsmodels.api", *(f"transformers.models.{name}" for name in MODELS)]
)


def run(arguments: list[str], folder: Path) -> pytest.RunResult:
    """``python -m pytest`` in a folder, with this process' environment. A signal that ended it is told as by
    `subprocess`."""
    out, err = folder / "forked-stdout", folder / "forked-stderr"
    process = SERVER.Process(target=_main, args=(arguments, folder, dict(os.environ), out, err))
    process.start()
    process.join()
    lines = [file.read_text().splitlines() for file in (out, err)]
    for file in (out, err):
        file.unlink()
    for texts, stream in zip(lines, (sys.stdout, sys.stderr), strict=True):
        print(*texts, sep="\n", file=stream)
    return pytest.RunResult(process.exitcode, *lines, duration=0)


def _main(arguments: list[str], folder: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    """In the forked process: become what a shell would have started."""
    for file, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["pytest", *arguments]
    sys.path[:0] = [str(folder), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    there = "ignore::pytest.PytestAssertRewriteWarning"  # transformers has imported a plugin of pytest, anyio
    sys.exit(pytest.main([*arguments, "-W", there]))
