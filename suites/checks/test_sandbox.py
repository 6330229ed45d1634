"""Code of a model reaches neither the network, nor other files, nor more than its limits; else it is not run."""

import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kvsuite import sandbox
from kvsuite.errors import UsageError

try:
    sandbox.check()
except UsageError as error:
    held = pytest.mark.skip(str(error))
else:
    held = pytest.mark.skipif(False, reason="")


@pytest.fixture
def listening():
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as local:
        server.bind(("127.0.0.1", 0))
        local.bind("\0kvsuite-sandbox-check")
        for one in (server, local):
            one.listen()
        yield server.getsockname()[1]


@held
def test_what_is_harmless_passes_and_what_fails_does_not():
    assert sandbox.passes("import math\nopen('a', 'w').write('x' * 1000)\nassert len(bytearray(100 << 20)) and math.pi")
    for program in ("assert 0", "1 +", "import os; os._exit(0)", "raise SystemExit(0)", "input()"):
        assert not sandbox.passes(program), program


TCP = "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2).close()"
LOCAL = "import socket\nwith socket.socket(socket.AF_UNIX) as s: s.connect('\\0kvsuite-sandbox-check')"


@held
def test_no_network(listening):
    for program in (TCP.format(port=listening), LOCAL):
        exec(program, {})  # noqa: S102  (outside it is reached)
        assert not sandbox.passes(program)


@held
def test_no_other_files(tmp_path):
    (tmp_path / "secret").write_text("s")
    for file in ("/etc/passwd", str(tmp_path / "secret"), __file__, f"/proc/{os.getpid()}/environ"):
        exec(f"open({file!r}).close()", {})  # noqa: S102
        assert not sandbox.passes(f"open({file!r})"), file
    for folder in (Path.home(), tmp_path, Path.cwd()):
        assert not sandbox.passes(f"import os; assert set(os.listdir({str(folder)!r})) - {{'.pyenv', '.local'}}")
    for folder in ("/", "/usr", "/usr/lib", str(tmp_path), sys.base_prefix):
        program = f"open({folder + '/kvsuite-was-here'!r}, 'w')"
        assert not sandbox.passes(program), folder
        assert not Path(folder, "kvsuite-was-here").exists()


HUNGRY = {
    "processes": "import os\nif not os.fork(): os._exit(0)",
    "threads": "import threading\nthreading.Thread(target=print).start()",
    "programs": "import subprocess\nsubprocess.run(['/usr/bin/env'], check=True)",
    "memory": "bytearray(10 << 30)",
    "a large file": "open('a', 'wb').write(bytes(2 << 20))",
    "many files": "for i in range(20): open(str(i), 'wb').write(bytes(1 << 20))",
    "open files": "kept = [open('a', 'w') for _ in range(100)]",
    "more rights": "import os; os.setuid(0)",
    "higher limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
}


@held
@pytest.mark.parametrize("program", HUNGRY.values(), ids=HUNGRY)
def test_no_more_than_its_limits(program):
    assert not sandbox.passes(program)


@held
@pytest.mark.parametrize("program", ["while True: pass", "while True: print('x' * (1 << 20))"], ids=["loop", "output"])
def test_no_more_than_its_seconds_of_the_processor(program, monkeypatch):
    monkeypatch.setattr(sandbox, "RUNNER", sandbox.RUNNER.replace(f'("CPU", {sandbox.CPU})', '("CPU", 1)'))
    assert sandbox._run(program)[0] not in (-1, sandbox.PASSED)  # killed by the limit, not by the clock


@held
def test_what_it_says_of_errors_does_not_fill_our_memory():
    assert sandbox._run("import os\nassert os.write(2, bytes(4096)) == 4096") == (sandbox.PASSED, "")


@held
def test_nothing_is_left_when_time_is_up(monkeypatch):
    marker = f"# of {os.getpid()}"
    monkeypatch.setattr(sandbox, "RUNNER", sandbox.RUNNER + marker)
    monkeypatch.setattr(sandbox, "WALL", 1)
    assert not sandbox.passes("import time, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)")
    for _ in range(100):
        if not any(marker in " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])):
            return
        time.sleep(0.1)
    raise AssertionError("a process is left")


@held
def test_nobody_else_is_killed():
    victim = subprocess.Popen(["sleep", "60"])
    try:
        for who in (victim.pid, os.getpid(), -1):
            sandbox.passes(f"import os\nos.kill({who}, 9)")
        sandbox.passes("import os\nos.kill(os.getppid(), 9)")
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


@pytest.fixture
def afresh():
    sandbox.check.cache_clear()
    yield
    sandbox.check.cache_clear()


def test_without_a_sandbox_nothing_is_run(afresh, monkeypatch, tmp_path):
    program = f"open({str(tmp_path / 'ran')!r}, 'w')"
    fake = tmp_path / "bwrap"  # it isolates nothing
    fake.write_text('#!/bin/sh\nwhile [ "$1" != -I ]; do last=$1; shift; done\nexec "$last" "$@"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    for change, sentence in (
        (lambda: monkeypatch.setenv("PATH", str(tmp_path)), "does not hold on this machine"),
        (lambda: monkeypatch.setenv("PATH", str(tmp_path / "none")), "needs bubblewrap 0.8 or newer"),
        (lambda: monkeypatch.setattr(sys, "platform", "darwin"), "needs Linux"),
    ):
        change()
        with pytest.raises(UsageError, match=sentence):
            sandbox.passes(program)
    assert not (tmp_path / "ran").exists()
