"""Badges: this repository's own are what the command gives; what they must not do is break out of their file."""

import json
import xml.etree.ElementTree as xml
from dataclasses import replace
from pathlib import Path

import pytest

from kvsuite import cli
from kvsuite.analysis.report import Report, analyse
from kvsuite.analysis.table import Cell, Row, Table
from kvsuite.errors import UsageError
from kvsuite.records import read
from kvsuite.report import badge

ROOT = Path(__file__).parents[2]
SVG = "{http://www.w3.org/2000/svg}"
SMOKE, OWN = ROOT / "reports" / "cpu" / "smoke", ROOT / "reports" / "badges"


@pytest.fixture(scope="module")
def smoke():
    return analyse(read(SMOKE))


def test_the_published_badges_are_what_the_command_gives(tmp_path, capsys):
    assert cli.main(["badges", str(SMOKE), "--into", str(tmp_path / "new")]) == 0
    made = {path.name: path.read_text() for path in (tmp_path / "new").iterdir()}
    assert made == {path.name: path.read_text() for path in OWN.iterdir()}
    told = capsys.readouterr().out.split()
    assert {Path(line).name for line in told} == {name for name in made if name.endswith(".svg")}


def test_readme_shows_badges_that_are_there():
    shown = [word for word in (ROOT / "README.md").read_text().split("(") if word.startswith("reports/badges/")]
    assert shown
    assert all((ROOT / word.partition(")")[0]).is_file() for word in shown)


def test_badges_say_what_the_tables_say(smoke):
    found = {b.label: b for b in badge.badges(smoke)}
    rows = smoke.table("decision").rows
    assert found.keys() == {name for row in rows for name in (row.key[0], f"{row.key[0]} decode")}
    damaged = {row.key[0] for row in rows if row.cells["decision"].value.startswith("damaged")}
    assert damaged
    for row in rows:
        own = found[row.key[0]]
        assert own.message == ("damaged" if row.key[0] in damaged else "no damage found")
        assert own.colour == badge.COLOURS["harmful" if row.key[0] in damaged else "within margin"]
        speed = smoke.cell("verdicts", (row.key[0], "speed"), "effect")
        assert found[f"{row.key[0]} decode"].message == f"{speed.value:.2f}×"
    assert {b.where for b in found.values()} == {"SmolLM2-135M-Instruct, 2026-11-28"}


def a_report(smoke, decided, speeds=(), partial=False):
    """One that decides this of methods, and judges these speeds."""
    rows = [Row((name,), {"decision": Cell("words", verdict=verdict)}) for name, verdict in decided]
    judged = [Row((name, endpoint), {"effect": cell}) for name, endpoint, cell in speeds]
    tables = [Table("decision", "d", rows=rows), Table("verdicts", "v", rows=judged)]
    tables += [Table("shortfall", "partial: this run was interrupted", severity="error")] if partial else []
    return Report(smoke.run, tables, [], [])


HOSTILE = '<script>alert("1")</script>&\u2028\u202e\x00]]>'


def test_names_stay_text(smoke, tmp_path):
    facts = smoke.run.facts | {"model": {"name": HOSTILE}}
    report = a_report(replace(smoke, run=replace(smoke.run, facts=facts)), [(HOSTILE, "harmful")])
    (file,) = badge.write(report, tmp_path)
    root = xml.fromstring(file.read_text())
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == {"svg", "title", "rect", "path", "g", "text"}
    assert root.find(f"{SVG}g/{SVG}text").text.startswith('<script>alert("1")</script>&')
    assert json.loads(file.with_suffix(".json").read_text())["label"] == HOSTILE
    assert file.parent == tmp_path


def test_names_that_become_one_file_name_are_two_files(smoke, tmp_path):
    files = badge.write(a_report(smoke, [("a:b=1", "harmful"), ("A-b-1", "undecided"), ("..", "undecided")]), tmp_path)
    assert [file.name for file in files] == ["a-b-1.svg", "a-b-1-2.svg", "method.svg"]


def test_what_is_broken_or_partial_is_not_cleared(smoke):
    odd = [
        ("garbage", "all", Cell(state="broken")),
        ("some", "speed", Cell(1.5, verdict="partial", state="partial")),
        ("none", "speed", Cell(state="failed")),
        ("jitter", "speed", Cell(1.0, verdict="noise")),
    ]
    found = badge.badges(a_report(smoke, [("garbage", "within margin"), ("some", "undecided")], odd, partial=True))
    assert {b.label: b.message for b in found} == {
        "some": "cannot tell yet", "garbage": "BROKEN", "some decode": "1.50× partial",
    }  # fmt: skip
    assert {b.label: b.colour for b in found} == {
        "some": badge.OPEN, "garbage": badge.COLOURS["harmful"], "some decode": badge.OPEN,
    }  # fmt: skip
    assert all(b.where.endswith(", partial") for b in found)


def test_servers_are_decided_too():
    found = badge.badges(analyse(read(SMOKE.parent / "vllm")))
    assert {b.label: (b.message, b.verdict) for b in found} == {
        "fp8_e4m3": ("cannot tell yet", "undecided"),
        "fp8_e5m2": ("damaged", "harmful"),
    }, "too few answers to tell garbage in a fifth of them, so no speed"


def test_speed_alone_clears_nobody():
    found = {b.label: b for b in badge.badges(analyse(read(SMOKE.parent / "decode")))}
    assert (found["int8"].message, found["int8"].colour) == ("its answers were not judged", badge.OPEN)
    assert found["int8 decode"].message == "1.32×"


def test_a_long_name_is_cut(smoke, tmp_path):
    names = ["字" * 300, "x" * 300, "x" * 301]
    files = badge.write(a_report(smoke, [(name, "harmful") for name in names]), tmp_path)
    assert [file.name for file in files] == ["method.svg", f"{'x' * 80}.svg", f"{'x' * 80}-2.svg"]
    assert int(xml.fromstring(files[1].read_text()).get("width")) < 700


def test_a_run_that_decides_nothing_has_no_badges(smoke, tmp_path):
    with pytest.raises(UsageError, match="decides nothing of a method"):
        badge.write(a_report(smoke, []), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_is_told(smoke, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"badges cannot be written into .*file: "):
        badge.write(a_report(smoke, [("a", "harmful")]), tmp_path / "file")
