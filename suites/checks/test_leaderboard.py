"""Many runs in one table: every method of each, and others' scores, marked as theirs."""

from pathlib import Path

import pytest

from kvsuite import cli
from kvsuite.analysis.report import analyse
from kvsuite.analysis.tables.leaderboard import leaderboard
from kvsuite.records import read

CPU = Path(__file__).parents[2] / "reports" / "cpu"
SMOKE = CPU / "smoke"


def test_methods_are_ordered_by_decision_and_bytes_and_servers_are_left_out_with_a_word():
    table = leaderboard([analyse(read(SMOKE)), analyse(read(CPU / "vllm"))])
    names = [row.key[1] for row in table.rows]
    assert names[:3] == ["kivi:bits=4", "fp8", "int8"]
    assert set(names[3:]) == {"int4", "kivi:bits=2", "streaming-llm:budget=128", "h2o:budget=128"}
    assert {row.key[2] for row in table.rows} == {"smoke"}
    assert "vllm" in table.notes[0].text
    assert table.cell(("SmolLM2-135M-Instruct", "int4", "smoke"), "decision").verdict == "harmful"


def test_scores_of_others_are_theirs(capsys):
    theirs = ["--baseline", f"{SMOKE}#full", "--candidate", f"worse={SMOKE}#h2o:budget=128", "--model", "M"]
    assert cli.main(["leaderboard", str(SMOKE), *theirs, "--markdown"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| M ")]
    assert len(rows) == 1
    assert rows[0].startswith("| M | worse | theirs | damaged: tasks -96 pt | ")


def test_a_page_needs_no_script_and_names_stay_text(capfdbinary):
    theirs = ["--baseline", f"{SMOKE}#full", "--candidate", f"<script>alert(1)</script>={SMOKE}#int8"]
    assert cli.main(["leaderboard", str(SMOKE), *theirs, "--html"]) == 0
    page = capfdbinary.readouterr().out.decode()
    assert page.startswith("<!doctype html>")
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "int8" in page


@pytest.mark.parametrize("arguments", [[], ["--baseline", "x"], [str(CPU / "vllm")], ["nowhere"]])
def test_nothing_to_show_is_one_sentence(arguments, capsys):
    assert cli.main(["leaderboard", *arguments]) == 2
    assert capsys.readouterr().err.count("\n") == 1
