"""C++ kernels: compiled once for a machine and kept, whatever becomes of the cache; they share torch's threads."""

import ctypes
import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvsuite.kernels.cpu import build, threads
from kvsuite.kernels.cpu.build import BuildError

SOURCE = '#include "tiny.h"\nextern "C" __attribute__((visibility("default"))) int value() { return VALUE + ZERO; }\n'
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)
OTHER = f"""
import importlib.util, logging, sys
logging.basicConfig(level="INFO", format="%(message)s")
spec = importlib.util.spec_from_file_location("build", {build.__file__!r})
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
assert not {{"torch", "numpy"}} & set(sys.modules)
build.SOURCES = build.Path(sys.argv[1])
made = build.library("tiny.cpp", {{"VALUE": 7}})
print(made._name, made.value())
"""
"""Another process: the library's file and what it returns; its log on stderr."""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Sources, cache and temporary files of this test alone, and a process that has built nothing."""
    for name in ("sources", "cache", "temporary"):
        (tmp_path / name).mkdir()
    (tmp_path / "sources/tiny.cpp").write_text(SOURCE)
    (tmp_path / "sources/tiny.h").write_text("#define ZERO 0\n")
    (tmp_path / "sources/other.h").write_text("")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    monkeypatch.setenv("KVSUITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    for name in ("CXX", "KVSUITE_CPU_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    afresh()
    yield tmp_path
    afresh()


def afresh():
    for function in (build._once, build._cpu, build._private, build.compiler):
        function.cache_clear()


def wrapper(place, monkeypatch, said="", name="wrapped"):
    """Sets CXX to a script that counts compilations and may do something else in one; the function that counts."""
    real = next(path for path in map(shutil.which, ("c++", "g++", "clang++")) if path)
    script, log = place / name, place / "compiled"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *-shared*) echo "$*" >> {log}; {said or ":"};; esac\nexec {real} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return lambda: len(log.read_text().splitlines()) if log.exists() else 0


def tiny(**macros):
    """As a new process would build it."""
    afresh()
    return build.library("tiny.cpp", {"VALUE": 7, **macros})


def other(place):
    return subprocess.Popen(
        [sys.executable, "-c", OTHER, str(place / "sources")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def cached(place):
    return sorted((place / "cache/cpu").iterdir())


def is_private(made):
    return Path(made._name).parent.name.startswith("kvsuite-cpu-")


@needs_compiler
def test_a_library_is_compiled_once_and_kept(place, monkeypatch, caplog):
    count = wrapper(place, monkeypatch)
    caplog.set_level("INFO", "kvsuite")
    made = build.library("tiny.cpp", {"VALUE": 7})
    assert made.value() == 7
    [file] = cached(place)
    assert Path(made._name) == file
    assert re.fullmatch(r"tiny-[0-9a-f]{16}\.so", file.name)
    assert re.search(rf"compiled {file} in \d+\.\d s", caplog.text)
    assert build.library("tiny.cpp", {"VALUE": "7"}) is made
    output, log = other(place).communicate(timeout=60)
    assert output == f"{file} 7\n"
    assert not log
    assert count() == 1


@needs_compiler
@pytest.mark.parametrize("what", ["macro", "flag", "argument", "version", "cpu", "header", "other source"])
def test_whatever_a_library_depends_on_makes_another(place, monkeypatch, what):
    wrapper(place, monkeypatch)
    first = tiny()._name
    if what == "macro":
        assert tiny(VALUE=8).value() == 8
    elif what == "flag":
        monkeypatch.setenv("KVSUITE_CPU_FLAGS", "-DUNUSED='a b'")
    elif what == "argument":
        monkeypatch.setenv("CXX", os.environ["CXX"] + " -DUNUSED='a b'")
    elif what == "version":
        script = Path(os.environ["CXX"])
        script.write_text(script.read_text().replace("exec", '[ "$1" = --version ] && echo g++ 99 && exit\nexec'))
    elif what == "cpu":
        monkeypatch.setattr(build.platform, "processor", lambda: "another")
    elif what == "header":
        (place / "sources/tiny.h").write_text("#define ZERO 100\n")
        assert tiny().value() == 107
    else:
        (place / "sources/other.h").write_text("// changed")
    if what != "macro":
        tiny()
    assert len(cached(place)) == 2, f"{first} was taken"


def test_the_cpu_is_described_without_its_present_speed():
    said = build._cpu()
    assert "MHz" not in said
    if Path("/proc/cpuinfo").exists() and "flags" in Path("/proc/cpuinfo").read_text():
        assert len(re.findall(r"^flags\s", said, re.M)) == len(re.findall(r"^model name\s", said, re.M)) == 1


@needs_compiler
def test_processes_may_compile_at_once(place, monkeypatch):
    count = wrapper(place, monkeypatch, "sleep 1")
    both = [other(place) for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    [file] = cached(place)
    assert [output for output, _ in said] == [f"{file} 7\n"] * 2
    compiled, waited = sorted(log for _, log in said)
    assert re.fullmatch(rf"compiled {file} in .* s\n", compiled)
    assert waited == f"waiting for another process that fills {file.parent}\n"
    assert count() == 1


@needs_compiler
def test_an_unfinished_library_is_not_in_its_place(place, monkeypatch):
    wrapper(place, monkeypatch, f"(ls {place}/cache/cpu; dirname $TMPDIR) > {place}/seen")
    tiny()
    assert (place / "seen").read_text() == f"{place}/cache/cpu\n", "the compiler's own files are there, too"
    assert len(cached(place)) == 1


def no_room(place, monkeypatch, where):
    """Replacing a file fails in folders that `where` is a part of."""
    replace = os.replace

    def full(source, target):
        if where in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)


@needs_compiler
@pytest.mark.parametrize("why", ["no folder", "no room", "compiler has no room", "cannot be loaded there", "no home"])
def test_a_cache_of_no_use_is_done_without(place, monkeypatch, why):
    if why == "no folder":
        (place / "cache/cpu").write_text("")
    elif why == "no room":
        no_room(place, monkeypatch, "cache/cpu")
    elif why == "compiler has no room":
        said = 'echo "x.s: fatal error: error writing to x.s: No space left on device" >&2; exit 1'
        wrapper(place, monkeypatch, f'case "$*" in *cache/cpu*) {said};; esac')
    elif why == "cannot be loaded there":
        load = ctypes.CDLL
        monkeypatch.setattr(ctypes, "CDLL", lambda path: load(path if "kvsuite-cpu-" in path else "/dev/null"))
    else:
        monkeypatch.delenv("KVSUITE_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    made = tiny()
    assert made.value() == 7
    assert is_private(made)


@needs_compiler
def test_a_private_library_goes_with_its_process(place):
    (place / "cache/cpu").write_text("")
    output, _ = other(place).communicate(timeout=60)
    path, value = output.split()
    assert (value, Path(path).parent.parent) == ("7", place / "temporary")
    assert not list((place / "temporary").iterdir())


@needs_compiler
def test_no_room_anywhere_is_said(place, monkeypatch):
    no_room(place, monkeypatch, "")
    with pytest.raises(BuildError) as caught:
        tiny()
    assert str(caught.value) == "tiny.cpp could not be compiled and loaded: No space left on device"
    assert not cached(place)


@needs_compiler
@pytest.mark.parametrize("how", ["half", "no end", "empty", "one bit", "no library"])
def test_a_damaged_library_is_compiled_anew(place, monkeypatch, how):
    count = wrapper(place, monkeypatch)
    other(place).communicate(timeout=60)
    [file] = cached(place)
    content = file.read_bytes()
    bit = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]
    no_library = b"\x7fELF" + bytes(99)
    signed = no_library + build.hashlib.sha256(no_library).digest()
    damaged = {"half": content[:-9000], "no end": content[:-1], "empty": b"", "one bit": bit, "no library": signed}
    file.write_bytes(damaged[how])
    output, _ = other(place).communicate(timeout=60)  # which may crash
    assert output == f"{file} 7\n"
    assert count() == 2
    assert file.read_bytes() == content


@needs_compiler
@pytest.mark.parametrize("what", ["library", "folder"])
@pytest.mark.parametrize("how", ["owner", "group writes", "others write"])
def test_what_others_may_have_written_is_not_loaded(place, monkeypatch, what, how):
    count = wrapper(place, monkeypatch)
    file = Path(tiny()._name)
    changed = file if what == "library" else file.parent
    if how == "owner":
        if os.geteuid():
            pytest.skip("only root gives files away")
        os.chown(changed, 12345, -1)
    else:
        changed.chmod(0o720 if how == "group writes" else 0o702)
    before = file.stat()
    made = tiny()
    assert made.value() == 7
    assert is_private(made)
    assert count() == 2
    assert file.stat() == before


@needs_compiler
def test_a_library_is_written_by_its_owner_alone_whatever_the_umask(place):
    before = os.umask(0)
    try:
        file = Path(tiny()._name)
    finally:
        os.umask(before)
    assert [file] == cached(place)
    assert not (file.stat().st_mode | file.parent.stat().st_mode) & 0o077


def test_without_a_compiler_it_is_said_what_to_do(monkeypatch):
    monkeypatch.setenv("PATH", "")
    for function in (build.compiler, tiny):
        with pytest.raises(BuildError) as caught:
            function()
        assert str(caught.value) == "no C++ compiler: install g++ or set CXX"


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("CXX", "/nowhere/g++-99 -m64", "g++-99 cannot be run: No such file or directory"),
        ("CXX", "g++ '", "$CXX cannot be read: No closing quotation"),
        ("KVSUITE_CPU_FLAGS", "'", "$KVSUITE_CPU_FLAGS cannot be read: No closing quotation"),
    ],
)
def test_a_variable_of_no_use_is_named(monkeypatch, variable, value, said):
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setenv(variable, value)
    with pytest.raises(BuildError) as caught:
        tiny()
    assert str(caught.value) == said


@needs_compiler
def test_the_first_error_is_said_once_and_for_all(place, monkeypatch):
    (place / "sources/tiny.h").write_text("#define ZERO 0\nint f() {\n  return zero; }")
    count = wrapper(place, monkeypatch)
    for _ in range(2):
        with pytest.raises(BuildError, match=r"^wrapped failed: tiny\.h:3:10: error: [^\n]*zero[^\n]*$"):
            build.library("tiny.cpp", {"VALUE": 7})
    assert count() == 1


@needs_compiler
@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("In file x:\nx.cpp:3:1: error: no\nx.cpp:4:1: error: no more", "x.cpp:3:1: error: no"),
        ("/bin/ld: cannot find -lx\ncollect2: error: ld returned 1 exit status", "/bin/ld: cannot find -lx"),
        ("", "exit status 3"),
    ],
)
def test_of_what_a_compiler_says_the_error_is_kept(place, monkeypatch, output, said):
    (place / "output").write_text(output)
    wrapper(place, monkeypatch, f"cat {place}/output >&2; exit 3")
    with pytest.raises(BuildError) as caught:
        tiny()
    assert str(caught.value) == f"wrapped failed: {said}"


@needs_compiler
@pytest.mark.parametrize(("refused", "attempts"), [("-march=native", 2), ("-m*=native", 3)])
def test_a_compiler_that_refuses_native_goes_without(place, monkeypatch, refused, attempts):
    said = "echo \"error: unknown value 'native'\" >&2; exit 1"
    count = wrapper(place, monkeypatch, f'case "$*" in *{refused}*) {said};; esac')
    assert tiny().value() == 7
    assert count() == attempts


@needs_compiler
def test_a_compiler_that_hangs_is_ended_with_its_children(place, monkeypatch):
    wrapper(place, monkeypatch, f"sleep 30 & echo $! > {place}/child; wait; touch {place}/waited")
    monkeypatch.setattr(build, "TIMEOUT", 1.0)
    with pytest.raises(BuildError, match=r"^wrapped took longer than 1 s$"):
        tiny()
    assert not (place / "waited").exists()
    assert not cached(place)
    status = Path("/proc", (place / "child").read_text().strip(), "status")
    end = time.monotonic() + 5
    while status.exists() and "zombie" not in status.read_text():
        assert time.monotonic() < end, "it goes on"
        time.sleep(0.01)


@needs_compiler
def test_cxx_may_have_arguments_and_flags_come_last(place, monkeypatch):
    (place / "sources/tiny.cpp").write_text(SOURCE.replace("ZERO", "EXTRA + sizeof(TEXT)"))
    wrapper(place, monkeypatch, name="with space")
    monkeypatch.setenv("CXX", f"'{os.environ['CXX']}' -DEXTRA=100 '-DTEXT=\"a b\"'")
    assert tiny().value() == 111
    monkeypatch.setenv("KVSUITE_CPU_FLAGS", "-UEXTRA -DEXTRA=200")
    assert tiny().value() == 211


THREADS = """
#include <atomic>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static std::atomic<int> arrived;
static void body(void* ids) {  // waits until the others are there, too, but no longer than 5 s
  int own = arrived++;
  if (own < 8) static_cast<long*>(ids)[own] = syscall(SYS_gettid);
  for (time_t start = time(nullptr); arrived < VALUE && time(nullptr) < start + 5;) {}
}
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
extern "C" __attribute__((visibility("default"))) int value(Parallel parallel, long* ids) {
  arrived = 0;
  parallel(body, ids, VALUE, 0);
  return arrived;
}
"""
USER = """
import ctypes, os, sys
from pathlib import Path
if sys.argv[2]:
    decoy = ctypes.CDLL(sys.argv[2])
    assert decoy.GOMP_parallel
import torch
from kvsuite.kernels.cpu import build, threads
torch.set_num_threads(2)
tensor = torch.ones(1 << 20)
tensor.exp()
tasks = set(map(int, os.listdir("/proc/self/task")))
assert torch.get_num_threads() == 2
build.SOURCES = Path(sys.argv[1])
ids = (ctypes.c_long * 8)()
assert build.library("tiny.cpp", {"VALUE": 2}).value(ctypes.c_void_p(threads.parallel()), ids) == 2
assert len(set(ids[:2])) == 2, "one thread only"
assert os.getpid() in set(ids[:2]) <= tasks, "not torch's threads"
assert float(tensor.add(1).sum()) == 1 << 21
assert set(map(int, os.listdir("/proc/self/task"))) == tasks
"""


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("runtimes", [1, 2])
def test_kernels_run_in_the_threads_of_torch(place, runtimes):
    """Also if another package has loaded its own OpenMP runtime before."""
    if not threads.parallel():
        pytest.skip("torch has no OpenMP runtime")
    decoy = ""
    if runtimes == 2:
        torch_folder = Path(importlib.util.find_spec("torch").origin).parent
        bundled = [*(torch_folder / "lib").glob("libgomp*"), *torch_folder.parent.glob("torch*.libs/libgomp*")]
        if not bundled:
            pytest.skip("torch brings no libgomp that could be copied")
        decoy = place / "libgomq.so.1"
        decoy.write_bytes(bundled[0].read_bytes().replace(b"libgomp", b"libgomq"))  # its name, which the loader knows
    (place / "sources/tiny.cpp").write_text(THREADS)
    done = subprocess.run(
        [sys.executable, "-c", USER, str(place / "sources"), str(decoy)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
