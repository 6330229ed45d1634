"""The C++ sources of this folder as libraries: the user's compiler makes them at first use, the cache keeps them."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import hashlib
import itertools
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen, TimeoutExpired

from kvsuite import disk
from kvsuite.models import cache_folder

SOURCES = Path(__file__).parent
FLAGS = "-std=c++17 -O3 -fPIC -shared -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden -w"
"""Floating point is strict otherwise: -ffast-math would switch on flush-to-zero for the whole process."""
NATIVE = ("-march=native", "-mcpu=native", "")
"""The first that the compiler accepts is used."""
TIMEOUT = 120.0  # seconds, for the compiler
DIGEST = hashlib.sha256().digest_size
LOG = logging.getLogger("kvsuite")


class BuildError(Exception):
    """A source cannot be compiled or loaded here. Its text is one sentence for reports."""


def library(source: str, macros: Mapping[str, str | int]) -> ctypes.CDLL:
    """`source`, a file of this folder, compiled with `macros` and loaded; once per process, failures included. Raises
    BuildError."""
    made = _once(source, tuple(f"-D{name}={value}" for name, value in sorted(macros.items())))
    if isinstance(made, BuildError):
        raise BuildError(*made.args) from made
    return made


@functools.cache
def compiler() -> str:
    """The version line of the compiler that `library` uses. Raises BuildError."""
    return _run([*executable(), "--version"]).stdout.partition("\n")[0]


@functools.cache
def _once(source: str, macros: tuple[str, ...]) -> ctypes.CDLL | BuildError:
    try:
        command, options = executable(), [*FLAGS.split(), *_words("KVSUITE_CPU_FLAGS"), *macros]
        name = f"{Path(source).stem}-{_key(source, command, options)}.so"
        for shared in (True, False):
            try:
                folder = cache_folder() / "cpu" if shared else _private()
                return _load(folder / name, command, [*options, str(SOURCES / source)])
            except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
                failure = getattr(error, "strerror", None) or str(error)
                LOG.info("no folder for %s: %s", name, error)
        return BuildError(f"{source} could not be compiled and loaded: {failure}")
    except BuildError as error:
        return error


def _words(variable: str) -> list[str]:
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise BuildError(f"${variable} cannot be read: {error}") from error


def executable() -> list[str]:
    """The compiler and the user's arguments for it."""
    if os.name != "posix":
        raise BuildError("kernels in C++ are built on Linux and macOS only")
    command = _words("CXX") or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    if not command:
        raise BuildError("no C++ compiler: install g++ or set CXX")
    return command


@functools.cache
def _cpu() -> str:
    """What -march=native depends on: the first processor of /proc/cpuinfo, where it is there, without its speed."""
    lines = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        block = itertools.takewhile(str.strip, file)
        lines += [line for line in block if line.startswith(("cpu family", "model", "flags", "CPU ", "Features"))]
    return "\n".join(lines)


def _key(source: str, command: list[str], options: list[str]) -> str:
    """16 hex digits of all that a library depends on."""
    contents = [(path.name, path.read_bytes()) for path in sorted(SOURCES.iterdir()) if path.suffix in (".h", ".cpp")]
    parts = (source, command, compiler(), NATIVE, options, _cpu(), contents)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


@functools.cache
def _private() -> Path:
    """A folder of this process, for when the shared one cannot be used."""
    folder = tempfile.mkdtemp(prefix="kvsuite-cpu-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _load(path: Path, command: list[str], arguments: list[str]) -> ctypes.CDLL:
    """The library at `path`, compiled if it is not there or cannot be loaded. Raises OSError where `path` is of no use,
    BuildError where the compiler fails."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        return _open(path)
    except PermissionError:
        raise
    except OSError:  # absent, damaged or of another architecture
        with disk.making(path.parent) as temporary:
            with contextlib.suppress(OSError):  # another process was faster
                return _open(path)
            _compile(path, temporary, command, arguments)
        return _open(path)


def _open(path: Path) -> ctypes.CDLL:
    """Raises OSError if others may have written the library or its digest, which is appended to it so that both are
    replaced at once, is wrong: the loader itself ignores the digest and may crash on a truncated file."""
    for place in (path.parent, path):
        state = place.stat()
        if state.st_uid != os.geteuid() or state.st_mode & 0o022:
            raise PermissionError(errno.EPERM, "others may have written it", str(place))
    content = path.read_bytes()
    if hashlib.sha256(content[:-DIGEST]).digest() != content[-DIGEST:]:
        raise OSError(errno.EIO, "its digest is wrong", str(path))
    return ctypes.CDLL(str(path))


def _compile(path: Path, temporary: Path, command: list[str], arguments: list[str]) -> None:
    start, made = time.perf_counter(), temporary / path.name
    for native in NATIVE:
        done = _run([*command, *native.split(), *arguments, "-o", str(made)], TMPDIR=str(temporary))
        if not done.returncode or not re.search("native|no such instruction", done.stderr):
            break
    if done.returncode:
        _explain(done)
    content = made.read_bytes()
    made.write_bytes(content + hashlib.sha256(content).digest())
    made.chmod(0o700)
    os.replace(made, path)
    LOG.info("compiled %s in %.1f s", path, time.perf_counter() - start)


def _explain(done: CompletedProcess[str]) -> None:
    """Raises OSError where the compiler had no room, else BuildError with its first error."""
    if no_room := re.search("No space left on device|Disk quota exceeded", done.stderr):
        raise OSError(errno.ENOSPC, no_room[0])
    lines = [line.replace(f"{SOURCES}/", "").strip() for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line.lower() and " exit " not in line]  # not "ld returned 1 exit"
    raise BuildError(f"{Path(done.args[0]).name} failed: {[*errors, *lines, f'exit status {done.returncode}'][0]}")


def _run(command: list[str], **environment: str) -> CompletedProcess[str]:
    """Runs the compiler in a session of its own, so that all it starts can be ended with it."""
    name, env = Path(command[0]).name, {**os.environ, "LC_ALL": "C", **environment}
    try:
        process = Popen(command, stdout=PIPE, stderr=PIPE, env=env, errors="replace", start_new_session=True)
    except OSError as error:
        raise BuildError(f"{name} cannot be run: {error.strerror}") from error
    with process:
        try:
            output, errors = process.communicate(timeout=TIMEOUT)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, TimeoutExpired):
                raise BuildError(f"{name} took longer than {TIMEOUT:g} s") from error
            raise
    return CompletedProcess(command, process.returncode, output, errors)
