"""How ``kvsuite …`` ends where it does not come to its end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

SMOKE = Path(__file__).parents[2] / "reports" / "cpu" / "smoke"
COMMAND = (sys.executable, "-m", "kvsuite.cli")


def test_an_interrupted_command_says_nothing():
    process = subprocess.Popen([*COMMAND, "report", str(SMOKE)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while b"numpy" not in Path(f"/proc/{process.pid}/maps").read_bytes():  # it is at work
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, b"")


def test_a_lack_of_memory_is_a_sentence(monkeypatch, capsys):
    from kvsuite import cli

    def none(folder):
        raise MemoryError

    monkeypatch.setattr(cli.records, "whole", none)
    assert cli.main(["report", str(SMOKE)]) == 2
    assert capsys.readouterr().err == "kvsuite: there is not enough memory for this\n"


def test_a_closed_output_is_no_error():
    done = subprocess.run([*COMMAND, "methods"], stdout=None, stderr=subprocess.PIPE, preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_pytest(tmp_path, number):
    """`timeout` and CI send it to the process they have started alone."""
    (tmp_path / "conftest.py").write_text("import time\nopen('waits', 'w').close()\ntime.sleep(60)\n")
    process = subprocess.Popen([*COMMAND, "run", "samples", "--rootdir", "."], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (tmp_path / "waits").exists():
        time.sleep(0.05)
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(number)
    assert process.wait(30) == 128 + number
    assert not child.is_running()
