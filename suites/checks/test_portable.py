"""Where there is no POSIX: every module imports, what cannot be done there is said in a sentence, and files are written
as they are here. A stand-in for Windows: it has no kernel and no file system of that system."""

import ast
import importlib
import math
import os
import signal
import sys
from pathlib import Path

import pytest

from kvsuite import environment, sandbox
from kvsuite.engines.memory import PeakMemory
from kvsuite.engines.server import Spec
from kvsuite.errors import UsageError
from kvsuite.kernels.cpu import build
from suites.checks import forked

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("kvsuite/**/*.py"))
MODULES = ["fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"]
OF_OS = ["fork", "geteuid", "getuid", "kill", "killpg", "pidfd_open", "sched_getaffinity", "setsid", "sysconf", "uname"]
OF_SIGNAL = ["SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "alarm", "setitimer"]


def without_posix(monkeypatch):
    for name in MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    for name in OF_OS:
        monkeypatch.delattr(os, name, raising=False)
    for name in OF_SIGNAL:
        monkeypatch.delattr(signal, name, raising=False)
    monkeypatch.setattr(sys, "platform", "win32")


def imported(told):
    """In a process of its own: all modules, so that libraries are there, and once more without POSIX. Sends what
    failed."""
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in SOURCES]
    there = [name for name in names if not name.endswith("__main__") and not _failure(name, ModuleNotFoundError)]
    for name in [name for name in sys.modules if name.partition(".")[0] == "kvsuite"]:
        del sys.modules[name]
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_posix(monkeypatch)
        failed = {name: said for name in there if (said := _failure(name, Exception))}
    told.send((len(names), len(there), failed))


def _failure(name, kind):
    try:
        importlib.import_module(name)
    except kind as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_every_module_imports():
    here, there = forked.SERVER.Pipe(duplex=False)
    process = forked.SERVER.Process(target=imported, args=(there,))
    process.start()
    there.close()
    names, tried, failed = here.recv()
    process.join()
    assert failed == {}
    assert names - tried <= 8, "what needs openvino_genai and the like"
    assert tried > 200


def test_what_cannot_be_done_is_said(monkeypatch):
    server = f"{sys.executable} server.py --port {{port}}"
    assert Spec.parse(server).kind == "command"
    without_posix(monkeypatch)
    with pytest.raises(
        UsageError, match=r"^on Windows kvsuite starts no server: start '.*' yourself and name its URL$"
    ):
        Spec.parse(server)
    assert Spec.parse("http://127.0.0.1:8000").kind == "url"
    with pytest.raises(UsageError, match=r"in a sandbox only, which needs Linux$"):
        sandbox.check.__wrapped__()
    monkeypatch.setattr(build.os, "name", "nt")
    with pytest.raises(build.BuildError, match=r"^kernels in C\+\+ are built on Linux and macOS only$"):
        build.executable()


def test_what_the_system_does_not_tell_is_left_open(monkeypatch, tmp_path):
    import torch

    without_posix(monkeypatch)
    monkeypatch.setattr("kvsuite.engines.memory.PROCESS", tmp_path / "proc")
    monkeypatch.setattr(environment, "Path", lambda name: tmp_path / name.lstrip("/"))
    assert environment.cores() == os.cpu_count()
    assert environment.memory() == 16
    assert environment.free_memory() == math.inf
    with PeakMemory(torch.device("cpu")) as peak:
        pass
    assert peak.nbytes is None


def texts(tree):
    """Calls that read or write text, and the keywords that they lack."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        wanted = {"read_text": {"encoding"}, "write_text": {"encoding", "newline"}, "open": {"encoding"}}.get(name)
        given = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        mode = next((x for x in given if set(x) <= set("rwaxbt+")), "r")
        if wanted is None or (name == "open" and "b" in mode) or "devnull" in ast.unparse(call):
            continue
        if isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "os":
            continue  # os.open gives a descriptor
        wanted = wanted | {"newline"} if {*mode} & {*"wax"} else wanted
        yield call.lineno, wanted - {x.arg for x in call.keywords}


@pytest.mark.parametrize(
    ("source", "lacks"),
    [
        ("p.read_text()", {"encoding"}), ("p.write_text(s, encoding='utf-8')", {"newline"}), ("p.open('rb')", None),
        ("open(p, 'w')", {"encoding", "newline"}), ("open(p, encoding='utf-8')", set()), ("os.open(p, 0)", None),
    ],
)  # fmt: skip
def test_such_calls_are_found(source, lacks):
    assert [lack for _, lack in texts(ast.parse(source))] == ([] if lacks is None else [lacks])


def test_texts_have_an_encoding_and_unix_line_ends():
    """Files are the same bytes wherever they are written."""
    lacking = {
        f"{file.relative_to(ROOT)}:{line}": sorted(lacks)
        for file in SOURCES
        for line, lacks in texts(ast.parse(file.read_text(encoding="utf-8")))
        if lacks
    }
    assert lacking == {}
