"""Long runs in short: `suites.robustness.long`."""

import pytest

from suites.checks.depth import depth
from suites.checks.test_scale import cost
from suites.robustness.long import GB, SECONDS, SLOPE, grown, make

SAMPLES = 100_000
SPREAD = 2
"""How much more than their share a few samples may take."""


@pytest.mark.parametrize("samples", depth([4_000], [100_000]))
def test_a_report_takes_its_share_of_a_minute_and_of_the_memory(tmp_path, samples):
    used = []
    for number in (1_000, samples):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder, number)
        used.append(cost(["report", "--markdown", str(folder)]))
    share = (samples - 1_000) / SAMPLES * (1 if samples == SAMPLES else SPREAD)
    assert used[1]["seconds"] - used[0]["seconds"] <= SECONDS * share
    assert used[1]["gib"] - used[0]["gib"] <= GB * share
    assert f"needle · {samples} samples" in used[1]["printed"]


@pytest.mark.parametrize("samples", depth([], [2_000]))
def test_a_run_holds_its_memory(tmp_path, samples):
    assert grown(tmp_path, samples) < SLOPE
