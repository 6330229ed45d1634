"""The peak of memory: what is given back before the end shows, and what was there before does not."""

import ctypes
from pathlib import Path

import pytest
import torch

from kvsuite.analysis.speed import speed_rows
from kvsuite.analysis.tables.speed import timings
from kvsuite.engines import memory
from kvsuite.engines.memory import PeakMemory
from kvsuite.records import Run, Timing

CPU, MIB = torch.device("cpu"), 1 << 20


def fill(mib):
    return torch.ones(mib * MIB, dtype=torch.uint8)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells")
def test_memory_that_was_given_back_shows():
    before = fill(64)
    fill(96)  # given back at once: it is not what the next one takes its memory from
    with PeakMemory(CPU) as peak:
        fill(96)
        fill(32)
    assert 90 * MIB < peak.nbytes < 110 * MIB
    with PeakMemory(CPU) as peak:
        pass
    assert peak.nbytes < 8 * MIB
    assert before.all()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells")
def test_memory_that_the_heap_has_kept_is_given_back_first():
    def many():
        return [torch.ones(100_000, dtype=torch.uint8) for _ in range(200)]

    *freed, behind = many()  # the last one keeps the heap from shrinking
    del freed
    with PeakMemory(CPU) as peak:
        many()
    assert peak.nbytes > 18 * MIB
    assert behind.all()


def test_a_system_that_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROCESS", tmp_path / "none")
    with PeakMemory(CPU) as peak:
        fill(1)
    assert peak.nbytes is None
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with PeakMemory(CPU) as peak:
        fill(1)
    assert peak.nbytes is None


def test_a_gpu_is_asked_itself(monkeypatch):
    given = {"memory_allocated": 5 * MIB, "max_memory_allocated": 12 * MIB, "reset_peak_memory_stats": None}
    for name, value in given.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    with PeakMemory(torch.device("cuda")) as peak:
        pass
    assert peak.nbytes == 7 * MIB


def test_the_table_has_what_was_reserved_and_the_peak(tmp_path):
    seconds = {"seconds": [1.0, 1.1], "baseline_seconds": [1.0, 1.0], "tokens": 2, "checked": 0.5}
    new = Timing("int8", length=64, nbytes=3 * MIB, allocated=4 * MIB, peak=9 * MIB, **seconds)
    old = Timing("int4", length=64, nbytes=3 * MIB, **seconds)
    facts = {"model": {"name": "m"}, "settings": {}, "methods": ["int8", "int4"]}
    [table] = timings(Run(tmp_path, facts, [new, old]))
    at = [(name, "decode", "1", "64") for name in ("int8", "int4")]
    assert [table.cell(at[0], key).value for key in ("held", "allocated", "peak")] == [3, 4, 9]
    assert [table.cell(at[1], key).value for key in ("held", "allocated", "peak")] == [3, None, None]
    [table] = timings(Run(tmp_path, facts, [old]))
    assert not {"allocated", "peak"} & {column.key for column in table.columns}


def test_of_a_part_of_the_layers_the_peak_is_not_known():
    """Activations do not grow with them."""
    part = Timing(
        "int8", length=64, nbytes=1, allocated=2, peak=9, scale=3.0, checked=0.5, tokens=2,
        seconds=[3.0, 3.1], baseline_seconds=[3.0, 3.0], rest_seconds=[1.0, 1.0],
    )  # fmt: skip
    [row] = speed_rows([part])
    assert (row.nbytes, row.allocated, row.peak) == (3, 6, None)
