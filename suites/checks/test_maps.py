"""Batch by length: where a method is faster and where slower, and what attention alone takes of it."""

from dataclasses import replace

import pytest

from kvsuite.analysis.figure import Map
from kvsuite.analysis.figures import maps
from kvsuite.analysis.report import analyse
from kvsuite.analysis.speed import attention_alone
from kvsuite.analysis.tables import paper, speed
from kvsuite.records import Run, Timing
from kvsuite.report.html import render

FACTS = {
    "methods": ["full", "int8"], "model": {"name": "m", "fingerprint": "f"}, "settings": {}, "preset": "smoke",
    "command": [], "started": "", "margins": {}, "texts": {}, "plugins": {},
    "environment": {
        "gpu": None, "cpu": "c", "cores": 2, "threads": 1, "compute_dtype": "bfloat16", "kv_dtype": "bfloat16",
        "git": None, "packages": {}, "python": "3", "kvsuite": "0",
    },
}  # fmt: skip
WIDTHS, LENGTHS = (1, 2, 8), (256, 512, 1024)
NOISE = (0.97, 0.98, 0.99, 1.0, 1.01, 1.02, 1.03, 1.0)


def timed(method, width, length, speedup, **more):
    base = [0.01 * width * noise for noise in NOISE]
    mine = [t / speedup * noise for t, noise in zip(base, reversed(NOISE), strict=True)]
    return Timing(
        method, width=width, length=length, tokens=width, cache="kvsuite.cache.x", checked=0.5, nbytes=100,
        seconds=mine, baseline_seconds=base,
        attention_seconds=[t / 4 for t in mine], baseline_attention_seconds=[t / 2 for t in base], **more,
    )  # fmt: skip


def run(folder, widths=WIDTHS, lengths=LENGTHS, **more):
    records = [timed("full", w, n, 1.0, **more) for w in widths for n in lengths]
    records += [timed("int8", w, n, 2.0 if w * n > 2000 else 0.5, **more) for w in widths for n in lengths]
    return Run(folder, FACTS, records)


def test_few_cells_stand_side_by_side(tmp_path):
    decode, attention = speed.phases(run(tmp_path, (8,)))
    assert decode.heads == attention.heads == ("batch · length",)
    assert [column.key for column in decode.columns] == ["8 · 256", "8 · 512", "8 · 1024"]
    assert maps.figures(run(tmp_path, (8,)), {"decode": decode}) == []


def test_many_cells_are_a_map(tmp_path):
    found = run(tmp_path)
    decode, attention = speed.phases(found)
    assert decode.heads == attention.heads == ("method", "batch")
    assert [column.key for column in decode.columns] == ["256", "512", "1024"]
    assert decode.cell(("int8", "8"), "256").value == pytest.approx(2, rel=0.05)
    assert decode.cell(("int8", "2"), "512").value == pytest.approx(0.5, rel=0.05)
    assert decode.cell(("full, tok/s", "8"), "256").value == pytest.approx(100, rel=0.05)
    only = next(m for m in maps.figures(found, {"decode": decode}))
    assert only.key == "map:decode:int8"
    assert (only.x.rows, only.y.rows) == (("256", "512", "1,024"), ("1", "2", "8"))
    faster = {(tile.column, tile.row): tile.ratio > 1 for tile in only.tiles}
    assert faster == {(c, r): WIDTHS[r] * LENGTHS[c] > 2000 for c in range(3) for r in range(3)}
    assert not any(tile.faint for tile in only.tiles)


def test_what_is_not_told_apart_from_1_is_pale(tmp_path):
    found = run(tmp_path)
    found.records.append(replace(timed("int8", 16, 256, 1.0)))
    found.records.append(replace(timed("int8", 16, 512, 1.0), status="failed", error="out of memory: no"))
    [only] = maps.figures(found, {table.key: table for table in speed.phases(found)})
    pale = [(tile.row, tile.column, tile.mark) for tile in only.tiles if tile.faint]
    assert pale == [(3, 0, maps.NOT_TOLD)], "and what did not fit has no tile"


def test_attention_alone(tmp_path):
    [_, attention] = speed.phases(run(tmp_path, (8,)))
    assert attention.cell("int8", "8 · 1024").value == pytest.approx(4, rel=0.05), (
        "half of the base, a quarter of its own"
    )
    assert attention.cell("full, ms", "8 · 1024").value == pytest.approx(0.01 * 8 * 1000 / 4, rel=0.05)
    assert attention.cell("full, % of its step", "8 · 1024").value == pytest.approx(25, rel=0.01)
    older = [replace(r, attention_seconds=[], baseline_attention_seconds=[]) for r in run(tmp_path).records]
    assert [t.key for t in speed.phases(Run(tmp_path, FACTS, older))] == ["decode"]


def test_attention_of_layers_that_did_not_run_is_counted():
    [one] = attention_alone([timed("int8", 1, 256, 1.0, scale=4.0, rest_seconds=[0.001] * 8)])
    assert one.seconds == pytest.approx([4 * t / 4 for t in timed("int8", 1, 256, 1.0).seconds])
    assert one.scale == 1


def test_a_page_shows_the_map(tmp_path):
    report = analyse(run(tmp_path))
    assert [f.key for f in report.figures if isinstance(f, Map)] == ["map:decode:int8"]
    page = render([report])
    assert "int8: decode speed, batch by length" in page
    assert page.count('class="tile') == 9


def test_the_papers_figures_have_ours(tmp_path):
    fig1, fig3, fig6 = paper.figures(["fig1", "fig3", "fig6"], [Run(tmp_path, FACTS, []), run(tmp_path)], None)
    ours = {row.key[0]: row.cells["ours"].value for row in fig1.rows if "ours" in row.cells}
    assert ours["decode, length 1,024, batch 1, 2, 8: int8, × full"] == "0.50, 2.00, 2.00"
    assert ours["attention alone, length 1,024, batch 1, 2, 8: int8, × full"] == "1.00, 4.00, 4.00"
    ours = {row.key[0]: row.cells["ours"].value for row in fig3.rows}
    assert ours["batch 8, length 256, 512, 1,024: full, ms a step"].startswith("2")
    assert not any("ours" in row.cells for row in fig6.rows), "nothing was scored"
