"""What is missing costs one method's cells or a sentence: `suites.robustness.resources` in short."""

import collections
import itertools
import resource
import signal
import subprocess
from types import SimpleNamespace

import pytest

from kvsuite.plugin.session import Session
from kvsuite.records import Answer, read
from suites.checks.depth import depth
from suites.checks.test_resume import results
from suites.robustness.resources import CACHES, FAULTS, Fetching, tried

MOUNTS = {"disk", "read-only", "read-only-empty", "no-room"}


@pytest.fixture(scope="session")
def mounts(tmp_path_factory):
    """Skips where folders cannot be mounted."""
    place = tmp_path_factory.mktemp("place")
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("folders cannot be mounted here")
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("name", depth(["file-size"], [*FAULTS]))
def test_a_fault_costs_a_cell_or_a_sentence_and_the_run_goes_on(name, world, finished, tmp_path, request):
    if name in MOUNTS:
        request.getfixturevalue("mounts")
    finished("samples", "whole")
    _, wrong = tried(world, tmp_path / name, FAULTS[name], results("whole"))
    assert not wrong


@pytest.mark.parametrize("name", depth(["download"], [*CACHES]))
def test_a_fault_of_the_cache_folder_costs_a_sentence(name, tmp_path, request):
    if name in MOUNTS:
        request.getfixturevalue("mounts")
    said, right = CACHES[name](Fetching(tmp_path / name))
    assert right, said


@pytest.fixture
def small_files():
    """No file may have more than 2,000 bytes."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("worker", ["", "gw0"])
def test_records_that_cannot_be_written_end_the_run_and_those_before_stay(tmp_path, small_files, worker):
    session = Session(SimpleNamespace(resume=None, run=None), worker, tmp_path / "left")
    session.describe = lambda: session.run.describe({"methods": ["m"]})
    ends = pytest.fail.Exception if worker else pytest.exit.Exception
    made = itertools.count()
    with pytest.raises(ends, match=r"left' cannot be written: File too large; .* --kv-resume .*left goes on") as ended:
        collections.deque((session.record(Answer("m", sample=str(at))) for at in made), maxlen=0)
    assert getattr(ended.value, "returncode", 4) == 4
    found = read(tmp_path / "left")
    assert [record.sample for record in found.records] == [str(at) for at in range(next(made) - 1)] != []
    assert found.torn == 1
