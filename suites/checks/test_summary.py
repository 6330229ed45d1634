"""From records to figures: what the reports show of a run."""

import io
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as oracle

from kvsuite.analysis.effects import compare, decided
from kvsuite.analysis.length import cost_interval, length_rows
from kvsuite.analysis.report import analyse, provenance
from kvsuite.analysis.runs import parts
from kvsuite.analysis.samples import sample_rows
from kvsuite.analysis.speed import speed_rows
from kvsuite.analysis.stats import Estimate, mean_interval
from kvsuite.analysis.table import Cell, Column, Row, Table
from kvsuite.analysis.tables.speed import by_what
from kvsuite.analysis.tables.verdicts import COLUMNS, distinct, effect_row
from kvsuite.analysis.trimmed import log_ratio_interval
from kvsuite.analysis.verdict import effect, judge
from kvsuite.errors import UsageError
from kvsuite.margins import Margins
from kvsuite.records import Answer, Run, Timing
from kvsuite.report import markdown, terminal
from suites.checks.drawn import drawn, tables

SCORED = "kvsuite.cache.layer.LayerCache/reference"


def answer(at, method="full", **more):
    given = {"task": "needle", "score": 1.0, "tokens": [1, 2, 3], "nbytes": 100, "prompt_tokens": 50, "finish": "stop"}
    given |= {"prefill_seconds": 0.5, "decode_share": 0.1, "cap": 9, "nbytes_end": 50, "dense_end": 100}
    return Answer(method, sample=f"s{at}", **given | more)


def test_figures_of_a_method():
    full = [answer(i, nbytes=400) for i in range(4)]
    mine = [answer(0, "m"), answer(1, "m", score=0.0, tokens=[1, 9]), answer(2, "m")]
    mine.append(answer(3, "m", status="failed", error="out of memory", score=None))
    found = sample_rows(full + mine)[1]
    assert (found.method, found.n, found.failed, found.pairs, found.same) == ("m", 4, 1, 3, 2)
    assert found.error == "out of memory"
    assert found.score.mean == pytest.approx(2 / 3)
    assert found.ratio == 0.25
    assert found.prefill == pytest.approx(100)
    assert found.decode == pytest.approx((2 + 1 + 2) / 0.3)


def test_lengths_of_scored_answers_stand_beside_the_scores():
    *_, table = tables(
        run([answer(0, tokens=[1] * 4), answer(1, tokens=[1] * 6)] + [answer(s, "m", tokens=[1] * 15) for s in (0, 1)])
    )
    at = table.columns.index("tokens")
    assert table.columns[at + 1] == "×"
    assert [row[at : at + 2] for row in table.rows] == [
        ["5", "1.00 (1.00–1.00)"],
        ["15", "3.00 (0.23–39.43)"],
    ]  # two pairs tell little


def test_bytes_read_and_empty_slots_have_columns_where_they_tell_something():
    def shown(**more):
        *_, table = tables(run([answer(0, read_end=50), answer(0, "m", **more)]))
        return table.columns, table.rows[1]

    assert "read" not in shown(read_end=50, fragmentation=0.01)[0]
    for more, said in (({"read_end": 20}, ["0.40", "0.0"]), ({"read_end": 50, "fragmentation": 0.3}, ["1.00", "30.0"])):
        columns, row = shown(**more)
        assert columns[8:10] == ["read", "empty, %"]
        assert row[8:10] == said
        assert len(row) == len(columns)


def test_a_method_that_always_failed_has_no_figures():
    found = sample_rows([answer(0), answer(0, "m", status="failed", error="x")])[1]
    assert (found.failed, found.score, found.pairs) == (1, None, 0)


def test_cost_of_an_arm_and_its_control():
    full = [answer(i, tokens=[1] * n) for i, n in enumerate((2, 4, 6))]
    again = [answer(i, tokens=[1] * n, repeat=1) for i, n in enumerate((4, 4, 4))]
    mine = [answer(i, "m", tokens=[1] * n, finish="length") for i, n in enumerate((3, 8, 9))]
    first, control, method = length_rows(full + again + mine)
    assert (first.cost.mean, first.cost.low, first.cost.high) == (1, 1, 1)
    assert (control.method, control.control, control.cost.mean) == ("full", True, 1)
    assert (control.longer, control.shorter) == (1, 1)
    assert method.cost.mean == pytest.approx(20 / 12)
    assert (method.capped, method.baseline_capped, method.longer, method.shorter) == (3, 0, 2, 0), "than 4, 4, 4"
    assert (first.ratio, method.ratio) == (1, 1)
    assert (control.d, method.d) == ((1 / 3, 1 / 3), (2 / 3, 0)), "2, 4, 6 and 3, 8, 9 than 4, 4, 4"


def test_where_answers_part_is_told_of_arms_whose_tokens_are_known():
    full = [answer(i, tokens=[1, 2, 3, 4, 5]) for i in range(3)]
    mine = [answer(i, "m", tokens=[*range(1, at + 1), 9]) for i, at in enumerate((1, 3, 4))]
    for rows in (length_rows(full + mine), sample_rows(full + mine)):
        assert rows[0].parted is None, "itself"
        assert rows[1].parted.mean == 3
    unknown = [replace(a, tokens=[]) for a in full + mine]
    assert [row.parted for row in (*length_rows(unknown), *sample_rows(unknown))] == [None] * 4


def test_of_full_is_bytes_a_token_against_fulls_whatever_the_answers_length():
    full = [answer(i, nbytes_end=120, dense_end=100) for i in range(3)]
    mine = [answer(i, "m", nbytes_end=30 * n, dense_end=100 * n) for i, n in enumerate((1, 2, 3))]
    assert [row.ratio for row in length_rows(full + mine)] == [1, pytest.approx(0.25)]


def test_a_failure_is_no_short_answer():
    rows = length_rows([answer(0), answer(1), answer(0, "m"), answer(1, "m", status="failed", error="x", tokens=[])])
    assert (rows[1].pairs, rows[1].failed, rows[1].cost.mean) == (1, 1, 1)


def test_different_caps_are_refused():
    with pytest.raises(UsageError, match="sample s0: m had a cap of 5 tokens, the baseline 9"):
        length_rows([answer(0), answer(0, "m", cap=5)])


def timing(**more):
    given = {
        "cache": SCORED,
        "path": "m/reference",
        "checked": 0.3,
        "tokens": 8,
        "seconds": [0.1] * 4,
        "baseline_seconds": [0.2] * 4,
    }
    return Timing("m", width=8, length=512, **given | more)


def test_speed_is_a_ratio_of_paired_rounds():
    row = speed_rows([timing(seconds=[0.1, 0.2, 0.4], baseline_seconds=[0.2, 0.4, 0.8])])[0]
    assert row.speedup.mean == pytest.approx(2)
    assert row.speedup.high - row.speedup.low < 1e-9
    assert row.rate == pytest.approx(8 / 0.2)


@pytest.mark.parametrize("checked", [None, 1.5])
def test_a_timing_of_our_cache_that_was_not_checked_is_refused(checked):
    with pytest.raises(UsageError, match="without its output being checked"):
        speed_rows([timing(checked=checked)])
    assert speed_rows([timing(cache="transformers.cache_utils.DynamicCache", checked=None)])[0].rate


def test_the_cache_that_is_scored_is_the_cache_that_is_timed_method_by_method():
    other = "kvsuite.cache.layer.LayerCache/triton"
    same = [answer(0, "m", cache=SCORED), timing(), answer(0, "n", cache=other)]
    [said] = provenance(same)
    assert (said.text, said.severity) == (f"Scored and timed: the same {SCORED}.", "info")
    [apart] = provenance([*same, timing(cache=other)])
    assert (apart.text, apart.severity) == (f"NOT THE SAME CACHE SCORED AND TIMED: m {other}.", "error")
    assert provenance([answer(0, "n", cache=other), timing()]) == [], "no method was both"


def test_a_method_without_a_kernel_is_named():
    def said(*paths, gpu="a GPU", **more):
        timings = [replace(timing(path=p, **more), method=f"m{i}") for i, p in enumerate(paths)]
        return " ".join(by_what(speed_rows(timings), gpu))

    assert "PyTorch reference, no kernel" in said("full/reference", "int8/unfused"), "as it is called, and was"
    assert said("full/triton", "int8/triton") == "Steps and attention are Triton kernels."
    assert "not to be ranked by speed) for m1." in said("full/triton", "int8/reference")
    assert said("", status="failed", error="x") == "", "nothing is claimed of what no record says"
    assert "PyTorch reference" in said("full/reference", gpu=None, status="failed", error="x")
    assert "are Triton kernels" not in said("full/triton", gpu=None)
    assert said("full/cpu", "int8/cpu", gpu=None) == "Steps and attention are C++, compiled for this CPU."
    assert "not to be ranked by speed) for m1." in said("full/cpu", "int8/reference", gpu=None)
    why = said("full/reference", "int8/reference", gpu=None, refusal="cpu: no C++ compiler")
    assert why.endswith("all methods on cpu: reference, because cpu: no C++ compiler.")


def test_the_length_from_which_a_method_pays_is_told():
    def cells(name, fixed, slope):
        """A step of full takes 10 + length / 1,000 ms."""
        noise = (0.9999, 1.0, 1.0001)
        for length in (1000, 4000, 8000):
            base = [(10 + length / 1000) / 1000 * 2 * x for x in noise]
            mine = [(10 + fixed + length * slope / 1000) / 1000 * 2 * x for x in reversed(noise)]
            yield replace(timing(seconds=mine, baseline_seconds=base, tokens=4), method=name, length=length, width=2)

    every = [*cells("later", 2, 0.5), *cells("always", -1, 0.5), *cells("never", 1, 1.5), *cells("short", -3, 2)]
    (said,) = [note for note in tables(run(every))[0].notes if "by the line" in note]
    found = re.match(r".*batch 2: later from ([\d,]+) tokens \(([\d,]+) to ([\d,]+)\) on; (.*)\.", said)
    at, low, high = (int(x.replace(",", "")) for x in found.groups()[:3])
    assert 3950 < low < 4000 < high < 4050
    assert abs(at - 4000) < 10
    assert found[4].startswith("always at every length; never at no length; short up to 3,0")
    assert not any("by the line" in note for table in tables(run(every[:1])) for note in table.notes)


@pytest.mark.parametrize("rounds", [(0, 0), (1, 1), (1, 0), (3, 2)], ids=str)
def test_without_two_pairs_of_rounds_nothing_was_measured(rounds):
    """--benchmark-disable runs a round once; it printed 1.17 ± inf."""
    seconds, before = ([0.1] * n for n in rounds)
    cut = [timing(seconds=seconds, baseline_seconds=before, phase=p) for p in ("decode", "prefill", "width")]
    *_, decode, prefill, promises = tables(run(cut))
    assert decode.rows[-1] == ["m, ×", "not measured"]
    assert prefill.rows[-1] == ["m, ×", "not measured"]
    assert promises.rows == [["width: m", "not measured"]]
    report = markdown.render(analyse(run(cut)))
    assert "pairs of rounds)" not in report
    assert "inf" not in report
    assert speed_rows([timing(seconds=[0.1] * 2, baseline_seconds=[0.2] * 2)])[0].speedup.mean == pytest.approx(2)


ENVIRONMENT = {
    "cpu": "one", "cores": 2, "gpu": None, "threads": 2, "dtype": "bfloat16", "python": "3.11", "packages": {},
    "git": None, "kvsuite": "0",
}  # fmt: skip


def run(records, environment=None, **facts):
    known = {"started": "today", "command": [], "preset": "smoke", "model": {"name": "tiny"}, "methods": []}
    settings = {"length": [64], "batch": [1], "compress": "prompt", "temperature": 0}
    return Run(
        Path("left"), {**known, "settings": settings, "environment": environment or ENVIRONMENT, **facts}, records
    )


def test_a_title_names_the_prompts_that_were_read():
    found = run([answer(i, prompt_tokens=n) for i, n in enumerate((700, 90, 412))])
    assert tables(found)[-1].title.startswith("needle · 3 samples of 90–700 tokens · ")


def test_both_number_formats_are_named_where_they_differ():
    records = [answer(0), timing(), timing(phase="prefill")]
    new = ENVIRONMENT | {"compute_dtype": "float32", "kv_dtype": "bfloat16", "dtype_reason": "this CPU has no bfloat16"}
    for table in tables(run(records, new)):
        if not table.title.startswith(("verdicts", "beside")):
            assert "tiny, float32 compute, bfloat16 K/V, 2 threads" in table.title
            assert "Computed in float32; K and V are stored in bfloat16: this CPU has no bfloat16." in table.notes
    assert "float32 compute, bfloat16 K/V (this CPU has no bfloat16) · " in markdown.render(analyse(run(records, new)))
    for same in (ENVIRONMENT, new | {"compute_dtype": "bfloat16"}):
        assert all("compute" not in word for t in tables(run(records, same)) for word in (t.title, *t.notes))


def test_the_command_can_be_pasted():
    command = ["-m", "throughput or length", "--kv-methods", "h2o:budget=64 + int8"]
    said = markdown.render(analyse(run([answer(0)], command=command)))
    assert "`pytest -m 'throughput or length' --kv-methods 'h2o:budget=64 + int8'`" in said


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_ratio_is_drawn_beside_its_value(width):
    names, file = ("tok/s", "×", "TTFT s", "×", "TPOT ms", "×", "at cap"), io.StringIO()
    figures = ["40", "1.00 (0.92–1.07)", "5.33", "1.16 (0.52–2.58)", "62", "1", "4/8"]
    columns = [Column(str(at), name, beside=name == "×") for at, name in enumerate(names)]
    cells = {str(at): Cell(figure) for at, figure in enumerate(figures)}
    rows = [Row((load, "again"), cells) for load in ("closed:4 1024 tokens", "closed:8 1024 tokens")]
    terminal.write([Table("served", "served", ("load", "arm"), columns, rows)], file, width)
    lines = [line for line in file.getvalue().splitlines() if "40" in line or "5.33" in line or "62" in line]
    for value, ratio in (("40", "1.00 (0.92–1.07)"), ("5.33", "1.16 (0.52–2.58)")):
        assert any(value in line and ratio in line for line in lines)
    assert all(len(line.rstrip()) <= width for line in file.getvalue().splitlines())


def shown(seen):
    """The row of an effect in the table of verdicts."""
    return drawn(Table("", "", ("method", "endpoint"), COLUMNS, [effect_row("m", seen)])).rows[0]


def beside(seen):
    """An effect as ``kvsuite negatives`` shows it: its interval beside it, in a table of details."""
    row = effect_row("m", seen)
    cells = {"effect": replace(row.cells["effect"], unit="")}
    columns = [Column("effect", "", "pt", shows="range")]
    table = Table("", "", ("method", "endpoint"), columns, [replace(row, cells=cells)], detail=True)
    return drawn(table).rows[0][-1]


@pytest.mark.parametrize(
    ("endpoint", "low", "high", "printed", "verdict"),
    [
        ("length", 0.981, 1.0299, "0.98, 1.03", "within margin"),
        ("length", 0.68, 1.0301, "0.68, 1.03", "undecided"),
        ("length", 1.0304, 1.2, "1.0304, 1.2000", "harmful"), ("length", 0.68, 1.1, "0.68, 1.10", "undecided"),
        ("length", 0.68, 0.9, "0.68, 0.90", "harmful"),
        ("quality", -0.0104, 0.0, "-1.04, +0.00", "undecided"),
        ("quality", -0.0096, 0.0, "-1.0, +0.0", "within margin"),
        ("quality", -0.2, -0.010001, "-20.0000, -1.0001", "harmful"),
    ],
)  # fmt: skip
def test_a_printed_interval_lies_where_its_verdict_says(endpoint, low, high, printed, verdict):
    """0.68, 1.03 stood beside 'within margin' and beside 'undecided'."""
    ratio, margin, worse = endpoint == "length", *((0.03, 0) if endpoint == "length" else (0.01, -1))
    seen = effect(endpoint, Estimate((low + high) / 2, low, high, 0.1, 9), margin, worse, 9, ratio)
    found = shown(replace(seen, verdict=judge(seen.estimate, seen.limits)))
    assert (found[3], found[5]) == (printed, verdict)


def test_kvsuite_negatives_prints_by_the_same_rule():
    seen = effect("quality", Estimate(0, -0.01004, 0, 0.1, 9), 0.01, -1, 9)
    assert (seen.verdict, beside(seen)) == ("undecided", "+0.000 (-1.004 to +0.000)")
    assert beside(replace(seen, estimate=Estimate(0, -0.2, 0))) == "+0.00 (-20.00 to +0.00)"


@pytest.mark.parametrize(("low", "needs"), [(-0.5, True), (-0.005, False), (-0.9, False)])
def test_samples_are_needed_where_there_is_no_verdict(low, needs):
    """'needs 10' stood beside 100 points lost."""
    high = {-0.5: 0.1, -0.005: 0.1, -0.9: -0.5}[low]
    seen = effect("quality", Estimate((low + high) / 2, low, high, 0.1, 9), 0.01, -1, 9)
    found = shown(replace(seen, verdict=judge(seen.estimate, seen.limits)))
    assert (found[6] != "-", found[7] != "-") == (needs, needs)


@pytest.mark.parametrize(("healed", "noise", "rows"), [(0, 0, 1), (1, 0, 2), (0, 1, 2)])
def test_broken_has_a_row_where_it_is_not_quality_once_more(healed, noise, rows):
    full = [answer(i, score=float(i >= healed), text="a") for i in range(20)]
    mine = [answer(i, "m", score=float(i >= 5 or i < healed), text="b") for i in range(20)]
    control = [answer(i, "jitter", score=float(healed <= i < 20 - noise), text="c") for i in range(20)]
    [row], _ = decided(compare(parts(run(full + mine + control))))
    assert [e.endpoint for e in row.effects] == ["quality", "broken"]
    assert len(distinct(row)) == rows
    margins = Margins(quality=0.9, broken=0.01)
    [row], _ = decided(compare(parts(run(full + mine + control)), margins), margins)
    assert len(distinct(row)) == 2, "another margin, another verdict"


def test_a_failed_cell_has_no_speed():
    row = speed_rows([timing(status="failed", error="TimeoutError", checked=None)])[0]
    assert (row.failed, row.rate, row.error) == (True, None, "TimeoutError")


def test_wilson_covers_as_it_should():
    draw = np.random.default_rng(0)
    found = [mean_interval((draw.random(16) < 0.8).astype(float)) for _ in range(2000)]
    assert 0.93 <= sum(i.low <= 0.8 <= i.high for i in found) / 2000 <= 0.99


def test_the_bootstrap_interval_of_other_scores():
    scores = np.random.default_rng(1).random(200)
    interval, half = mean_interval(scores), 1.96 * scores.std() / 200**0.5
    assert interval.low == pytest.approx(scores.mean() - half, abs=0.006)
    assert interval.high == pytest.approx(scores.mean() + half, abs=0.006)


def test_the_interval_of_a_ratio_of_sums_covers_it():
    draw, hits = np.random.default_rng(2), 0
    for _ in range(60):
        theirs = draw.integers(20, 200, 80)
        interval = cost_interval(theirs * draw.lognormal(0, 0.5, 80) / math.exp(0.125), theirs, [10**4] * 80)
        hits += interval.low <= 1 <= interval.high
    assert hits >= 52


def test_the_interval_of_a_speed_ratio_covers_it():
    draw, hits = np.random.default_rng(3), 0
    for _ in range(4000):
        interval = log_ratio_interval(draw.normal(math.log(1.3), 0.1, 6))
        hits += interval.low <= 1.3 <= interval.high
    assert 3740 <= hits <= 3860


@pytest.mark.parametrize("n", [6, 12, 40])
def test_one_block_that_was_held_up_does_not_widen_the_interval_of_speed(n):
    blocks = np.random.default_rng(n).normal(math.log(1.3), 0.02, n)
    clean = log_ratio_interval(blocks)
    blocks[0] += math.log(3)
    found = log_ratio_interval(blocks)
    assert found.high - found.low < 2 * (clean.high - clean.low)
    assert found.mean == pytest.approx(clean.mean, rel=0.02)


def test_the_trimmed_mean_and_its_error_are_scipys():
    blocks = np.random.default_rng(0).normal(0, 1, 17)
    found = log_ratio_interval(blocks)
    cut = oracle.mstats.winsorize(blocks, (3 / 17, 3 / 17))
    assert found.mean == pytest.approx(math.exp(oracle.trim_mean(blocks, 3.001 / 17)))
    assert found.se**2 == pytest.approx(16 * float(np.var(cut, ddof=1)) / (11 * 10))
    assert found.df == 10
