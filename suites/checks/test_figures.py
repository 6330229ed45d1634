"""What is drawn: the same numbers as in the tables, of whoever has some, and sentences that say what they come to."""

import math
import re
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from kvsuite.analysis.figure import DOTS, Axis, Figure, Point, Series, thinned
from kvsuite.analysis.figures import figures
from kvsuite.analysis.report import analyse
from kvsuite.analysis.speed import break_evens
from kvsuite.analysis.table import Cell, Row, Table
from kvsuite.records import Answer, Timing, read
from kvsuite.report.html.labels import Box, place
from kvsuite.report.html.scale import Scale, number
from kvsuite.report.html.svg import draw
from suites.checks import planted
from suites.checks import test_partial as partial
from suites.checks.test_decision import forced, speed
from suites.checks.test_served_analysis import both

REPORTS = Path(__file__).parents[2] / "reports" / "cpu"


def drawn(report):
    return {figure.key: figure for figure in report.figures}


def of(figure, arm, draws):
    [series] = [s for s in figure.series if s.arm == arm and s.draws == draws]
    return series.points


@pytest.fixture(scope="module")
def smoke():
    return analyse(read(REPORTS / "smoke"))


@pytest.fixture(scope="module")
def vllm():
    return analyse(read(REPORTS / "vllm"))


def ends(point, along="y"):
    return getattr(point, along), point.low, point.high


def test_what_is_drawn_is_what_the_tables_say(smoke):
    found, told = drawn(smoke), smoke.run.facts["methods"]
    for arm in (m for m in told if m not in ("full", "jitter", "jitter:seed=1")):
        held = smoke.cell("decision", arm, "held").value
        for key, table, row, column in (
            ("tradeoff:divergence", "divergence:document", arm, "kl"),
            ("tradeoff:quality", "verdicts", (arm, "quality"), "effect"),
        ):
            [point] = of(found[key], arm, "points")
            cell = smoke.cell(table, row, column)
            assert (point.x, *ends(point)) == (held, cell.value, cell.low, cell.high)
        cost = smoke.cell("length:chat", arm, "cost")
        [point] = of(found["length:chat"], arm, "points")
        assert ends(point, "x") == (cost.value, cost.low, cost.high)
        for point in of(found["speed:8"], arm, "line"):
            cell = smoke.cell("decode", arm, f"8 · {point.x}")
            assert ends(point) == (cell.value, cell.low, cell.high)
    noise = smoke.cell("divergence:document", "jitter", "kl")
    [band, margin] = found["tradeoff:divergence"].bands
    assert (band.low, band.high, margin.low) == (noise.low, noise.high, noise.value + 0.02)


def test_break_even_is_marked_where_the_table_has_it(smoke):
    evens = break_evens([r for r in smoke.run.records if isinstance(r, Timing)])
    marks = {mark.arm: mark for mark in drawn(smoke)["speed:8"].marks}
    assert set(marks) == {"kivi:bits=4", "int4", "streaming-llm:budget=128", "h2o:budget=128"}
    for arm, mark in marks.items():
        assert mark.at == evens[arm, 8].length == smoke.cell("decision", arm, "from").value
        assert (mark.low, mark.high) == evens[arm, 8].pieces[0]


def test_documents_are_dots_and_positions_a_line():
    documents = [forced("full"), forced("jitter", 2e-4), forced("m", 0.01)]
    run = partial.run(*documents, methods=["full", "jitter", "m"])
    found = {figure.key: figure for figure in figures(run, {})}
    mine = [r for r in run.records if r.method == "m"]
    dots = [p.x for p in of(found["divergence:documents"], "m", "dots")]
    assert dots == pytest.approx(sorted(float(np.mean(r.kl)) for r in mine))
    line = of(found["divergence:positions"], "m", "line")
    assert [p.x for p in line] == [4 * i + 2 for i in range(16)]
    assert line[3].y == pytest.approx(np.mean([r.kl[12:16] for r in mine]))


def test_of_many_methods_those_that_no_other_beats_are_named_and_no_name_hides_another():
    """Forty methods at the same place, and one that holds less and changes less than all of them."""
    names = [f"one-of-many:budget=0.{i}" for i in range(10, 50)]
    many = [forced(name, 0.2 + i / 1000, nbytes=50 + i % 3) for i, name in enumerate(names)]
    methods = ["full", "jitter", *names, "best"]
    run = partial.run(forced("full"), forced("jitter", 2e-4), *many, forced("best", 0.01, nbytes=20), methods=methods)
    held = Table("decision", "", rows=[Row((r.method,), {"held": Cell(r.nbytes / 100)}) for r in run.records])
    figure = {f.key: f for f in figures(run, {"decision": held})}["tradeoff:divergence"]
    assert figure.series[0].arm == "best"
    assert all(p.low is None for series in figure.series for p in series.points)
    said = re.findall(r'x="([-\d.]+)" y="([-\d.]+)" text-anchor="start" class="label">([^<]*)', draw(figure, {}, "f"))
    assert "best" in [name for *_, name in said]
    assert 1 < len(said) < 41
    boxes = [Box(float(x), float(y) - 11, float(x) + 7.2 * len(name), float(y) + 3) for x, y, name in said]
    assert all(one.common(other) < 1 for one, other in combinations(boxes, 2))


def test_a_distribution_of_many_keeps_its_shape():
    values = np.random.default_rng(0).lognormal(size=5000)
    few = thinned(values.tolist())
    assert len(few) == DOTS
    assert np.quantile(few, [0.25, 0.5, 0.75]) == pytest.approx(np.quantile(values, [0.25, 0.5, 0.75]), rel=0.05)
    assert thinned([3, 1, 2]) == [1, 2, 3]


def test_regressed_samples_are_counted_by_type():
    def scores(method, lost):
        return [
            Answer(
                method, task=task, type=kind, sample=f"{task}{i}", score=float((task, i) not in lost), tokens=[i], cap=9
            )
            for task, kind in (("a", "qa"), ("b", "code"), ("c", "qa"))
            for i in range(5)
        ]

    lost = {("a", 0), ("a", 1), ("c", 4), ("b", 2)}
    run = partial.run(scores("full", ()), scores("jitter", {("b", 0)}), scores("m", lost))
    found = {figure.key: figure for figure in figures(run, {})}["regressed"]
    shares = {(s.arm, found.y.rows[int(p.y)]): p for s in found.series for p in s.points}
    assert {key: (p.x, p.said) for key, p in shares.items()} == {
        ("qa", "m"): (30.0, "3 of 10"), ("code", "m"): (20.0, "1 of 5"),
        ("qa", "jitter"): (0.0, "0 of 10"), ("code", "jitter"): (20.0, "1 of 5"),
    }  # fmt: skip


@pytest.mark.parametrize("arms", [1, 3])
@pytest.mark.parametrize("kinds", [1, 2])
def test_bars_of_a_row_do_not_hide_each_other(arms, kinds):
    points = [Point(10.0, at, 5.0, 20.0) for at in range(arms)]
    series = [Series(f"type {k}", f"type {k}", points, "bars") for k in range(kinds)]
    names = tuple(f"m{at}" for at in range(arms))
    drawn_ = draw(Figure("k", "t", Axis("x", shown=(0.0,)), Axis("y", rows=names), series), {}, "f")
    bars = [bar for bar in ElementTree.fromstring(drawn_).iter("rect") if bar.get("class") == "b"]
    tops = sorted(float(bar.get("y")) for bar in bars)
    assert len(tops) == arms * kinds
    assert all(below - above >= float(bars[0].get("height")) for above, below in pairwise(tops))


def test_of_latency_failed_requests_are_never_answered():
    records = both({"baseline": 1.0, "m": 2.0})
    records[0] = replace(records[0], status="failed", error="x")
    facts = {"baseline": "baseline", "controls": [], "servers": {}, "methods": ["baseline", "m"]}
    [found] = [f for f in figures(partial.run(records, **facts), {}) if f.key.startswith("latency")]
    base, mine = of(found, "baseline", "steps"), of(found, "m", "steps")
    assert (base[-1].y, mine[-1].y) == (pytest.approx(100 * 47 / 48), 100)
    assert max(p.x for p in mine) == pytest.approx(2.4 * 1.02)


def test_servers_have_room_and_bytes_a_token(vllm):
    found = drawn(vllm)
    assert [s.points[0].x for s in found["capacity"].series] == [46592, 46592, 93184, 93184]
    assert of(found["tradeoff:quality"], "fp8_e4m3", "points")[0].x == pytest.approx(0.5)
    assert "stored for a token" in found["tradeoff:quality"].x.name


def test_what_was_not_measured_has_no_figure():
    assert analyse(partial.run(methods=[])).figures == []
    alone = analyse(partial.run([speed("full", 1.0), speed("m", 1.1)], methods=["full", "m"]))
    assert alone.figures == [], "one length is no line"
    slow = [replace(speed("m", 2.0, n), path="m/reference") for n in (512, 1024)]
    assert analyse(partial.run(slow)).figures == [], "PyTorch's speed is no method's"


def test_one_sentence_a_method(smoke, vllm):
    said = {s.method: (s.tone, f"{s.lead}. {s.text}") for s in (*smoke.sentences, *vllm.sentences)}
    assert said["int8"] == (
        "good",
        "Use it. It needs 53 % of the cache's memory and decodes 1.13 times as fast.",
    )
    assert said["int4"] == (
        "bad",
        "Damaged. Its next words drift from the model's (KL 0.071 beyond noise) and it predicts text 7 % worse. It "
        "needs 28 % of the cache's memory and decodes 1.20 times as fast.",
    )
    assert said["fp8_e4m3"] == ("open", "Cannot tell yet. It needs 50 % of the cache's memory for a token.")
    assert said["fp8_e5m2"][1].startswith("Damaged. Its answers are 0.68 times as long and it cuts 31 % of the answers")
    assert len(said) == 9
    [served] = analyse(planted.run(planted.probes(), planted.needles(64), planted.loads())).sentences
    assert re.search(r"decodes 1.\d\d times as fast, within noise\.$", served.text)


def test_what_a_run_cannot_tell(smoke):
    assert smoke.limits[0].startswith("SmolLM2-135M-Instruct is a small model.")
    assert "No context was longer than 1,053 tokens." in smoke.limits
    assert any(said.startswith("Quality and truncation can only convict here") for said in smoke.limits)
    for name, small in (("Qwen3-8B", False), ("x-1.7b", True), ("llama", False), ("a135Mb", False)):
        found = analyse(partial.run(partial.needles("full"), model={"name": name}, methods=["full"]))
        assert ("is a small model" in found.limits[0]) == small, name
        assert "No control ran, so it is not known what noise alone does." in found.limits


def test_a_price_is_made_of_the_largest_cell(smoke, vllm):
    assert smoke.throughput.where == "decoding at batch 8, 1,024 tokens of context"
    cell = smoke.cell("timings", ("int8", "decode", "8", "1024"), "rate")
    assert smoke.throughput.rates["int8"] == cell.value
    assert "jitter" not in smoke.throughput.rates
    rate = vllm.cell("served", ("closed:4 1024 tokens", "baseline"), "rate").value
    assert vllm.throughput.rates == {"baseline": rate}, "what cannot be believed has none"
    served = analyse(planted.run(planted.probes(), planted.needles(64), planted.loads()))
    assert served.throughput.rates["m"] == served.cell("served", ("closed:8", "m"), "rate").value


# scales and names


@pytest.mark.parametrize(
    ("values", "log", "ticks"),
    [
        ((0, 100), False, [0, 20, 40, 60, 80, 100]),
        ((0.97, 1.31), False, [1.0, 1.1, 1.2, 1.3]),
        ((0.001, 0.2), True, [0.001, 0.01, 0.1]),
        ((0.5, 2), True, [0.5, 1, 2]),
        ((5, 5), False, [5]),
    ],
)
def test_ticks_are_round(values, log, ticks):
    scale = Scale.over(values, (), 0, 100, log)
    found = scale.ticks(6)
    assert all(any(math.isclose(x, wanted, abs_tol=1e-9) for x in found) for wanted in ticks)
    assert 1 <= len(found) <= 8
    places = [scale.at(x) for x in found]
    assert places == sorted(places)
    assert 0 <= places[0] <= places[-1] <= 100


def test_an_open_interval_ends_at_the_edge():
    scale = Scale.over([1, 2], [-math.inf, math.inf, 50], 0, 100)
    assert (scale.at(-math.inf), scale.at(math.inf), scale.at(50)) == (0, 100, 100)
    assert 2 < scale.high < 4, "a wide interval does not squeeze the points"
    assert Scale.over([0, -1, math.nan], (), 0, 1, log=True) is None


@pytest.mark.parametrize(("x", "said"), [(0, "0"), (1234, "1,234"), (0.25, "0.25"), (2e-5, "2e-5"), (math.inf, "∞")])
def test_numbers_are_short(x, said):
    assert number(x) == said


def test_names_do_not_hide_each_other():
    frame, taken = Box(0, 0, 400, 300), []
    for x, y in ((100, 100), (104, 102), (108, 99), (395, 100), (5, 295)):
        box = place(x, y, 60, taken, frame)
        assert all(box.common(other) == 0 for other in taken)
        assert box.common(frame) == pytest.approx(box.area)
        taken.append(box)
