"""What is read from disk, within bounds, and what is written to it, whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
import shutil
import stat
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kvsuite.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows, where nobody waits and nothing that was left is removed
    fcntl = None  # type: ignore[assignment]

LARGEST = 1 << 29
"""Bytes of a file that is read as a whole. As JSON it can take 47 times as much memory: docs/security.md."""
LONGEST = 1 << 26
"""Bytes of a line. The longest record of a published run has 10,215."""
PATH = 4096
"""Characters of a path that a system takes; patterns are slower the longer they are."""


def content(file: Path, most: int = LARGEST) -> bytes:
    """All of a file. Raises UsageError where it cannot be read or has more bytes than ``most``."""
    try:
        with file.open("rb") as opened:
            found = opened.read(most + 1)
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise UsageError(f"{str(file)!r} cannot be read: {_why(error)}") from error
    if len(found) > most:
        raise UsageError(f"{str(file)!r} has more than {most:,} bytes, which is more than is read here")
    return found


def text(file: Path, most: int = LARGEST) -> str:
    """All of a file in UTF-8, without its byte order mark. Raises UsageError as `content`, and for other bytes."""
    try:
        return content(file, most).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{str(file)!r} cannot be read as UTF-8: {error}") from error


def lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers, from 1, and bytes of the lines that are not blank, one at a time. A line ends with ``\\n`` alone: texts
    hold what Python takes for line ends, too. Raises UsageError where the file cannot be read or a line has more than
    `LONGEST` bytes."""
    try:
        with file.open("rb") as opened:
            for number in itertools.count(1):
                line = opened.readline(LONGEST + 1)
                if not line:
                    return
                if len(line.removesuffix(b"\n")) > LONGEST:
                    raise UsageError(f"{file}: line {number} has more than {LONGEST:,} bytes")
                if line.strip():
                    yield number, line.removesuffix(b"\n")
    except OSError as error:
        raise UsageError(f"{str(file)!r} cannot be read: {_why(error)}") from error


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no number")


_FINITE = json.JSONDecoder(parse_constant=_refused)


def parsed(found: str | bytes, finite: bool = False) -> Any:
    """JSON. Raises ValueError for what is none or is nested too deeply, and, if all is to be ``finite``, for NaN."""
    try:
        return _FINITE.decode(found) if finite and isinstance(found, str) else json.loads(found)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def toml(file: Path) -> dict[str, Any]:
    """A TOML file's table. Raises UsageError as `text`, ValueError for what is none or is nested too deeply."""
    try:
        return tomllib.loads(text(file))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def is_there(file: Path) -> bool:
    """Whether there is such a file or folder; no name is too long or too strange to be asked for."""
    try:
        return file.exists()
    except (OSError, ValueError):
        return False


def is_file(file: Path) -> bool:
    """Whether there is such a file; as `is_there`."""
    return is_there(file) and file.is_file()


def matching(pattern: str) -> list[Path]:
    """What a path or a pattern with ``*``, ``?`` and ``[]`` names, sorted; a name that is there is no pattern."""
    if is_there(Path(pattern)):
        return [Path(pattern)]
    return sorted(map(Path, glob.glob(pattern, recursive=True))) if len(pattern) <= PATH and "\0" not in pattern else []


def write(file: Path, said: str) -> None:
    """Replace a file. Whatever ends this process or the machine meanwhile, it is the old file or the new one. A lone
    surrogate, which UTF-8 cannot hold, is written as its escape. A device or a pipe is written to. Raises OSError."""
    if _is_device(file):
        with file.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as opened:
            opened.write(said)
        return
    unfinished = file.with_name(f"{file.name}.tmp")
    try:
        if os.path.lexists(unfinished):  # of one who was killed, or a link to a file that is not ours
            unfinished.unlink()
        with unfinished.open("x", encoding="utf-8", errors="backslashreplace", newline="\n") as opened:
            opened.write(said)
            opened.flush()
            os.fsync(opened.fileno())
        unfinished.replace(file)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(file)  # which is what was asked for
        raise
    sync(file.parent)


def append(file: Path) -> BinaryIO:
    """A file, opened to be read and appended to. Raises OSError, for a link, too: it may lead to a file that is not
    ours."""

    def opener(path: str, flags: int) -> int:
        return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)

    return open(file, "a+b", opener=opener)


def _is_device(file: Path) -> bool:
    """``/dev/stdout`` is one wherever it leads."""
    try:
        plain = stat.S_ISREG(file.stat().st_mode)
    except OSError:
        plain = True
    return not plain or Path(os.path.abspath(file)).parts[1:2] in (("dev",), ("proc",))


MAKING = ".making-"
"""What the names of folders begin with in which something is made."""


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path]:
    """An empty folder in ``folder``, to make something in that is renamed when it is whole; what is left in it is
    removed. One process at a time makes something there, the others wait: so what a killed one has left can be told,
    and is removed. Where a file system has no locks nobody waits, and that stays. Raises OSError."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            at = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, at)
            with contextlib.suppress(OSError):
                _lock(at, folder)
                for left in folder.glob(f"{MAKING}*"):
                    shutil.rmtree(left, ignore_errors=True)
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=MAKING, ignore_cleanup_errors=True)
        yield Path(stack.enter_context(temporary))


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Hold a folder, which no other process can then hold, while this one lasts. Raises UsageError where another one
    does, OSError where the folder cannot be opened. Where a file system has no locks nobody is refused."""
    if fcntl is None:
        yield
        return
    at = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(at, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"another process writes its run into {str(folder)!r}") from None
        yield
    finally:
        os.close(at)


def _lock(at: int, folder: Path) -> None:
    """Until this process closes it, or ends in whatever way. Raises OSError where there are no locks."""
    try:
        fcntl.flock(at, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process that fills {folder}", file=sys.stderr, flush=True)
        fcntl.flock(at, fcntl.LOCK_EX)


def sync(folder: Path) -> None:
    """Have the names in a folder survive the end of the machine, where its system can be asked to."""
    if os.name == "posix":
        at = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(at)
        finally:
            os.close(at)


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
