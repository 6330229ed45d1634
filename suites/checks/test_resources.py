"""What is missing costs one method's cells or a sentence: `suites.robustness.resources` in short."""

import subprocess

import pytest

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


@pytest.mark.parametrize("name", depth([], [*CACHES]))
def test_a_fault_of_the_cache_folder_costs_a_sentence(name, tmp_path, request):
    if name in MOUNTS:
        request.getfixturevalue("mounts")
    said, right = CACHES[name](Fetching(tmp_path / name))
    assert right, said
