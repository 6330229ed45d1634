"""How many sequences fit, layers that did not run, and how far a step is from the machine's limit: by hand."""

from dataclasses import replace

import pytest

from kvsuite import cli
from kvsuite.analysis.capacity import sequence_bytes
from kvsuite.analysis.speed import break_evens, log_speeds, scaled, speed_rows
from kvsuite.analysis.tables.capacity import capacity
from kvsuite.records import Run, RunFolder, Timing

KIB = 1024
FACTS = {
    "methods": ["full", "evicts"], "model": {"name": "m"}, "settings": {},
    "environment": {"gpu": None, "threads": 1, "compute_dtype": "bfloat16", "kv_dtype": "bfloat16"},
}  # fmt: skip
ROUNDS = {"seconds": [0.1, 0.11, 0.12], "baseline_seconds": [0.2, 0.22, 0.24]}


def timing(method, length, nbytes, width=1, **more):
    return Timing(
        method, length=length, width=width, nbytes=nbytes * width, tokens=width, cache="kvsuite.cache.x",
        checked=0.5, **ROUNDS | more,
    )  # fmt: skip


def test_a_fixed_part_and_a_slope():
    full = [timing("full", n, 7 * KIB + 100 * n, width) for n in (512, 1024, 4096) for width in (1, 8)]
    evicts = [timing("evicts", n, min(n, 1000) * 100) for n in (256, 512, 2048, 4096, 8192)]
    found = sequence_bytes([*full, *evicts, timing("one", 512, 5), timing("full", 512, 1, phase="eager")])
    assert set(found) == {"full", "evicts"}
    assert (found["full"].fixed, found["full"].token) == (pytest.approx(7 * KIB), pytest.approx(100))
    assert found["full"].lengths == (512, 1024, 4096)
    assert found["full"].sequences(1 << 30, 10_000) == (1 << 30) // (7 * KIB + 1_000_000)
    assert found["evicts"].lengths == (2048, 4096, 8192), "shorter ones are not on the line"
    assert (found["evicts"].fixed, found["evicts"].token) == (pytest.approx(100_000), pytest.approx(0, abs=1e-6))


def records():
    wide = [timing("full", 4096, 1 << 24, width) for width in (1, 64, 65)]
    narrow = [timing("evicts", n, 1 << 22, width) for n in (2048, 4096) for width in (8, 256, 512)]
    return [timing("full", 2048, 1 << 23), *wide, *narrow]


def test_the_speed_of_as_many_as_fit(tmp_path):
    [table] = capacity(Run(tmp_path, FACTS, records()))
    assert table.cell(("full", "4096"), "fits").value == 64
    assert table.cell(("evicts", "4096"), "fits").value == 256
    assert table.cell(("evicts", "4096"), "times").value == 4
    assert [table.cell((m, "4096"), "width").value for m in ("full", "evicts")] == [64, 256]
    assert table.cell(("evicts", "4096"), "rate").value == pytest.approx(256 / 0.11)
    assert capacity(Run(tmp_path, FACTS, [timing("full", 512, 5)])) == []


def test_the_command(tmp_path, capsys):
    folder = RunFolder(tmp_path / "run")
    folder.describe(FACTS)
    for record in records():
        folder.append(record)
    assert cli.main(["capacity", str(tmp_path / "run"), "--memory", "2", "--length", "4096,8192"]) == 0
    said = capsys.readouterr().out
    assert "fit in 2 GiB" in said
    assert [line.split()[:5] for line in said.splitlines() if line.startswith("full ")][:2] == [
        ["full", "4096", "0", "4,096", "128"],
        ["full", "8192", "0", "4,096", "64"],
    ]
    assert cli.main(["capacity", str(tmp_path / "run"), "--memory", "0"]) == 2
    empty = RunFolder(tmp_path / "empty")
    empty.describe(FACTS)
    assert cli.main(["capacity", str(tmp_path / "empty")]) == 2
    assert "has no decoding of full at two lengths" in capsys.readouterr().err


def test_layers_that_did_not_run_are_counted_and_the_rest_once():
    some = timing("evicts", 512, 100, rest_seconds=[0.05, 0.9, 0.04], scale=16.0)
    whole = scaled(some)
    assert whole.seconds == pytest.approx([0.05 + 16 * (s - 0.05) for s in some.seconds])
    assert whole.baseline_seconds == pytest.approx([0.05 + 16 * (s - 0.05) for s in some.baseline_seconds])
    assert (whole.nbytes, whole.scale, scaled(whole)) == (1600, 1.0, whole)
    assert log_speeds(some) == log_speeds(whole)
    [row] = speed_rows([some])
    assert row.rate == pytest.approx(1 / (0.05 + 16 * 0.06))
    other = replace(some, length=1024)
    assert break_evens([some, other]) == break_evens([whole, scaled(other)])


def test_the_limit_is_the_slower_of_bytes_and_operations():
    known = {"moved": 1000, "operations": 5000, "bandwidth": 20_000.0, "rate": 200_000.0}
    [row] = speed_rows([timing("m", 512, 1, **known)])
    assert row.of_limit == pytest.approx(0.05 / 0.11)
    [row] = speed_rows([timing("m", 512, 1, **known | {"rate": 50_000.0})])
    assert row.of_limit == pytest.approx(0.1 / 0.11)
    [row] = speed_rows([timing("m", 512, 1)])
    assert row.of_limit is None
