"""pytest -m tools: every tool's figure is a record beside those that know less; what a run cannot tell is skipped."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from kvsuite.analysis.report import analyse
from kvsuite.analysis.tables import paper
from kvsuite.analysis.tables.predicted import predicted
from kvsuite.errors import UsageError
from kvsuite.predict import reported
from kvsuite.predict.cells import Cell
from kvsuite.records import Answer, Predicted, Run, decode, encode
from suites.checks.test_maps import FACTS

pytest.importorskip("sklearn")
pytest.importorskip("simpy")
SECONDS = {"full": (10e-3, 4e-7), "int8": (10e-3, 2e-7)}
"""A step, and every token held."""


def cells(noise=0.01):
    rng = np.random.default_rng(0)

    def cell(method, stage, batch, length):
        start, token = SECONDS[method]
        seconds = 1e-4 * length * batch if stage == "prefill" else start + token * batch * length
        seconds *= float(np.exp(rng.normal(0, noise)))
        return Cell("here", "m", method, stage, batch, length, seconds, method == "full")

    return [
        cell(m, s, b, n)
        for m in SECONDS
        for s in ("prefill", "decoding")
        for b in (1, 4, 16)
        for n in (256, 1024, 4096)
    ]


def chats(count=30):
    dice, found = np.random.default_rng(1), []
    for at in range(count):
        tokens = int(dice.integers(20, 200))
        for method, factor in (("full", 1.0), ("int8", 1.1)):
            length = int(min(500, tokens * factor * np.exp(dice.normal(0, 0.2))))
            found.append(
                Answer(
                    method, evaluation="length", task="chat", type=("chat", "qa")[at % 2], sample=str(at),
                    prompt="? " * tokens, prompt_tokens=tokens, tokens=[1] * length, finish="stop", cap=512,
                )
            )  # fmt: skip
    return found


def embed(texts):
    return np.zeros((len(texts), 8)), [len(t) for t in texts]


def test_throughput_stands_beside_its_nulls():
    rows = reported.throughput(cells())
    [one] = [r for r in rows if (r.method, r.what) == ("int8", "decoding, each length left out")]
    assert one.n == 3, "the ends of the range are refused"
    assert set(one.nulls) == {"blind", "nearest", "mean"}
    assert one.value < 5 < one.nulls["nearest"]
    assert decode(encode(one)) == one
    with pytest.raises(UsageError, match="none can be left out"):
        reported.throughput(cells()[:1])


def test_lengths_and_types_stand_beside_theirs(tmp_path):
    run = Run(tmp_path, FACTS, chats())
    rows = reported.length(run, embed)
    by = {(r.what, r.measure): r for r in rows}
    own = by["the baseline's length, prompts left out", "loss"]
    assert own.value < 0.6 * own.nulls["training median"], "the prompt tells the length here"
    assert not own.better, "its number of tokens alone tells as much"
    assert by["the baseline's length, prompts left out", "concordance"].value > 0.75
    [types] = reported.task_types(run, embed)
    assert not types.better, "nothing in the prompt tells the type"
    with pytest.raises(UsageError, match="of one type"):
        reported.task_types(Run(tmp_path, FACTS, [replace(a, type="chat") for a in run.records]), embed)


def test_the_router_stands_beside_the_mixed_fleet_and_the_oracle(tmp_path, monkeypatch):
    monkeypatch.setattr(reported, "REQUESTS", 60)
    monkeypatch.setattr(reported, "SEEDS", 3)
    run = Run(tmp_path, FACTS, chats())
    [one] = reported.router(cells(), run)
    assert one.method == "int8"
    assert one.nulls["oracle"] < one.nulls["mixed, least loaded"]
    assert one.low <= one.value <= one.high
    with pytest.raises(UsageError, match="both timed cells and answers"):
        reported.router(cells(), Run(tmp_path, FACTS, [a for a in run.records if a.method == "full"]))


def test_tables_and_the_papers_figures_have_them(tmp_path):
    rows = [
        Predicted("int8", tool="throughput", what="decoding, each batch left out", measure="mean error", unit="%", n=9,
                  value=3.0, nulls={"blind": 30.0}, better=True),
        Predicted("int8", tool="router", what="1 + 3", measure="mean seconds", unit="×", n=10, value=0.8, low=0.79,
                  high=0.81, nulls={"oracle": 0.7}, better=False),
    ]  # fmt: skip
    run = Run(tmp_path, FACTS, rows)
    first, second = predicted(run)
    key = ("decoding, each batch left out", "mean error", "int8")
    assert first.cell(key, "blind").value == 30
    assert first.cell(key, "better").value == "yes"
    assert second.cell(("1 + 3", "mean seconds", "int8"), "better").value == "no"
    assert {"tools: throughput", "tools: router"} <= {table.key for table in analyse(run).tables}
    table6, table8 = paper.figures(["table6", "table8"], [run], None)
    shown = {row.key[0]: row.cells["ours"].value for row in table6.rows if "ours" in row.cells}
    assert shown == {"throughput, decoding, each batch left out: int8, mean error": "3% (blind 30; n = 9)"}
    assert any("oracle 0.7" in row.cells["ours"].value for row in table8.rows if "ours" in row.cells)


def test_a_run_that_says_too_little_is_skipped(tmp_path):
    command = [sys.executable, "-m", "pytest", "suites/tools", "-m", "tools", "--kv-run", str(tmp_path / "run"), "-rs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 skipped" in done.stdout
    assert "no timed cell" in done.stdout or "is not a run" in done.stdout
    command[-1:] = ["--kv-learn", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "is not a run folder" in done.stdout + done.stderr
