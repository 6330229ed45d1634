"""The throughput predictor: known costs are found and carried to another model, nulls are told as good, and what was
not measured is refused."""

import csv
import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest

import kvsuite
from kvsuite.cli import main
from kvsuite.errors import UsageError
from kvsuite.predict import cells, scores
from kvsuite.predict.cells import Cell
from kvsuite.predict.throughput import Predictor, fitted, held, terms
from kvsuite.records import RunFolder, Timing
from suites.checks.depth import depth

pytest.importorskip("sklearn")
A6000 = Path(__file__).parents[3] / "shared/data/rethink/throughput/a6000.csv"
BATCHES, LENGTHS = (1, 2, 4, 8, 16), (256, 512, 1024, 2048, 4096)
COSTS = {"small": (20e-3, 1e-4, 4e-7), "large": (50e-3, 3e-4, 6e-7)}
"""Seconds of a step, per sequence, and per token held."""
FACTORS = {"full": (1, 1, 1), "kivi:bits=4": (1, 4, 2.0), "int8": (1, 1, 2), "streaming-llm:budget=512": (1.1, 2, 1)}
"""int8 holds half as much and reads it half as fast: no faster than the uncompressed cache."""


def seconds(model, method, batch, length):
    parts = zip(COSTS[model], FACTORS[method], (1, batch, batch * held(method, length)), strict=True)
    return sum(cost * factor * term for cost, factor, term in parts)


def world(models=("small", "large"), noise=0.01, methods=tuple(FACTORS), seed=0):
    rng = np.random.default_rng(seed)
    return [
        Cell("here", m, method, "decoding", b, n, seconds(m, method, b, n) * drawn, method == "full")
        for m in models for method in methods for b in BATCHES for n in LENGTHS
        for drawn in [np.exp(rng.normal(0, noise))]
    ]  # fmt: skip


def by_method(rows):
    return {row.method: row for row in rows}


def test_what_a_method_holds_is_what_its_name_says():
    assert held("full", 1000) == held("an engine's own", 1000) == 1000
    assert held("streaming-llm:budget=512", 4096) == 512
    assert held("streaming-llm:budget=512", 256) == 256
    assert held("StreamingLLM-16", 4096) == 512
    assert 0.25 < held("kivi:bits=4", 100_000) / 100_000 < 0.35
    assert terms("prefill", "full", [(2, 10)]).tolist() == [[1, 20, 200]]


def test_costs_are_found_and_never_below_zero():
    at = [(b, n) for b in BATCHES for n in LENGTHS]
    columns = terms("decoding", "full", at)
    true = np.array(COSTS["small"])
    assert fitted(columns, columns @ true) == pytest.approx(true)
    assert (fitted(columns, 1 / (columns @ true)) >= 0).all()


def test_another_model_is_predicted_from_its_uncompressed_cells_alone():
    made = world()
    found, refused = scores.guesses([c for c in made if c.model == "small"], [c for c in made if c.model == "large"])
    rows = by_method(scores.scores(found, "a model"))
    assert not refused
    assert set(rows) == set(FACTORS) - {"full"}, "which was given"
    assert all(row.n == 25 and row.mape < 0.03 for row in rows.values())
    assert rows["streaming-llm:budget=512"].mape < rows["streaming-llm:budget=512"].null_mape / 4
    assert rows["streaming-llm:budget=512"].beats_null
    assert not rows["int8"].beats_null, "which costs what the uncompressed cache costs"
    assert "carried over from small" in rows["int8"].basis


@pytest.mark.parametrize("by", depth(["length", "model"], ["batch", "length", "model"]))
def test_what_is_left_out_is_predicted_and_intervals_hold_it(by):
    found, refused = scores.left_out(world(noise=0.03), by)
    assert len(found) == {"batch": 120, "length": 120, "model": 150}[by], "batches and lengths between others"
    rows = scores.scores(found, by)
    assert all(row.median < 0.04 for row in rows)
    inside = [g.answer.low <= g.cell.seconds <= g.answer.high for g in found]
    assert 0.82 <= np.mean(inside) <= 0.99
    assert any("lies outside what was timed" in why for why in refused) == (by != "model")


def test_a_new_batch_has_a_wider_interval_where_batches_jump():
    """Times jump by up to a fifth from batch to batch, all lengths alike: a new length is known well, a new batch is
    not."""
    jump = dict(zip(BATCHES, (1.0, 1.2, 0.95, 1.15, 1.0), strict=True))
    made = [dataclasses.replace(c, seconds=c.seconds * jump[c.batch]) for c in world(models=("small",))]
    predictor = Predictor(made)
    places = [(8, 700), (6, 512), (6, 700), (8, 512)]
    length, batch, both, none = (a.high / a.seconds for a in predictor.ask("here", "small", "full", "decoding", places))
    assert max(length, none) < 1.05
    assert min(batch, both) > 1.1
    found, _ = scores.left_out(made, "length")
    assert np.mean([g.answer.low <= g.cell.seconds <= g.answer.high for g in found]) >= 0.85


def test_shuffled_cells_are_told_no_better_than_by_one_number():
    """Each method's times are dealt anew over its cells; the number is the best there is, and knows them all."""
    made = world(models=("small",), noise=0.0)
    rng = np.random.default_rng(1)
    drawn = {m: iter(rng.permutation([c.seconds for c in made if c.method == m])) for m in FACTORS}
    mixed = [dataclasses.replace(c, seconds=float(next(drawn[c.method]))) for c in made]
    for row in scores.scores(scores.left_out(mixed, "length")[0], "length"):
        true = np.array([c.seconds for c in mixed if c.method == row.method and 256 < c.length < 4096])
        assert row.n == len(true)
        assert row.mape > 0.95 * min(np.abs(true / one - 1).mean() for one in true)


def test_nothing_is_said_of_what_was_not_measured():
    predictor = Predictor(world(models=("small",)))
    ask = ("here", "small", "int8", "decoding")
    inside, low = predictor.ask(*ask, [(3, 700)])[0], predictor.ask(*ask, [(3, 700)])[0].low
    assert low < inside.seconds < inside.high
    assert inside.seconds == pytest.approx(seconds("small", "int8", 3, 700), rel=0.03)
    with pytest.raises(UsageError, match="batch 32 lies outside what was timed, 1 to 16"):
        predictor.ask(*ask, [(32, 700)])
    beyond = predictor.ask(*ask, [(32, 9000)], extrapolate=True)[0]
    assert "extrapolated" in beyond.basis
    assert beyond.seconds == pytest.approx(seconds("small", "int8", 32, 9000), rel=0.15)
    with pytest.raises(UsageError, match="needs 4 timed cells of its uncompressed cache, not 0"):
        predictor.ask("here", "large", "int8", "decoding", [(1, 256)])
    with pytest.raises(UsageError, match="unknown method timed in decoding 'int9': did you mean 'int8'"):
        predictor.ask("here", "small", "int9", "decoding", [(1, 256)])
    other = [
        Cell("there", c.model, c.method, c.stage, c.batch, c.length, c.seconds, c.plain)
        for c in world(("large",), methods=("full",))
    ]
    both = Predictor([*predictor.cells, *other])
    with pytest.raises(UsageError, match="was timed on here, not on there"):
        both.ask("there", "large", "int8", "decoding", [(1, 256)])
    assert (
        "extrapolated from here"
        in both.ask("there", "large", "int8", "decoding", [(1, 256)], extrapolate=True)[0].basis
    )


def test_a_saved_predictor_answers_alike_and_one_of_another_version_is_refused(tmp_path):
    predictor, file = Predictor(world()), tmp_path / "predictor.json"
    predictor.save(file)
    ask = ("here", "large", "kivi:bits=4", "decoding", [(3, 700), (16, 4096)])
    again = Predictor.load(file).ask(*ask)
    for one, other in zip(predictor.ask(*ask), again, strict=True):
        assert (one.seconds, one.low, one.high) == pytest.approx((other.seconds, other.low, other.high), rel=1e-6)
    what = json.loads(file.read_text())
    for change in ({"kvsuite": "0.0.1"}, {"kind": "another"}):
        file.write_text(json.dumps(what | change))
        with pytest.raises(UsageError, match=f"this is {kvsuite.__version__}"):
            Predictor.load(file)
    file.write_text("[]")
    with pytest.raises(UsageError, match="is no predictor"):
        Predictor.load(file)


def written(file, some):
    with file.open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(cells.COLUMNS)
        rows.writerows((c.model, c.method, c.batch, c.length, c.stage, c.rate) for c in some)
    return file


def test_the_command_prints_each_method_beside_its_null(tmp_path, capsys):
    made = [c for c in world() if c.method != "kivi:bits=4"]
    train, test = (written(tmp_path / f"{m}.csv", [c for c in made if c.model == m]) for m in COSTS)
    assert main(["predict", "throughput", "--train", str(train), "--test", str(test), "--json"]) == 0
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {"int8", "streaming-llm:budget=512"}
    for row in rows.values():
        assert {"method", "stage", "n", "mape", "null_mape", "beats_null"} <= set(row)
        assert (row["stage"], row["n"]) == ("decoding", 25)
    assert [rows[m]["beats_null"] for m in ("int8", "streaming-llm:budget=512")] == [False, True]
    kept = tmp_path / "kept.json"
    assert main(["predict", "throughput", "--train", str(train), "--save", str(kept)]) == 0
    assert "no better than the null" in capsys.readouterr().out
    asked = ["predict", "throughput", "--use", str(kept), "--method", "int8", "--length", "700"]
    assert main([*asked, "--batch", "1,4", "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)
    assert [a["batch"] for a in answers] == [1, 4]
    assert answers[1]["rate"] == pytest.approx(4 / seconds("small", "int8", 4, 700), rel=0.05)
    assert main([*asked, "--batch", "64"]) == 2
    assert "lies outside what was timed" in capsys.readouterr().err
    assert main(["predict", "throughput", "--test", str(test)]) == 2
    assert "say what to learn from" in capsys.readouterr().err
    assert main(["predict", "throughput", "--use", str(kept), "--test", str(test)]) == 0, (
        "its uncompressed cells are there"
    )
    bare = written(tmp_path / "bare.csv", [c for c in made if c.model == "large" and not c.plain])
    assert main(["predict", "throughput", "--use", str(kept), "--test", str(bare)]) == 2
    assert "large needs 4 timed cells of its uncompressed cache" in capsys.readouterr().err


def test_our_own_runs_are_read_by_their_pairs(tmp_path):
    """A cell's own baseline was twice as slow as elsewhere: the machine was, not the method."""
    folder = RunFolder(tmp_path)
    folder.describe({"model": {"name": "m"}, "environment": {"cpu": "C", "threads": 2}, "methods": ["full", "int8"]})
    for method, mine, beside in (("full", 0.4, 0.4), ("jitter", 0.4, 0.4), ("int8", 0.4, 0.8)):
        more = {"cache": "kvsuite.cache.layer.LayerCache/cpu", "checked": 0.5, "nbytes": 9}
        folder.append(
            Timing(method, width=8, length=100, tokens=32, seconds=[mine] * 3, baseline_seconds=[beside] * 3, **more)
        )
    folder.append(Timing("int8", status="failed", error="no", width=4, length=100))
    found = cells.read(tmp_path)
    assert {(c.method, c.plain, round(c.seconds, 6)) for c in found} == {
        ("full", True, 0.1), ("jitter", False, 0.1), ("int8", False, 0.05),
    }  # fmt: skip
    assert {(c.setting, c.stage, c.batch, c.length) for c in found} == {("kvsuite on C, 2 threads", "decoding", 8, 100)}


def test_benchmarks_are_read_by_their_extra_info(tmp_path):
    info = {"model": "m", "method": "none", "bsz": 2, "prompt_len": 50, "stage": "prefill"}
    benchmarks = [
        {"name": "a", "extra_info": info, "stats": {"median": 0.5}},
        {"name": "b", "extra_info": info | {"method": "x", "thr": 400.0}, "stats": {"median": 9}},
        {"name": "another's", "extra_info": {}, "stats": {"median": 1}},
    ]
    file = tmp_path / "b.json"
    file.write_text(json.dumps({"machine_info": {"cpu": {"brand_raw": "C"}}, "benchmarks": benchmarks}))
    assert cells.read(file) == [
        Cell("C", "m", "none", "prefill", 2, 50, 0.5, True),
        Cell("C", "m", "x", "prefill", 2, 50, 0.25, False),
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "", "is no run folder"),
        ("a.csv", "model,method\n1,2\n", "line 2: a cell has model, method"),
        ("a.csv", "model,method,bsz,prompt_len,stage,thr\nm,x,1,2,middle,3\n", "stage is prefill or decoding"),
        ("a.csv", "model,method,bsz,prompt_len,stage,thr\nm,x,1,2,prefill,0\n", "must be over 0"),
        ("a.csv", "model,method,bsz,prompt_len,stage,thr\n", "holds no timed cell"),
        ("a.json", "{}", "is not pytest-benchmark's JSON"),
        ("a.json", '{"benchmarks": []}', "holds no timed cell"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=said):
        cells.read(tmp_path / name)


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: (_ for _ in ()).throw(ImportError(name)))
    with pytest.raises(UsageError, match=r"pip install 'kvsuite\[predict\]'"):
        kvsuite.predict.learner("gaussian_process")


@pytest.mark.parametrize("first", ["meta", "mistral"])
def test_the_papers_cells_beat_the_method_blind_null_where_there_is_something_to_know(first):
    """Learned from one model of the artifact, tested on the other, of which uncompressed cells alone are given."""
    if not A6000.exists():
        pytest.skip(f"no {A6000}")
    known = cells.read(A6000)
    train = [c for c in known if c.model.startswith(first)]
    found, refused = scores.guesses(train, [c for c in known if c not in train])
    rows = {(row.method.partition("-")[0], row.stage): row for row in scores.scores(found, "a model")}
    assert not refused
    assert rows["H2O", "prefill"].mape <= rows["H2O", "prefill"].null_mape / 3
    assert rows["H2O", "decoding"].mape <= rows["H2O", "decoding"].null_mape / 2
    assert rows["H2O", "prefill"].beats_null
    assert rows["H2O", "decoding"].beats_null
    assert not rows["KIVI", "prefill"].beats_null
