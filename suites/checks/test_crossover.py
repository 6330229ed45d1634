"""Public GPU tables: what they say is shown as it is, and interpolated among its own kind. What was not measured is
never called measured."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest

from kvsuite import cli
from kvsuite.analysis.crossover import BreakEven, Cell, break_even, compare, lines_cross
from kvsuite.analysis.kernel_times import Estimate, Extended, Grid, Modelled, Products, between, held_out, impossible
from kvsuite.analysis.kv_formats import kernel_of, stored
from kvsuite.analysis.tables import crossover
from kvsuite.errors import UsageError
from kvsuite.methods.grammar import parse
from kvsuite.readers import aiconfigurator
from kvsuite.readers.aiconfigurator import Measured
from kvsuite.report import html
from kvsuite.shapes import SHAPES, shape
from suites.checks.drawn import drawn

MIB = 2**20
DOCS = Path(__file__).parents[2] / "docs"
BATCHES, LENGTHS = [2**k for k in range(9)], [2**k for k in range(1, 15)]
TOKEN = {"bfloat16": 4096, "fp8": 2048}
"""Bytes of 8 kv heads of 128 numbers."""
SLOWER = {"bfloat16": 0.010, "fp8": 0.014}
"""ms that a step takes at least."""


def made_up(dtype, batch, length):
    """ms: a start, and bytes at 10 TB/s out of an L2 of 50 MiB, else at 4 TB/s or, decoded, 3 TB/s."""
    held = batch * length * TOKEN[dtype]
    rate = 10e9 if held <= 50 * MIB else 4e9 if dtype == "bfloat16" else 3e9
    return SLOWER[dtype] + held / rate


def cells(dtype):
    return {(b, n): made_up(dtype, b, n) for b in BATCHES for n in LENGTHS if b * n <= 2**18}


@pytest.fixture
def grids():
    return {dtype: Grid("kernel", cells(dtype), TOKEN[dtype], 50 * MIB) for dtype in TOKEN}


@pytest.fixture
def measured():
    sizes = [(n, k) for n in (1024, 65536) for k in (1024, 65536)]
    products = {(n, k): dict.fromkeys((1, 64, 2048), 0.001 + n * k / 1e9) for n, k in sizes}
    attention = {dtype: {"kernel": cells(dtype)} for dtype in TOKEN}
    return Measured("h200_sxm", "vllm", "1.0", "made up", 4e12, 140e9, 90, attention, products)


def parquet(file, rows):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table({name: [row[name] for row in rows] for name in rows[0]}), file)


def row(dtype, batch, length, ms, kernel="kernel", window=0, heads="32"):
    return {
        "kernel_source": kernel, "batch_size": str(batch), "isl": "1", "beam_width": "1", "num_heads": heads,
        "num_key_value_heads": "8", "head_dim": "128", "attn_dtype": "bfloat16", "kv_cache_dtype": dtype,
        "step": str(length - 1), "window_size": str(window), "latency": str(ms),
    }  # fmt: skip


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    """Tables of two GPUs, with numbers as text, an older file without windows, and a newer version 0.24 than 0.9."""
    pytest.importorskip("yaml")
    here = tmp_path_factory.mktemp("package") / "systems"
    now = [row(dtype, b, n, ms) for dtype in TOKEN for (b, n), ms in cells(dtype).items()]
    now += [row("fp8", 1, 64, 9.9, window=128), row("fp8", 1, 64, 9.8, heads="16")]
    two = [
        row(dtype, b, n, ms, kernel) for dtype in TOKEN for (b, n), ms in cells(dtype).items() for kernel in ("a", "b")
    ]
    old = [
        {k: v for k, v in row("bfloat16", b, n, ms).items() if k != "window_size"}
        for (b, n), ms in cells("bfloat16").items()
    ]
    h200 = here / "data" / "h200_sxm"
    parquet(h200 / "attention" / "vllm" / "0.24.0" / aiconfigurator.ATTENTION, now)
    parquet(h200 / "attention" / "vllm" / "0.9.0" / aiconfigurator.ATTENTION, [row("fp8", 1, 64, 9.7)])
    parquet(h200 / "attention" / "sglang" / "0.5.14" / aiconfigurator.ATTENTION, two)
    parquet(here / "data" / "a100_sxm" / "attention" / "vllm" / "0.14.0" / aiconfigurator.ATTENTION, old)
    products = [
        {"gemm_dtype": "bfloat16", "m": str(m), "n": str(n), "k": str(k), "latency": str(0.001 + n * k / 1e9)}
        for m in (1, 64, 2048) for n in (1024, 65536) for k in (1024, 65536)
    ]  # fmt: skip
    parquet(h200 / "gemm" / "vllm" / "0.24.0" / aiconfigurator.GEMM, products)
    for gpu, capability in (("h200_sxm", 90), ("a100_sxm", 80)):
        facts = f"gpu:\n  mem_bw: 4800000000000\n  mem_capacity: 140000000000\n  sm_version: {capability}\n"
        (here / f"{gpu}.yaml").write_text(facts)
    return here


def asked(systems, *arguments, gpu="h200", engine="vllm", model="llama-3.1-8b"):
    named = ["--gpu", gpu, "--engine", engine, "--model", model, "--tables", str(systems)]
    return cli.main(["crossover", *named, *arguments])


def test_tables_are_read_as_numbers_of_the_newest_version_and_of_full_attention(systems):
    found = aiconfigurator.measured(systems, "h200", "vllm", shape("llama-3.1-8b"))
    assert (found.gpu, found.version, found.capability) == ("h200_sxm", "0.24.0", 90)
    assert found.attention == {dtype: {"kernel": cells(dtype)} for dtype in TOKEN}
    assert found.products[65536, 1024][64] == 0.001 + 65536 * 1024 / 1e9
    old = aiconfigurator.measured(systems, "A100-SXM", "vllm", shape("llama-3.1-8b"))
    assert old.attention == {"bfloat16": {"kernel": cells("bfloat16")}}
    assert old.products == {}


@pytest.mark.parametrize(
    ("arguments", "named", "said"),
    [
        ([], {"gpu": "h100"}, "did you mean 'h200_sxm'?"),
        ([], {"engine": "vlm"}, "did you mean 'vllm'?"),
        ([], {"model": "llama-3-8b"}, "did you mean 'llama-3.1-8b'?"),
        ([], {"model": "llama-2-7b"}, "not measured with 32 heads, 32 of K and V"),
        ([], {"gpu": "a100"}, "GPUs before compute capability 8.9 have no fp8"),
        ([], {"engine": "sglang"}, "2 kernels: choose --kernel a or b"),
        (["--kernel", "c"], {}, "unknown kernel 'c'"),
        (["--batch", "3,500"], {}, "batch 500 × 256 tokens lies outside what was measured: batch 1–256"),
        (["--length", "50000"], {}, "batch 1 × 50,000 tokens lies outside"),
        (["--batch", "128", "--length", "256,4096"], {}, "at this one 2–2,048 tokens; --extrapolate shows a stated"),
        (["--kv", "full"], {}, "nothing to compare"),
        (["--kv", "int44"], {}, "did you mean 'int4'?"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused_in_one_sentence(systems, arguments, named, said, capsys):
    assert asked(systems, *arguments, **named) == 2
    out, err = capsys.readouterr()
    assert not out
    assert said in err
    assert err.count("\n") == 1


def test_files_that_cannot_be_read_or_written_are_named(systems, tmp_path, capsys):
    assert asked(systems, "--html", str(tmp_path / "nowhere" / "a.html")) == 2
    assert "nowhere/a.html cannot be written" in capsys.readouterr().err
    assert asked(tmp_path) == 2
    assert "no attention tables" in capsys.readouterr().err
    file = tmp_path / "data" / "h200_sxm" / "attention" / "vllm" / "1.0" / aiconfigurator.ATTENTION
    parquet(file, [{k: v for k, v in row("fp8", 1, 64, 1.0).items() if k != "step"}])
    assert asked(tmp_path) == 2
    assert "has no column 'step'" in capsys.readouterr().err
    file.write_bytes(b"no Parquet")
    assert asked(tmp_path) == 2
    assert "cannot be read as Parquet" in capsys.readouterr().err
    parquet(file, [row(dtype, 1, 64, 1.0) for dtype in TOKEN])
    assert asked(tmp_path) == 2
    assert "does not say what the GPU's memory is" in capsys.readouterr().err


def test_numbers_that_are_none_are_refused_by_argparse(systems, capsys):
    with pytest.raises(SystemExit):
        asked(systems, "--batch", "1,x")
    assert "write whole numbers above 0" in capsys.readouterr().err


def test_without_the_package_its_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.main(["crossover", "--gpu", "h200", "--engine", "vllm", "--model", "llama-3.1-8b"]) == 2
    assert "pip install 'kvsuite[gpu-tables]'" in capsys.readouterr().err


def test_cells_of_the_tables_are_shown_as_they_are(measured):
    found = compare(measured, "llama-3.1-8b").cells(None, None)
    assert len(found) >= 50
    for cell in found:
        plain, other = (made_up(dtype, cell.batch, cell.length) for dtype in TOKEN)
        assert (cell.plain.ms, cell.other.ms, cell.how) == (plain, other, "measured")
        assert cell.speed == plain / other
        held = [cell.batch * cell.length * TOKEN[dtype] <= 50 * MIB for dtype in TOKEN]
        assert cell.resident == {(True, True): "both", (False, True): "one", (False, False): ""}[tuple(held)]


def test_between_cells_the_time_is_that_of_the_same_kind_of_cells(grids):
    for dtype, grid in grids.items():
        for batch, length in ((3, 3000), (6, 2048), (8, 3000), (1, 12000), (5, 9000), (100, 700), (8, 1700)):
            got = grid.at(batch, length)
            assert got.how == "interpolated"
            assert got.ms == pytest.approx(made_up(dtype, batch, length), rel=1e-9)


def test_a_line_needs_two_points_of_a_kind_else_those_beside_it():
    kind = {1: 0, 2: 0, 4: 1, 8: 0}.get
    points = {1: 1.0, 2: 2.0, 4: 100.0, 8: 8.0}
    assert between(points, 3, lambda x: kind(x, 0)) == 3.0
    assert between(points, 3, lambda x: kind(x, 1)) == 51.0
    assert between({1: 1.0, 2: 2.0, 4: 100.0}, 3, lambda x: kind(x, 0)) == 3.0
    assert between(points, 2, lambda x: 1) == 2.0
    assert between(points, 9, lambda x: 1) is None
    assert between({}, 9, lambda x: 1) is None


def test_outside_nothing_is_known_unless_a_model_is_asked_for(grids):
    grid = grids["bfloat16"]
    assert grid.at(64, 2**14) is None
    assert grid.at(300, 64) is None
    assert grid.at(1, 1) is None
    beyond = Extended(grid).at(64, 2**14)
    assert beyond.how == "modelled"
    assert beyond.ms == pytest.approx(made_up("bfloat16", 64, 2**14), rel=0.01)
    assert Extended(grid).at(64, 1024) == grid.at(64, 1024)
    assert Extended(grid).at(300, 64) is None


def test_a_comparison_is_extended_where_that_is_asked_for(measured):
    with pytest.raises(UsageError, match="outside"):
        compare(measured, "llama-3.1-8b").cells([64], [2**14])
    [cell] = compare(measured, "llama-3.1-8b", extended=True).cells([64], [2**14])
    assert cell.how == cell.plain.how == cell.other.how == "modelled"
    [cell] = compare(measured, "llama-3.1-8b", extended=True).cells([64], [1024])
    assert cell.how == "measured"


def test_what_is_left_out_is_predicted_and_noise_is_seen():
    line = Grid("kernel", {(b, n): 1 + b * n / 100 for b in BATCHES for n in LENGTHS}, 1, 0)
    assert len(held_out(line, 0)) == len(line.cells) - 2 * len(LENGTHS)
    assert max(error for error, _ in held_out(line, 0)) < 1e-9
    wrong = replace(line, cells=line.cells | {(8, 1024): 2 * line.cells[8, 1024]})
    errors = [error for error, _ in held_out(wrong, 1)]
    assert any(error == pytest.approx(0.5) for error in errors)
    assert sum(error > 1e-9 for error in errors) == 3  # it, and those beside it


def test_cells_faster_than_the_memory_are_named(measured):
    assert not list(impossible(Grid("k", cells("bfloat16"), 4096, 50 * MIB), 4e9))
    wrong = cells("bfloat16") | {(8, 8192): 8 * 8192 * 4096 / 8e9}
    found = compare(replace(measured, attention=measured.attention | {"bfloat16": {"kernel": wrong}}), "llama-3.1-8b")
    [warned] = [n for t in crossover.tables(found, found.cells(None, None)) for n in t.notes if n.severity == "warning"]
    assert "1 cells beyond the L2 show up to 2.00 ×" in warned.text


def compared(length, speed, resident=False):
    return Cell(1, length, Estimate(speed, "measured", resident), Estimate(1.0, "measured", resident), 1.0, 2, (0, 0))


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ([], None),
        ([0.8, 0.9], BreakEven(2, None, None)),
        ([1.1, 1.2], BreakEven(None, 1, None)),
        ([0.5, 2.0], BreakEven(1, 2, pytest.approx(2**0.5))),
        ([0.9, 1.2, 0.9, 1.0], BreakEven(4, 8, pytest.approx(8))),
    ],
)
def test_a_break_even_lies_behind_the_last_slower_cell(speeds, expected):
    assert break_even([compared(2**k, speed) for k, speed in enumerate(speeds)]) == expected


def test_break_evens_are_of_all_lengths_of_the_tables_whatever_is_shown(measured):
    found = compare(measured, "llama-3.1-8b")
    few = {t.key: drawn(t) for t in crossover.tables(found, found.cells([16], [2000]))}["break-even"].rows
    [all_] = [row for row in drawn(crossover.tables(found, found.cells(None, None))[3]).rows if row[0] == "16"]
    assert few == [all_]


def test_lines_beyond_the_l2_cross_where_the_made_up_kernels_do(grids):
    plain, other = grids["bfloat16"], grids["fp8"]
    crossing = 0.004 / (4096 / 4e9 - 2048 / 3e9)
    assert lines_cross(plain, other, 16) == pytest.approx(crossing / 16, rel=1e-6)
    assert lines_cross(plain, other, 1) is None  # too few cells
    assert lines_cross(other, plain, 16) is None
    slow = replace(other, cells={cell: 3 * ms for cell, ms in other.cells.items()})
    assert lines_cross(plain, slow, 16) == float("inf")
    fast = replace(other, cells={cell: ms / 3 for cell, ms in other.cells.items()})
    assert lines_cross(plain, fast, 16) == 0


def test_a_whole_step_is_attention_in_all_layers_and_its_products(measured):
    found = compare(measured, "llama-3.1-8b")
    [cell] = found.cells([8], [4096])
    rest = 4 * 32 * 0.001 + 0.001 + (SHAPES["llama-3.1-8b"].parameters - 128256 * 4096 - 65 * 4096) / 1e9
    assert cell.steps[0] == pytest.approx(rest + 32 * made_up("bfloat16", 8, 4096), rel=1e-6)
    assert cell.steps[1] == pytest.approx(rest + 32 * made_up("fp8", 8, 4096), rel=1e-6)
    assert 1 < cell.step_speed < cell.speed
    [unknown] = compare(replace(measured, products={}), "llama-3.1-8b").cells([8], [4096])
    assert unknown.steps is None


def test_a_step_is_not_faster_than_its_memory_whatever_the_l2_did(measured):
    quick = compare(replace(measured, bandwidth=1e12), "llama-3.1-8b")
    [cell] = quick.cells([8], [1024])
    assert cell.resident == "both"
    assert cell.steps[0] - cell.rest == pytest.approx(32 * 8 * 1024 * 4096 / 1e9)
    assert cell.steps[1] - cell.rest == pytest.approx(32 * 8 * 1024 * 2048 / 1e9)
    assert quick.rate(quick.beyond[0], 8, 1024)[0] == pytest.approx(8000 / cell.steps[0])


def test_a_product_is_an_entry_or_on_lines_and_never_faster_than_its_weights_are_read():
    cells = {(n, k): {m: 1.0 + m + n * k / 100 for m in (1, 3)} for n in (10, 20) for k in (10, 20)}
    products = Products(cells, 1e9)
    assert products.one(1, 10, 20) == cells[10, 20][1]
    assert products.one(2, 15, 15) == pytest.approx(3 + 2.25)
    assert products.one(1, 40, 10) == pytest.approx(2 + 4.0)
    assert products.one(1, 15, 30) is None
    assert products.one(4, 15, 15) is None
    small = SimpleNamespace(matrices=lambda: [(10, 10, 3)])
    assert products.ms(small, 1) == 3 * 3.0
    assert Products(cells, 1.0).ms(small, 1) == 3 * 200


def test_capacity_counts_weights_and_bytes_of_k_and_v(measured):
    found = compare(measured, "llama-3.1-8b")
    for kernel, dtype in zip(found.beyond, TOKEN, strict=True):
        free = 140e9 - 2 * 8_030_261_248
        assert found.fits(kernel, 8192) == free // (32 * 8192 * TOKEN[dtype])
        rate, how = found.rate(kernel, 8, 4096)
        [cell] = found.cells([8], [4096])
        assert rate == pytest.approx(8000 / cell.steps[list(TOKEN).index(dtype)])
        assert how == "measured"
    assert found.rate(found.beyond[0], 64, 2**14)[1] == "modelled"
    assert compare(replace(measured, memory=10e9), "llama-3.1-8b").fits(found.plain, 1) == 0


@pytest.mark.parametrize("method", ["int8", "int4", "kivi:bits=4", "kivi:bits=2", "fp8:per=token", "fp8:k_scale=2"])
def test_bytes_of_a_format_are_those_of_its_fields(method):
    torch = pytest.importorskip("torch")
    for length in (1, 128, 4000):
        specs, total = parse(method).codec.specs(SHAPES["llama-3.1-8b"]), 0
        for spec in specs:
            unit = sum(int(np.prod(s)) * d.itemsize for s, d in spec.fields(128, torch.bfloat16))
            encoded = int(spec.num_encoded(length))
            total += encoded / spec.block * unit + (length - encoded) * 256
        assert stored(specs, length, 128) == total


def test_a_format_without_rows_is_modelled_by_its_bytes_and_an_eviction_by_its_length(grids):
    llama = SHAPES["llama-3.1-8b"]
    assert kernel_of("fp8", grids, llama) is grids["fp8"]
    int4 = kernel_of("int4", grids, llama)
    assert isinstance(int4, Modelled)
    assert int4.footprint(8, 1000) == 8 * 1000 * 8 * 2 * (64 + 4)
    assert int4.at(16, 8192).how == "modelled"
    assert int4.at(16, 8192).ms == pytest.approx(SLOWER["fp8"] + int4.footprint(16, 8192) / 3e9, rel=0.02)
    without = kernel_of("int4", {"bfloat16": grids["bfloat16"]}, llama)
    assert without.at(16, 8192).ms == pytest.approx(SLOWER["bfloat16"] + int4.footprint(16, 8192) / 4e9, rel=0.02)
    evicted = kernel_of("snapkv:budget=0.25", grids, llama)
    assert evicted.at(8, 8192) == replace(grids["bfloat16"].at(8, 2048), how="modelled")
    assert evicted.footprint(8, 8192) == 8 * 2048 * 4096
    both = kernel_of("h2o:budget=512+int4", grids, llama)
    assert both.footprint(8, 8192) == int4.footprint(8, 512)
    with pytest.raises(UsageError, match="nothing to compare"):
        kernel_of("jitter", grids, llama)


def test_pages_lead_with_what_the_l2_does_not_hold_and_mark_the_rest(measured):
    found = compare(measured, "llama-3.1-8b")
    shown = {table.key: drawn(table) for table in crossover.tables(found, found.cells(None, None))}
    assert [line[0] for line in shown["summary"].rows] == ["beyond the L2", "compressed in the L2", "both in the L2"]
    small, _, large = (shown["attention"].rows[0][at] for at in (1, -2, -1))
    assert small == f"{made_up('bfloat16', 1, 256) / made_up('fp8', 1, 256):.2f}*"
    assert large == f"{made_up('bfloat16', 1, 2**14) / made_up('fp8', 1, 2**14):.2f}'"
    assert not any("~" in cell for line in shown["attention"].rows for cell in line)
    modelled = compare(measured, "llama-3.1-8b", "int4")
    tables = {table.key: drawn(table) for table in crossover.tables(modelled, modelled.cells(None, None))}
    assert all(cell.startswith(("~", "-")) for line in tables["attention"].rows for cell in line[1:])
    assert "none measured for int4" in tables["summary"].notes[1]
    assert "int4 (modelled) K/V" in tables["summary"].title
    wide = compare(measured, "llama-3.1-8b", extended=True)
    [summary, *_] = crossover.tables(wide, wide.cells(None, None))
    assert [line[:2] for line in drawn(summary).rows][-1] == ["modelled", "10/10"]
    assert drawn(summary).rows[:3] == shown["summary"].rows


def test_the_command_prints_within_the_window_and_writes_page_picture_and_numbers(
    systems, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    page, picture = tmp_path / "a.html", tmp_path / "a.svg"
    assert asked(systems, "--kv", "int4", "--html", str(page), "--svg", str(picture)) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    assert "<script" not in page.read_text()
    assert "http" not in page.read_text().replace("http-equiv", "")
    drawing = ElementTree.fromstring(picture.read_text())
    tiles = [rect.get("class") for rect in drawing.iter("{http://www.w3.org/2000/svg}rect")]
    assert tiles.count("tile dashed") == len(tiles) - 1 > 50
    assert asked(systems, "--engine", "sglang", "--kernel", "b", "--json", "--batch", "3", "--length", "3000") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"] == ["b", "b"]
    [cell] = found["cells"]
    assert (cell["how"], cell["step_ms"]) == ("interpolated", None)
    assert cell["attention_speed"] == pytest.approx(made_up("bfloat16", 3, 3000) / made_up("fp8", 3, 3000))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616), ("llama-2-13b", 13_015_864_320), ("llama-2-70b", 68_976_648_192),
        ("llama-3.1-8b", 8_030_261_248), ("mistral-7b", 7_241_732_096),
        ("qwen3-8b", 8_190_735_360 - 36 * 2 * 128),  # its norms of queries and keys are not counted
    ],
)  # fmt: skip
def test_shapes_have_the_parameters_that_their_checkpoints_have(name, parameters):
    assert shape(name).parameters == parameters


@pytest.fixture(scope="module")
def public():
    """The real tables, where they are installed."""
    pytest.importorskip("pyarrow")
    if importlib.util.find_spec(aiconfigurator.PACKAGE) is None:
        pytest.skip("aiconfigurator-core is not installed")
    home = aiconfigurator.home()
    return lambda gpu, engine, model="llama-3.1-8b": compare(
        aiconfigurator.measured(home, gpu, engine, shape(model)), model
    )


@pytest.mark.parametrize(
    ("engine", "seen"),
    [
        ("vllm", {(1, 1024): 0.87, (1, 8192): 0.91, (8, 8192): 1.36, (64, 8192): 1.39}),
        ("trtllm", {(1, 1024): 1.64, (4, 8192): 2.02}),
        ("sglang", {(8, 1024): 0.79, (64, 8192): 1.09}),
    ],
)
def test_public_figures_equal_the_tables_entries_and_hold_out_within_5_percent(public, engine, seen):
    from pyarrow import parquet

    found = public("h200", engine)
    version = found.measured.version
    rows = parquet.read_table(
        aiconfigurator.home() / "data" / "h200_sxm" / "attention" / engine / version / aiconfigurator.ATTENTION,
        filters=[
            ("num_heads", "=", 32),
            ("num_key_value_heads", "=", 8),
            ("head_dim", "=", 128),
            ("window_size", "=", 0),
        ],
    ).to_pylist()
    entries = {(r["kv_cache_dtype"], int(r["batch_size"]), int(r["step"]) + 1): float(r["latency"]) for r in rows}
    cells = found.cells(None, None)
    assert len(cells) >= 50
    for cell in cells:
        at = cell.batch, cell.length
        assert cell.speed == entries["bfloat16", *at] / entries["fp8", *at]
    for at, speed in seen.items():
        assert found.cell(*at).speed == pytest.approx(speed, abs=0.0101)
    for grid in found.grids.values():
        for axis in (0, 1):
            errors = held_out(grid, axis)
            assert len(errors) > 50
            assert np.median([error for error, _ in errors]) < 0.05
            assert np.median([error for error, resident in errors if not resident]) < 0.05


def test_the_public_tables_show_the_l2(public):
    """Where K and V of a layer fit into an L40S's L2, more than its memory's bandwidth was measured, and only there."""
    grid = public("l40s", "vllm").grids["bfloat16"]
    rate = {cell: grid.footprint(*cell) / ms / 864e6 for cell, ms in grid.cells.items()}
    assert max(rate.values()) > 2
    assert max(times for cell, times in rate.items() if not grid.resident(*cell)) < 1


@pytest.mark.parametrize(
    ("gpu", "engine"), [("h200", "vllm"), ("h200", "trtllm"), ("h200", "sglang"), ("l40s", "vllm")]
)
def test_pictures_of_the_documents_are_those_of_the_command(public, gpu, engine):
    found = public(gpu, engine)
    drawn_ = html.picture(crossover.title(found), crossover.maps(found.cells(None, None)))
    assert (DOCS / f"crossover-{gpu}-{engine}.svg").read_text(encoding="utf-8") == drawn_
