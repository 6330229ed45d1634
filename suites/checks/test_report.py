"""A report is computed once; whoever draws it shows the same figures, and what is missing is loud."""

import io
import json
import math
import re
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from kvsuite.analysis import stats
from kvsuite.analysis.report import analyse
from kvsuite.analysis.table import Cell, Column, Note, Row, Table
from kvsuite.cli import main
from kvsuite.errors import UsageError
from kvsuite.records import Answer, read
from kvsuite.report import as_json, markdown, terminal, text
from suites.checks import forked
from suites.checks import test_partial as partial
from suites.checks import test_served_analysis as servers
from suites.checks.depth import by_night

REPORTS = Path(__file__).parents[2] / "reports" / "cpu"
VLLM = REPORTS / "vllm"


@pytest.fixture
def bootstraps(monkeypatch):
    """What was resampled so far."""
    calls, bootstrap = [], stats.bootstrap

    def counted(design, columns, *rest):
        calls.append(columns.tobytes())
        return bootstrap(design, columns, *rest)

    monkeypatch.setattr(stats, "bootstrap", counted)
    return calls


def test_nothing_is_resampled_twice(bootstraps):
    analyse(read(VLLM))
    assert len(bootstraps) == len(set(bootstraps)) > 3


@pytest.mark.parametrize("form", [[], ["--markdown"], ["--json"]], ids=str)
def test_the_command_computes_a_report_once(bootstraps, capsys, form):
    analyse(read(VLLM))
    once = len(bootstraps)
    assert main(["report", str(VLLM), *form]) == 0
    assert len(bootstraps) == 2 * once
    assert "fp8_e5m2" in capsys.readouterr().out


def test_a_baseline_that_guesses_clears_no_method_by_its_score():
    """A task in which it does is told, and stays in the mean; where it does so in all of them the score tells
    nothing."""
    run = read(REPORTS / "standard")
    report = analyse(run)
    table = report.table("headlines")
    assert [note.text.partition(":")[0] for note in table.notes] == ["COULD NOT TELL full"]
    assert "0.04 on 32 samples of instructions (guessing: 0.00)" in table.notes[0].text
    assert report.cell("verdicts", ("int8", "quality"), "effect").verdict == "within margin"
    sure = [replace(r, chance=1.0) if isinstance(r, Answer) else r for r in run.records]
    guessing = analyse(replace(run, records=sure))
    assert guessing.cell("verdicts", ("int8", "quality"), "effect").verdict == "cannot tell"
    assert guessing.cell("verdicts", ("h2o:budget=0.125", "quality"), "effect").verdict == "harmful"


OUTSIDE = """
def pytest_kv_report(report, terminalreporter):
    bound = report.cell("verdicts", ("fp8_e5m2", "length"), "effect").high
    terminalreporter.write_line(f"at most {bound:.4f} in {report.run.folder}, {report.run.facts['preset']}")
"""
COUNTING = """
import shutil
from kvsuite.analysis import stats
pytest_plugins = ("kvsuite.plugin", "outside")
calls, bootstrap = [], stats.bootstrap
def counted(*given):
    calls.append(given)
    return bootstrap(*given)
stats.bootstrap = counted
def pytest_unconfigure():
    print(f"resampled {len(calls)} times")
"""


def test_a_session_computes_its_report_once_for_all_plugins(pytester, bootstraps, monkeypatch):
    report = analyse(read(VLLM))
    monkeypatch.setenv("PYTHONPATH", f"{pytester.path}:{Path(__file__).parents[2]}")
    pytester.makeconftest(COUNTING)
    copy = "import shutil\ndef test_it(kv_session):\n    "
    copy += f"shutil.copytree({str(VLLM)!r}, kv_session.folder, dirs_exist_ok=True)"
    pytester.makepyfile(test_it=copy, outside=OUTSIDE)
    result = forked.run(["--kv-run", "left"], pytester.path)
    result.assert_outcomes(passed=1)
    bound = report.cell("verdicts", ("fp8_e5m2", "length"), "effect").high
    result.stdout.fnmatch_lines([f"at most {bound:.4f} in left, smoke", f"resampled {len(bootstraps)} times"])
    result.stdout.fnmatch_lines(["verdicts"])
    assert Path("left/report.md").read_text() == markdown.render(report)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("verdict", "m", "effect"), "unknown table of the report 'verdict': did you mean 'verdicts'?"),
        (
            ("verdicts", ("fp8_e5m2", "len"), "effect"),
            "unknown row of verdicts 'fp8_e5m2, len': did you mean 'fp8_e5m2, ",
        ),
        (("verdicts", ("fp8_e5m2", "length"), "p"), "unknown column of verdicts 'p': "),
    ],
)
def test_a_wrong_key_is_told(keys, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        analyse(read(VLLM)).cell(*keys)


# the same numbers, whoever draws them

NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?"


def as_tables(report):
    """The tables of a markdown report: by title, its rows of texts."""
    found = {}
    for part in report.split("\n## ")[1:]:
        title, *lines = part.split("\n")
        rows = [line.strip("| ").replace("\\|", "|").split(" | ") for line in lines if line.startswith("| ")]
        found[title] = rows[:1] + rows[2:]
    return found


def figures(cell, shows):
    """The numbers that stand where a part of a cell is shown, and the words where there are none."""
    ends = [cell.get("low"), cell.get("high")]
    pair = [cell["value"], *([cell["of"]] if "of" in cell else [])]
    half = [] if None in ends else [(ends[1] - ends[0]) / 2]
    shown = {"value": pair, "ends": ends, "half": [*pair, *half], "range": [*pair, *ends], "p": [cell.get("p")]}
    return shown.get(shows, cell.get("lacking", []))


def same(drawn, cell, shows):
    if shows == "verdict" and "verdict" in cell:
        return drawn.startswith(cell["verdict"])
    if isinstance(cell["value"], str):
        return drawn == (cell["value"] or "-")
    numbers = re.findall(NUMBER, drawn.removesuffix(cell["unit"]))
    wanted = [x if ">100" not in drawn else min(x, 100) for x in figures(cell, shows) if x is not None]
    if not numbers:
        return not wanted or drawn == "–"
    if "(–)" in drawn:
        wanted = wanted[:1]
    digits = [Decimal(number.replace(",", "")) for number in numbers]
    return len(digits) == len(wanted) and all(
        abs(float(x) - y) <= 0.5 * 10.0 ** x.as_tuple().exponent + 1e-9 for x, y in zip(digits, wanted, strict=True)
    )


@pytest.mark.parametrize("name", [f.parent.name for f in by_night(sorted(REPORTS.glob("*/run.json")))])
def test_every_number_in_json_is_the_one_that_is_drawn(name):
    report, compared = analyse(read(REPORTS / name)), 0
    found = json.loads(as_json.render(report), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    drawn = as_tables(markdown.render(report))
    assert [table["title"] for table in found["tables"]] == list(drawn)
    for table in found["tables"]:
        header, *rows = drawn[table["title"]] or [[]]
        assert header == [*table["heads"], *(column["name"] for column in table["columns"])]
        for row, texts in zip(table["rows"], rows, strict=True):
            assert texts[: len(row["names"])] == row["names"]
            for column, shown in zip(table["columns"], texts[len(row["names"]) :], strict=True):
                assert same(shown, row["cells"][column["key"]], column["shows"]), (
                    table["key"],
                    row["key"],
                    column,
                    shown,
                )
                compared += any(map(str.isdigit, shown))
    assert compared > 50


def test_a_cost_is_the_same_in_both_tables():
    report = analyse(read(VLLM))
    verdict, cost = (
        report.cell("verdicts", ("fp8_e5m2", "length"), "effect"),
        report.cell("length:chat", "fp8_e5m2", "cost"),
    )
    assert verdict.value == cost.value


def test_an_open_interval_is_null_in_json():
    answers = [*partial.chats("full", 1), *partial.chats("m", 1, length=30)]
    report = analyse(partial.run(answers))
    cell = report.cell("verdicts", ("m", "length"), "effect")
    assert (cell.value, cell.low, cell.high) == (1.5, 0, math.inf)
    tables = {table["key"]: table for table in json.loads(as_json.render(report))["tables"]}
    [row] = [row for row in tables["verdicts"]["rows"] if row["key"] == ["m", "length"]]
    shown = {key: row["cells"]["effect"][key] for key in ("state", "value", "unit", "low", "high", "limits")}
    assert shown == {
        "state": "ok", "value": 1.5, "unit": "×", "low": 0, "high": None,
        "limits": [pytest.approx(1 / 1.2), 1.2],
    }  # fmt: skip


# what is not there


def red(table):
    """What is red in a terminal."""
    file = type("Terminal", (io.StringIO,), {"isatty": lambda self: True})()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")
        patch.setenv("TERM", "xterm")
        terminal.write([table], file, 160)
    return [shown.strip() for shown in re.findall(r"\x1b\[31m(.*?)\x1b\[0m", file.getvalue())]


STATES = {"failed": "FAILED", "missing": "missing", "broken": "BROKEN", "not measured": "not measured", "ok": "-"}


@pytest.mark.parametrize("state", STATES)
def test_the_state_of_a_cell_is_told_and_red_where_it_must_be(state):
    column = Column("speed", "speed", "×")
    table = Table("t", "t", ("method",), [column], [Row(("m",), {"speed": Cell(state=state)})])
    assert [cell.text for cell in text.body(table)[0]] == ["m", STATES[state]]
    assert (STATES[state] in red(table)) == (state in ("failed", "missing", "broken"))


@pytest.mark.parametrize(("severity", "loud"), [("info", False), ("warning", False), ("error", True)])
def test_an_error_is_red_whatever_its_words(severity, loud):
    table = Table("t", "its title", notes=[Note("some words", severity)])
    assert ("some words" in red(table)) == loud
    assert ("its title" in red(Table("t", "its title", severity=severity))) == loud


def states(run, table):
    """By row and column of a run's table, the states in its JSON, and what is red of it."""
    report = analyse(run)
    [found] = [x for x in json.loads(as_json.render(report))["tables"] if x["key"] == table]
    cells = {(*row["key"], key): cell["state"] for row in found["rows"] for key, cell in row["cells"].items()}
    return cells, red(report.table(table))


def test_failed_and_missing_cells_of_a_run():
    failed = partial.timing("other", status="failed", error="out of memory", seconds=[], baseline_seconds=[])
    run = partial.run([partial.timing("full"), partial.timing(), failed], **partial.GPU, expected={"timings": 4})
    cells, shown = states(run, "decode")
    assert {cells[method, "8 · 1024"] for method in ("full", "m")} == {"ok"}
    assert (cells["other", "8 · 1024"], cells["jitter", "8 · 1024"]) == ("failed", "missing")
    assert {"OOM", "missing"} <= set(shown)


def test_broken_and_partial_cells_of_a_run(tmp_path):
    again = [r for b in range(3) for h in (0, 1) for r in servers.leg("baseline again", b, h)]
    garbage = [replace(r, text="�#%" * 40) for b in range(3) for h in (0, 1) for r in servers.leg("m", b, h)]
    whole = [r for b in range(3) for h in (0, 1) for r in servers.leg("baseline", b, h)]
    run = servers.run([*whole, *again, *garbage], tmp_path, model={"name": "tiny"}, started="today")
    cells, shown = states(run, "served")
    assert (cells["c", "m", "rate"], cells["c", "baseline", "rate"]) == ("broken", "ok")
    assert "BROKEN" in shown
    cells, shown = states(
        partial.run(*partial.whole()[:3], partial.needles("other", 0.0, 3), **partial.EXPECTED), "verdicts"
    )
    assert (cells["m", "quality", "effect"], cells["other", "quality", "effect"]) == ("ok", "partial")
    assert "partial 3/8" in shown
