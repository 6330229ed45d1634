"""A server that kvsuite starts from a command line and that never outlives it, and a free port for one."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from kvsuite.errors import UsageError

KEEPER = (sys.executable, "-I", "-S", str(Path(__file__).with_name("keeper.py")))
"""By its path and isolated: importing the package's neighbours or site-packages would take longer than the rest."""
ABANDONED = 5.0
"""Seconds from SIGTERM to SIGKILL where nobody called `stop`: this process is gone, or the server ended by itself and
left others behind."""
UNKILLABLE = 60.0
"""Seconds after SIGKILL; who is not gone by then hangs in a driver or a file system."""
TAIL, WIDTH = 1 << 20, 400
"""How many bytes of a log's end are read, and how many characters a line may have."""
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
TRACEBACK = "Traceback (most recent call last)"
EXCEPTION = re.compile(r"(?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Exception): .*")
"""How Python prints one under its traceback, behind whatever a logger puts before each line."""


class Process:
    """A program and everything it starts, in whatever session. All of it ends with `stop`, with the ``with`` block,
    when the program ends, and with this process, however that ends: a keeper beside the program sees to it (keeper.py).
    The program gets a temporary directory of its own, which is deleted afterwards."""

    def __init__(self, command: Sequence[str] | str, log: Path, env: Mapping[str, str] | None = None) -> None:
        """``command``: words, or one line with a shell's quotes but without its expansions. What it prints is appended
        to ``log``. ``env`` is added to this process' environment. Raises UsageError for a command without a program."""
        try:
            self.command = shlex.split(command) if isinstance(command, str) else list(command)
        except ValueError as error:
            raise UsageError(f"the command {command!r} cannot be split into words: {error}") from None
        if not self.command:
            raise UsageError("the command that starts a server is empty")
        self.log, self.env = log, {**os.environ, **(env or {})}
        self._keeper: subprocess.Popen[bytes] | None = None
        self._begin = 0

    def start(self) -> None:
        """Start it, without waiting for anything. Raises UsageError where there is no such program, where the log
        cannot be written, and where it runs already."""
        name = self.command[0]
        if self.alive:
            raise UsageError(f"{name} is running already")
        if not shutil.which(name, path=self.env.get("PATH")):
            raise UsageError(f"there is no program {name!r} that could be started")
        self.stop()  # pipes of a former start
        try:
            log = self.log.open("ab")
        except OSError as error:
            raise UsageError(f"the log {self.log} cannot be written: {error.strerror}") from None
        with log:
            self._begin = log.tell()
            self._keeper = subprocess.Popen(
                [*KEEPER, str(ABANDONED), *self.command],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.env,
                start_new_session=True,  # a terminal's Ctrl-C is ours alone
            )

    @property
    def alive(self) -> bool:
        """Whether it was started and something of it is left."""
        return self._keeper is not None and self._keeper.poll() is None

    @property
    def returncode(self) -> int | None:
        """The program's exit code, 128 + signal where one ended it; None while something of it is left. 127 is a
        program that the system refused to run; the log says why. -9 is a killed keeper, which its program follows."""
        return self._keeper.poll() if self._keeper else None

    def tail(self, lines: int = 5) -> str:
        """The last lines it has printed since its start, without empty ones, rulers and colours."""
        return "\n".join(self._told()[-lines:])

    def reason(self) -> str:
        """Why it ended: the exception under the first traceback that it has printed since its start, with up to two
        lines more of it; without one, its last lines. The first is the cause: of several processes that end one after
        another, and of exceptions that are raised from one another."""
        told = self._told()
        first = next((at for at, line in enumerate(told) if TRACEBACK in line), len(told))
        for at, line in enumerate(told[first:], first):
            if found := EXCEPTION.search(line):
                more = itertools.takewhile(lambda line: TRACEBACK not in line, told[at + 1 : at + 3])
                return "\n".join([found[0], *more])
        return self.tail()

    def _told(self) -> list[str]:
        if not self.log.exists():
            return []
        with self.log.open("rb") as log:
            log.seek(max(self._begin, log.seek(0, os.SEEK_END) - TAIL))
            text = COLOUR.sub("", log.read().decode(errors="replace"))
        return [line.strip()[:WIDTH] for line in text.splitlines() if any(map(str.isalnum, line))]

    def stop(self, grace: float = 20.0) -> None:
        """SIGTERM to all of it, SIGKILL to what is left after ``grace`` seconds; returns when nothing is left. Can be
        called at any time and again. Raises RuntimeError where something survives that for a minute."""
        if self._keeper is None:
            return
        order, alive = self._keeper.stdin, self._keeper.stdout
        assert order is not None
        assert alive is not None
        if not order.closed:
            with contextlib.suppress(BrokenPipeError):
                order.write(b"%f" % grace)
            order.close()
        if not alive.closed:  # nothing is ever written there; it ends with the last of the two keepers
            end = select.poll()
            end.register(alive)
            if not end.poll(1000 * (grace + UNKILLABLE)):
                raise RuntimeError(f"{self.command[0]} does not end, not even by SIGKILL")
            alive.close()
        self._keeper.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens at. Let the server have it soon: it is not reserved."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
