"""Ray's workers give the records of one process, also where one of them is killed."""

from pathlib import Path

import pytest

from kvsuite.records import Answer, read
from suites.checks.depth import depth
from suites.checks.test_resume import results

pytest.importorskip("ray")

KILLS = """
import os, signal
from pathlib import Path
from kvsuite.runs.here import Here
answers, mark = Here.answers, Path({folder!r}) / "killed"
def once(self, task, samples, jobs, before):
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return answers(self, task, samples, jobs, before)
Here.answers = once
"""


@pytest.mark.parametrize("killed", depth([True], [False, True]))
def test_the_same_records_whoever_answers(run, finished, pytester, killed):
    finished("samples or length", "alone")
    if killed:
        pytester.makepyfile(sitecustomize=KILLS.format(folder=str(pytester.path)))  # which every worker imports
    chosen = "test_answers or test_decode[int8"
    result = run("samples or length or throughput", "-k", chosen, "--kv-executor", "ray")
    assert result.ret == 0, result.outlines[-30:]
    assert Path("killed").exists() == killed
    alone = {job: record for job, record in results("alone").items() if isinstance(record, Answer)}
    assert results("left") == alone
    assert read(Path("left")).facts["environment"]["executor"].startswith("ray, ")
    result.stdout.fnmatch_lines(["*speed is timed alone: run -m throughput without -n or --kv-executor*"])
