"""Code of a model runs here: in bubblewrap's namespaces, without network and files, under limits, or not at all.

docs/sandbox.md says what is guaranteed, and what is not.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from kvsuite.errors import UsageError

CPU, WALL = 3, 15
"""Seconds: of the processor, as in HumanEval; and of the clock, on a machine that is busy."""
MEMORY, FILE, FOLDER, DESCRIPTORS = 1 << 30, 1 << 20, 16 << 20, 64
"""Bytes of address space, of one file, of all files; and open files."""
PASSED = 83
"""Exit code of a program that came to its end; one that leaves before has another."""
NOBODY = 65534
RUNNER = f"""
import os, resource, sys
if os.getuid() == 0:
    os.setgroups([])
    os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
    os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
program = sys.stdin.read()
for limit, most in (("CPU", {CPU}), ("AS", {MEMORY}), ("FSIZE", {FILE}), ("NOFILE", {DESCRIPTORS}), ("CORE", 0),
                    ("NPROC", 1), ("MSGQUEUE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + limit), (most, most))
os.dup2(1, 2)
try:
    exec(program, {{}})
except BaseException:
    os._exit(1)
os._exit({PASSED})
"""
"""The limits are set inside the namespaces: processes are counted there, and there are two already. Root becomes nobody
first: the number of processes is not limited for root, whatever its name in a namespace of users. What the program says
of errors is discarded with its output: kvsuite reads bubblewrap's complaints from there, to the end, into memory."""
PROBE = f"""
import os, socket
assert os.getuid() == {NOBODY} and not any(map(os.path.exists, ("/etc", "/proc", "/dev", "/sys")))
for attempt in (os.fork, lambda: socket.create_connection(("127.0.0.1", 9)), lambda: open("/x", "w")):
    try:
        done = attempt()
    except OSError:
        continue
    os._exit(2)
open("x", "w").write("x")
"""
"""Ends well where the sandbox holds."""


def passes(program: str) -> bool:
    """Whether a Python program comes to its end without an exception, within the limits. Raises UsageError, one
    sentence, where the sandbox cannot be made here."""
    check()
    return _run(program)[0] == PASSED


@functools.cache
def check() -> None:
    """Try the sandbox, once. Raises UsageError where it does not hold."""
    lacks = "code of a model is run in a sandbox only, which needs"
    if sys.platform != "linux":
        raise UsageError(f"{lacks} Linux")
    if shutil.which("bwrap") is None:
        raise UsageError(f"{lacks} bubblewrap 0.8 or newer: install your distribution's package bubblewrap")
    code, said = _run(PROBE)
    if code != PASSED:
        raise UsageError(f"{lacks} user namespaces, and it does not hold on this machine: {said or f'code {code}'}")


def _run(program: str) -> tuple[int, str]:
    """Exit code of a program in the sandbox, and the last line of what bubblewrap complains of; -1 where time is up."""
    try:
        done = subprocess.run(
            _command(), input=program.encode(errors="replace"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            timeout=WALL, check=False, cwd="/", env={},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return -1, "it took too long"
    except OSError as error:
        return -1, str(error)
    return done.returncode, done.stderr.decode(errors="replace").strip().rpartition("\n")[2]


def _command() -> list[str]:
    """Nothing is there but the libraries of /usr, Python, and an empty folder in memory."""
    python = Path(os.path.realpath(sys.executable))
    shown = ["--ro-bind", "/usr", "/usr"]
    for folder in map(Path, ("/bin", "/lib", "/lib32", "/lib64")):
        if folder.is_symlink():
            shown += ["--symlink", str(folder.readlink()), str(folder)]
        elif folder.is_dir():
            shown += ["--ro-bind", str(folder), str(folder)]
    if not (base := Path(sys.base_prefix)).is_relative_to("/usr"):
        for parent in reversed(base.parents[:-1]):  # else they are closed to nobody
            shown += ["--perms", "0755", "--dir", str(parent)]
        shown += ["--ro-bind", str(base), str(base)]
    if os.geteuid() == 0:  # see RUNNER
        users = ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--cap-drop", "ALL"]
        users += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        users = ["--unshare-all", "--unshare-user", "--disable-userns", "--cap-drop", "ALL"]
        users += ["--uid", str(NOBODY), "--gid", str(NOBODY)]
    return [
        str(shutil.which("bwrap")), *users, "--die-with-parent", "--new-session", "--clearenv", *shown,
        "--perms", "1777", "--size", str(FOLDER), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/",
        str(python), "-I", "-c", RUNNER,
    ]  # fmt: skip
