"""The keeper of one server: it ends the server, and all that the server started, once its client is gone.

`Process` runs this file by its path, so that only the standard library is imported. Its standard input is a pipe from
the client: a number there is an order to stop, with so many seconds between SIGTERM and SIGKILL; the pipe's end says
that the client is gone. Its standard error is the server's log. It exits with the server's code, as a shell gives it.

On Linux it runs twice, as parent and child, and both adopt the orphans below them. So no process of the server can
leave the family, whatever session it moves to, and if one of the two keepers is killed the other one ends everything.
Elsewhere it runs once and reaches the server's process group only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict

LINUX = sys.platform == "linux"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LONGEST = 40
"""Characters of a temporary directory: a socket's path has about 100, and servers call theirs by a UUID or two."""
TICK = 0.1
"""Seconds between two looks at what gives no event: a signal, and a child's end in an old kernel."""
TIDYING = 1.0
"""Seconds that Python's resource trackers get after the others were killed, to free the shared memory those had."""

asked: list[int] = []
"""The signals that told this keeper to stop."""
ended: dict[int, int] = {}
"""Exit codes of children, by process id; the first to have an id counts."""


def main(grace: float, command: list[str]) -> int:
    """Run the command until it ends or shall end, and return its code. ``grace``: seconds, where nobody says others."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _: asked.append(received))
    client = _end(os.getppid())
    usual = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="kv-", dir=usual if len(usual) <= LONGEST else "/tmp")
    inner = os.fork() if LINUX else 0
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    if inner:
        code = _keep(inner, [], grace + 2 * TIDYING)  # told to stop, both do: the inner one is to be done before
    else:
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        try:
            server = _launch(command, folder)
        except OSError as error:
            print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr)
            code = 127
        else:
            code = _keep(server, [0, *client], grace)
    shutil.rmtree(folder, ignore_errors=True)
    return code


def _end(pid: int) -> list[int]:
    """A file that becomes readable when the process ends; none where the kernel has no such thing. The pipe alone would
    not do: whatever the client forked without a new program holds it open too."""
    try:
        return [os.pidfd_open(pid)]
    except (AttributeError, OSError):
        return []


def _prctl(option: int, value: int) -> None:
    if LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _launch(command: list[str], folder: str) -> int:
    """Start the server in a process group of its own; SIGTERM reaches it even where both keepers are killed."""
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2,
        stderr=2,
        env={**os.environ, "TMPDIR": folder},
        process_group=0,
        preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
    )
    server.returncode = 0  # else this object's end could collect the exit code, which is for `_reap`
    return server.pid


def _keep(child: int, sources: list[int], grace: float) -> int:
    """Wait for the child's end or a reason to end it, end what is left, and return the child's code."""
    _clear(child, _watch(child, sources, grace))
    return ended[child] if ended[child] >= 0 else 128 - ended[child]


def _watch(child: int, sources: list[int], grace: float) -> float:
    """Wait until the child has ended or shall end; return the seconds that the family then has."""
    sources = sources + _end(child)
    while not asked and _reap() and child not in ended:
        ready, _, _ = select.select(sources, [], [], TICK)
        if 0 in ready:
            return float(os.read(0, 64) or grace)
        if ready:
            return grace
    return grace


def _clear(group: int, grace: float) -> None:
    """SIGTERM to all of the family, SIGKILL to what is left after ``grace`` seconds; returns when nothing is left."""
    told: set[int] = set()
    deadline = time.monotonic() + grace
    while True:
        children, family = _reap(), _family(group)
        if not children and not family:
            return
        late = time.monotonic() - deadline
        for pid in family:
            with contextlib.suppress(OSError):
                if late > TIDYING or (late > 0 and not _tidies(pid)):
                    os.kill(pid, signal.SIGKILL)
                elif pid not in told:  # a second SIGTERM makes some servers leave at once
                    os.kill(pid, signal.SIGTERM)
        told.update(family)
        time.sleep(TICK / 5 if late < 10 else 10 * TICK)  # what hangs in a driver may stay for hours


def _reap() -> bool:
    """Collect the children that have ended; whether there are others. On Linux none means that the family is extinct,
    since orphans become children: a list of /proc alone could miss a process that was forked meanwhile."""
    try:
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            ended.setdefault(found[0], os.waitstatus_to_exitcode(found[1]))
    except ChildProcessError:
        return False
    return True


def _family(group: int) -> list[int]:
    """What to signal: every process below this one; without /proc, the group (negative) while it has members."""
    if not LINUX:
        with contextlib.suppress(OSError):
            os.kill(-group, 0)
            return [-group]
        return []
    children = defaultdict(list)
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            parent = file.read().rpartition(b")")[2].split()[1]  # a program's name may hold anything, brackets too
            children[int(parent)].append(int(name))
    found = [os.getpid()]
    for pid in found:
        found += children[pid]
    return found[1:]


def _tidies(pid: int) -> bool:
    """Whether this is a resource tracker of Python, which ends by itself when those it serves have."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        return b"resource_tracker" in file.read()
    return False


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
