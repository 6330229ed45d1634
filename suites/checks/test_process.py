"""Servers end with their client, whatever ends it. With real processes."""

import contextlib
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from kvsuite.engines import process
from kvsuite.engines.process import Process, free_port
from kvsuite.errors import UsageError
from suites.checks.family import PYTHON, SERVER, Family, folder, is_free, start_client, timed, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are counted in /proc")


@pytest.fixture
def family(monkeypatch):
    monkeypatch.setattr(process, "UNKILLABLE", 5)
    with tempfile.TemporaryDirectory(prefix="kv-test-", dir="/tmp") as short:
        found = Family(short)
        yield found
        found.kill()


@pytest.fixture
def run(tmp_path, family, monkeypatch):
    """``run("stubborn")`` is a started server that says "ready"; abandoned ones are killed soon."""
    monkeypatch.setattr(process, "ABANDONED", 0.3)
    with contextlib.ExitStack() as stack:

        def start(*words):
            port = free_port()
            server = Process([*SERVER, str(port), *words], tmp_path / f"{port}.log", env=family.env)
            server.port = port
            stack.callback(server.stop, 0)
            server.start()
            until(lambda: "ready" in server.tail() and ("daemon" not in words or "daemon" in server.tail()))
            return server

        yield start


class TestStop:
    @pytest.mark.parametrize("words", [(), ("stubborn",), ("daemon",), ("stubborn", "daemon", "child")])
    def test_nothing_is_left(self, run, family, words):
        server = run(*words)
        private = folder(server.tail())
        assert server.alive
        assert server.returncode is None
        assert private.parent == Path(family.env["TMPDIR"])
        assert not is_free(server.port)
        server.stop(0.3)
        assert not family.left()
        assert not server.alive
        assert server.returncode == 128 + (signal.SIGKILL if "stubborn" in words else signal.SIGTERM)
        assert not private.exists()
        assert is_free(server.port)
        server.stop()

    def test_sigterm_comes_once(self, tmp_path, family):
        code = (
            "import signal, time; signal.signal(15, lambda *_: print('asked', flush=True)); print('ready', flush=True)"
        )
        with Process([*PYTHON, f"{code}; time.sleep(0.7)"], tmp_path / "log", family.env) as server:
            until(lambda: "ready" in server.tail())
            server.stop()
            assert server.tail() == "ready\nasked"
            assert server.returncode == 0

    def test_who_listens_to_sigterm_does_not_wait_for_the_grace(self, run):
        assert timed(run().stop, 30) < 10

    def test_the_grace_is_granted(self, run):
        assert 0.5 < timed(run("stubborn").stop, 0.5) < 10

    def test_shared_memory_of_the_killed_is_freed(self, run):
        server = run("stubborn", "shared")
        memory = Path(f"/dev/shm/kv-{server.port}")
        try:
            assert memory.exists()
            server.stop(0.1)
            assert not memory.exists()
        finally:
            memory.unlink(missing_ok=True)

    def test_one_of_two_leaves_the_other_alone_and_can_start_again(self, run, family):
        first, second = run("stubborn"), run()
        second.stop()
        assert first.alive
        assert not is_free(first.port)
        assert is_free(second.port)
        second.start()
        until(lambda: "ready" in second.tail())
        first.stop(0)
        assert second.alive
        second.stop()
        assert not family.left()

    def test_two_share_no_pipe(self, run, family):
        first, _ = run(), run()
        pipes = {os.readlink(f"/proc/self/fd/{file.fileno()}") for file in (first._keeper.stdin, first._keeper.stdout)}
        holders = set()
        for pid in family.left():
            links = (os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir())
            holders |= {pid} if pipes & set(links) else set()
        assert len(pipes) == 2
        assert holders == set(family.keepers(first))

    def test_before_any_start(self, tmp_path):
        server = Process("true", tmp_path / "log")
        server.stop()
        assert (server.alive, server.returncode, server.tail()) == (False, None, "")

    def test_at_once_after_a_start(self, tmp_path, family):
        server = Process(["sleep", "60"], tmp_path / "log", env=family.env)
        server.start()
        server.stop()
        assert not family.left()

    def test_an_exception_ends_it(self, tmp_path, family):
        with pytest.raises(KeyError), Process(["sleep", "60"], tmp_path / "log", env=family.env):
            raise KeyError
        assert not family.left()

    def test_what_cannot_be_killed_is_said(self, tmp_path, family, monkeypatch):
        monkeypatch.setattr(process, "KEEPER", (*PYTHON, "import time; time.sleep(60)"))
        monkeypatch.setattr(process, "UNKILLABLE", 0.1)
        server = Process("true", tmp_path / "log", env=family.env)
        server.start()
        with pytest.raises(RuntimeError, match="true does not end, not even by SIGKILL"):
            server.stop(0)
        server._keeper.kill()
        server.stop()


class TestEnd:
    """Of the server, by itself."""

    def test_its_code_and_last_words_are_kept(self, tmp_path, family):
        log = tmp_path / "log"
        log.write_text("an older start\n")
        with Process(
            "sh -c 'printf \"one\\n\\n----\\n\\033[31mtwo  \\n\"; echo three >&2; exit 7'", log, family.env
        ) as server:
            until(lambda: not server.alive)
            assert server.returncode == 7
            assert server.tail() == "one\ntwo\nthree"
            assert server.tail(2) == "two\nthree"
        assert server.returncode == 7

    def test_the_reason_is_the_first_exception(self, tmp_path, family):
        """As vLLM prints it: the worker that failed, then the engine, then the server."""
        log = tmp_path / "log"
        log.write_text("Traceback (most recent call last):\nValueError: an older start\n")
        told = "\n".join(
            [
                "INFO ImportError: an optional package is missing",
                "(Worker pid=1) ERROR [a.py:3] Traceback (most recent call last):",
                "(Worker pid=1) ERROR [a.py:3]     raise NotImplementedError(",
                "(Worker pid=1) ERROR [a.py:3] vllm.errors.UnfitError: fp8 needs AVX-512",
                "  here it is missing",
                "Traceback (most recent call last):",
                "RuntimeError: Engine core initialization failed. See root cause above.",
            ]
        )
        with Process(["sh", "-c", f"cat <<'E'\n{told}\nE\nexit 1"], log, family.env) as server:
            until(lambda: not server.alive)
            assert server.reason() == "vllm.errors.UnfitError: fp8 needs AVX-512\nhere it is missing"

    def test_without_an_exception_the_reason_is_its_last_words(self, tmp_path, family):
        with Process(
            ["sh", "-c", "echo usage; echo error: no such option; exit 2"], tmp_path / "log", family.env
        ) as server:
            until(lambda: not server.alive)
            assert server.reason() == server.tail() == "usage\nerror: no such option"

    def test_takes_what_it_started_along(self, tmp_path, family, monkeypatch):
        monkeypatch.setattr(process, "ABANDONED", 0.1)
        with Process(
            ["sh", "-c", "trap '' TERM; setsid sleep 60 & sleep 60 & exit 3"], tmp_path / "log", family.env
        ) as server:
            until(lambda: not server.alive)
            assert not family.left()
            assert server.returncode == 3

    def test_what_the_system_refuses_is_in_the_log(self, tmp_path, family):
        program = tmp_path / "program"
        program.write_text("#!/nowhere/interpreter\n")
        program.chmod(0o700)
        with Process([str(program)], tmp_path / "log", family.env) as server:
            until(lambda: not server.alive)
            assert server.returncode == 127
            assert server.tail() == f"{program} cannot be started: No such file or directory"

    def test_it_sees_its_words_and_environment(self, tmp_path, family, monkeypatch):
        monkeypatch.setenv("KV_EXTRA", "less")
        words = ["sh", "-c", 'cat; echo "$0 $1 $KV_EXTRA"; ls /proc/self/fd', "a b", "-x"]
        with Process(words, tmp_path / "log", {**family.env, "KV_EXTRA": "more"}) as server:
            until(lambda: not server.alive)
            assert server.tail(9).splitlines() == ["a b -x more", "0", "1", "2", "3"]  # 3 is the listing itself

    def test_its_temporary_directory_has_a_short_path(self, tmp_path, family):
        long = tmp_path / ("x" * 40)
        long.mkdir()
        words = ["sh", "-c", 'echo "$TMPDIR"; test -d "$TMPDIR"']
        with Process(words, tmp_path / "log", {**family.env, "TMPDIR": str(long)}) as server:
            until(lambda: not server.alive)
            private = Path(server.tail())
            assert server.returncode == 0
            assert private.parent == Path("/tmp")
            assert len(str(private)) < 20
            with pytest.raises(FileNotFoundError):
                private.rmdir()


class TestRefusals:
    def test_no_such_program(self, tmp_path):
        server = Process(["kv-no-such-program", "--port", "1"], tmp_path / "log")
        with pytest.raises(UsageError, match="there is no program 'kv-no-such-program' that could be started"):
            server.start()
        assert not server.alive
        assert not (tmp_path / "log").exists()

    @pytest.mark.parametrize("command", ["", [], "vllm 'serve"])
    def test_no_command(self, tmp_path, command):
        with pytest.raises(UsageError, match=r"the command .* is empty|cannot be split"):
            Process(command, tmp_path / "log")

    def test_no_place_for_the_log(self, tmp_path):
        with pytest.raises(UsageError, match="cannot be written: No such file"):
            Process("true", tmp_path / "nowhere" / "log").start()

    def test_twice(self, run):
        server = run()
        with pytest.raises(UsageError, match="is running already"):
            server.start()
        assert server.alive


class TestClient:
    """Nothing of its servers is left when it is gone."""

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
    def test_gone_by_a_signal(self, tmp_path, family, number):
        ports = [free_port() for _ in range(3)]
        words = [("daemon",), (), ("stubborn",) if number != signal.SIGINT else ()]
        commands = [[*SERVER, str(port), *more] for port, more in zip(ports, words, strict=True)]
        if number == signal.SIGINT:  # its servers are stopped one by one, with the usual grace
            commands[0] = [*SERVER, str(ports[0])]
        client, folders = start_client(family, tmp_path, commands)
        assert len(family.left(client.pid)) >= 9
        os.killpg(client.pid, number)  # as a terminal does
        assert client.wait(5) == -number
        until(lambda: not family.left())
        until(lambda: not any(private.exists() for private in folders), 1)
        assert all(map(is_free, ports))

    def test_gone_while_a_process_it_forked_holds_the_pipe(self, tmp_path, family):
        port = free_port()
        client, (private,) = start_client(family, tmp_path, [[*SERVER, str(port), "stubborn"]], "fork")
        client.kill()
        client.wait(5)
        until(lambda: len(family.left()) == 1)
        until(lambda: not private.exists(), 1)
        assert is_free(port)


class TestKeeper:
    @pytest.mark.parametrize("which", [0, 1])
    def test_killed_the_other_one_ends_all(self, run, family, which):
        server = run("stubborn", "daemon")
        private = folder(server.tail())
        os.kill(family.keepers(server)[which], signal.SIGKILL)
        until(lambda: not family.left())
        until(lambda: not private.exists(), 1)
        server.stop()
        assert server.returncode == (-signal.SIGKILL if which == 0 else 128 + signal.SIGKILL)

    def test_stop_waits_for_the_one_that_is_left(self, run, family):
        server = run("stubborn")
        os.kill(family.keepers(server)[0], signal.SIGKILL)
        server.stop(0.2)
        assert not family.left()

    def test_both_killed_the_server_gets_sigterm(self, run, family):
        server = run()
        for pid in family.keepers(server):
            os.kill(pid, signal.SIGKILL)
        until(lambda: not family.left())
        assert folder(server.tail()).exists()  # nobody is left to delete it

    @pytest.mark.parametrize("which", [0, 1])
    def test_told_to_end_it_ends_all(self, run, family, which):
        server = run("daemon")
        os.kill(family.keepers(server)[which], signal.SIGTERM)
        until(lambda: not family.left())
        server.stop()
        assert server.returncode == 128 + signal.SIGTERM

    def test_without_proc_the_group_ends(self, run, family, monkeypatch):
        here = str(Path(process.__file__).parent)
        code = f"import sys; sys.path.append({here!r}); import keeper; keeper.LINUX = False; "
        code += "sys.exit(keeper.main(float(sys.argv[1]), sys.argv[2:]))"
        monkeypatch.setattr(process, "KEEPER", (*PYTHON, code))
        server = run("stubborn", "child")
        private = folder(server.tail())
        server.stop(0.2)
        assert not family.left()
        assert server.returncode == 128 + signal.SIGKILL
        assert not private.exists()


def test_free_ports_are_free_and_not_privileged():
    for port in (free_port() for _ in range(20)):
        assert 1024 <= port < 65536
        with socket.create_server(("127.0.0.1", port)):
            pass
