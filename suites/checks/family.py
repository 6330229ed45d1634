"""Servers for the checks of `Process`, a client that starts them, and who is left of them: asked by an environment
variable that all processes of a test inherit, not by the ancestry that the code under test follows."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from kvsuite.engines import process

PYTHON = (sys.executable, "-I", "-S", "-c")

SERVER = (  # its words: what it does; it says "ready" when all of it runs
    *PYTHON,
    """
import os, signal, socket, sys, time
port, *words = sys.argv[1:]
if "stubborn" in words:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "daemon" in words and not os.fork():  # an orphan in a session of its own that ignores SIGTERM
    os.setsid()
    if os.fork():
        os._exit(0)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("daemon", flush=True)
    time.sleep(60)
if "child" in words and not os.fork():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
if "shared" in words:
    from multiprocessing.shared_memory import SharedMemory
    memory = SharedMemory("kv-" + port, create=True, size=64)
listening = socket.create_server(("127.0.0.1", int(port)))
socket.socket(socket.AF_UNIX).bind(os.environ["TMPDIR"] + "/" + "u" * 60)
print("folder", os.environ["TMPDIR"], flush=True)
print("ready", flush=True)
time.sleep(60)
""",
)

CLIENT = """
import contextlib, json, os, sys, time
from pathlib import Path
from kvsuite.engines import process

process.ABANDONED, process.UNKILLABLE = 0.3, 5
with contextlib.ExitStack() as stack:
    for log, command in json.loads(sys.argv[1]):
        stack.enter_context(process.Process(command, Path(log)))
        while "ready" not in Path(log).read_text():
            time.sleep(0.01)
    if "fork" in sys.argv and not os.fork():
        time.sleep(60)
    print("up", flush=True)
    time.sleep(60)
"""


class Family:
    """All processes of one test, and the folder for their temporary ones."""

    def __init__(self, folder):
        self.mark = f"KV_TEST_FAMILY={folder}"
        self.env = {"KV_TEST_FAMILY": folder, "TMPDIR": folder}

    def left(self, *without):
        """Process ids. A zombie has no environment, so it does not count."""
        found = []
        for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
            with contextlib.suppress(OSError):
                environment = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
                if self.mark in environment and pid not in without:
                    found.append(pid)
        return found

    def keepers(self, server):
        """The two keepers' ids, the outer one first."""
        outer = server._keeper.pid
        stats = {pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.left()}
        (inner,) = (pid for pid, (_, parent, *_) in stats.items() if int(parent) == outer)
        return outer, inner

    def kill(self):
        """All that is left, also where a test failed."""
        while left := self.left():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)


def until(done, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def folder(text):
    return Path(text.partition("folder ")[2].split()[0])


def is_free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def timed(act, *arguments):
    start = time.monotonic()
    act(*arguments)
    return time.monotonic() - start


def start_client(family, tmp_path, commands, *words):
    """A process that runs a server for each command, all of them ready; and the servers' temporary directories."""
    logs = [tmp_path / f"{i}.log" for i in range(len(commands))]
    given = json.dumps([[str(log), command] for log, command in zip(logs, commands, strict=True)])
    root = str(Path(process.__file__).parents[2])
    client = subprocess.Popen(
        [sys.executable, "-c", CLIENT, given, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **family.env, "PYTHONPATH": root},
        start_new_session=True,
    )
    assert client.stdout.readline() == b"up\n"
    client.stdout.close()
    return client, [folder(log.read_text()) for log in logs]
