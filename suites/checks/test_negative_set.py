"""The negative benchmark as a folder: what is chosen of a run, what is written, and doing nothing costs nothing."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvsuite.analysis.benchmark import Votes
from kvsuite.analysis.negative_set import FACTS, LEAST, ROWS, build, card, read, scores, write
from kvsuite.analysis.samples import Broken
from kvsuite.analysis.stability import stability
from kvsuite.analysis.tables import benchmark as shown
from kvsuite.cli import main
from kvsuite.columns import Arm
from kvsuite.errors import UsageError
from kvsuite.records import Answer, Run, RunFolder
from suites.checks.depth import depth
from suites.checks.drawn import drawn

N = 120
TYPES = {"needle": "synthetic", "json": "qa"}
FACTS_OF_A_RUN = {
    "command": ["-m", "samples"],
    "model": {"name": "tiny", "fingerprint": "0"},
    "texts": {},
    "settings": {"seed": 0, "temperature": 0.0},
    "baseline": "full",
}


def a_run(arms, started="first", folder="runs/a", **facts):
    """A run of arms by name, each (n,) scores; two thirds of the samples are needles."""
    records = [
        Answer(
            method, task=task(at, len(arm)), type=TYPES[task(at, len(arm))], sample=f"s{at}", cluster=f"c{at}",
            score=float(score), text=f"{score:.6f}", prompt_hash=f"hash{at}", finish="stop",
        )
        for method, arm in arms.items()
        for at, score in enumerate(arm)
    ]  # fmt: skip
    return Run(Path(folder), FACTS_OF_A_RUN | {"started": started, "methods": list(arms)} | facts, records)


def task(at, n):
    return "needle" if at < n * 2 // 3 else "json"


def luck(rng, n=N):
    """A function that draws one more replicate: an answer is luck in part."""
    level = rng.beta(6, 6, n)
    return lambda harm=0.0: np.clip(level - harm + rng.normal(0, 0.12, n), 0, 1)


def two_runs(rng, harm=0.0, n=N, methods=("h2o", "snapkv", "kivi:bits=2"), own=False):
    """A run that chooses, and one that is scored; all methods do harm alike. ``own``: the baseline answers anew, as on
    a server, and not with the same letters, as in one process."""
    replicate = luck(rng, n)
    first = {"full": replicate(), "jitter": replicate()} | {m: replicate(harm) for m in methods}
    second = {"full": replicate() if own else first["full"], "jitter": replicate(), "jitter:seed=1": replicate()}
    second |= {"jitter:seed=2": replicate()} | {m: replicate(harm) for m in (*methods, "int8")}
    return a_run(first), a_run(second, "second", "runs/b")


@pytest.fixture
def harmed():
    return two_runs(np.random.default_rng(5), harm=0.15, n=600)


def whole(found, name):
    return next(row for row in found.rows if row.scored.candidate == name and not row.type)


@pytest.mark.parametrize("own", [True, False])
def test_doing_nothing_costs_nothing(own):
    """Of methods without an effect, and of controls, the drop covers 0; the replicate that chose shows one."""
    covers, chosen = [], []
    for seed in range(depth(12, 60)):
        one, other = two_runs(np.random.default_rng([3, seed]), n=400, own=own)
        found = scores(build(one)[0], other, draws=600)
        assert (found.base, found.control) == (("full", "jitter") if own else ("jitter", "jitter:seed=1"))
        for row in found.rows:
            if row.scored.drop is not None and not row.type:
                covers.append(row.scored.drop.low <= 0 <= row.scored.drop.high)
                chosen.append(row.scored.selecting - row.scored.base.mean)
    assert len(covers) >= 50
    assert np.mean(covers) > 0.9
    assert np.mean(chosen) > 0.08, "what the baseline's luck would have looked like"


def test_harm_is_found(harmed):
    one, other = harmed
    found = scores(build(one)[0], other)
    for name in ("h2o", "kivi:bits=2"):
        row = whole(found, name)
        assert row.scored.drop.high < -0.08
        assert name not in row.jurors
        assert row.scored.floor.low < 0 < row.scored.floor.high
    assert whole(found, "int8").jurors == ("h2o", "snapkv", "kivi:bits=2"), "an outsider is judged by all"
    assert whole(found, "int8").scored.n < whole(found, "h2o").scored.n
    assert whole(found, "jitter:seed=2").null
    assert whole(found, "jitter:seed=2").scored.drop.low < 0 < whole(found, "jitter:seed=2").scored.drop.high


def test_what_is_kept_is_what_any_candidate_needs(harmed):
    one, _ = harmed
    found, _ = build(one)
    base, fell = found.votes.base, found.votes.fell
    by = {a.sample: a.score for a in one.records if a.method == "full"}
    means = {t: np.mean([a.score for a in one.records if a.method == "full" and a.task == t]) for t in TYPES}
    counts = np.sum(list(fell.values()), axis=0)
    assert (counts >= 2).all(), "all but one family at least"
    assert all(by[sample] >= means[t] for t, sample in base.keys)
    bad = {(a.task, a.sample) for a in one.records if a.method == "h2o" and a.score < 0.9 * by[a.sample]}
    assert [key in bad for key in base.keys] == fell["h2o"].tolist()
    few, _ = build(one, quorum=1)
    assert len(few.votes.base) > len(base)
    named, _ = build(one, ["h2o", "snapkv"])
    assert list(named.votes.fell) == ["h2o", "snapkv"]
    part, _ = build(one, tasks=["json"])
    assert part.votes.base.keys == [key for key in base.keys if key[0] == "json"]


def test_it_is_read_as_it_was_written(harmed, tmp_path):
    one, other = harmed
    found, stable = build(one)
    texts = {
        key: {"reference": "r", "messages": [{"role": "user", "content": "q\u2028?"}]} for key in found.votes.base.keys
    }
    write(tmp_path / "b", found, texts, card(found, stable))
    again = read(tmp_path / "b")
    assert again.votes.base.keys == found.votes.base.keys
    assert again.votes.base.cluster == found.votes.base.cluster
    assert {m: f.tolist() for m, f in again.votes.fell.items()} == {m: f.tolist() for m, f in found.votes.fell.items()}
    assert again.facts["model"] == FACTS_OF_A_RUN["model"]
    a, b = (shown.as_json(scores(x, other)) for x in (found, again))
    assert a == b
    rows = [json.loads(line) for line in (tmp_path / "b" / ROWS).read_text().split("\n") if line]
    assert rows[0]["messages"][0]["content"] == "q\u2028?"
    assert rows[0]["fell"]
    with pytest.raises(UsageError, match="already holds a benchmark"):
        write(tmp_path / "b", found, {}, "")


def test_the_card(harmed):
    found, stable = build(harmed[0])
    text = card(found, stable)
    assert "{" not in text.replace("[{config_name", "")
    assert f"{len(found.votes.base)} prompts that tiny answers well" in text
    assert "below 90% of the uncompressed one" in text
    assert "all of the jurors" in text
    assert f"| qa | {sum(t == 'json' for t, _ in found.votes.base.keys)} | h2o" in text


def test_few_samples_have_no_mean(harmed):
    one, other = harmed
    few = [a for a in one.records if int(a.sample[1:]) < 45 or int(a.sample[1:]) > 595]
    found = scores(build(replace(one, records=few))[0], other, allow_missing=True)
    parts = [row for row in found.rows if 0 < row.scored.n < LEAST]
    assert parts
    assert all(row.scored.drop is row.scored.method is row.scored.base is None for row in parts)
    assert all(x["drop"] is None for x in shown.as_json(found)["rows"] if x["n"] < LEAST)
    names = {(row[0], row[1]): row for row in drawn(shown.tables(found)[1]).rows}
    row = names[parts[0].scored.candidate, parts[0].type]
    assert row[2] == str(parts[0].scored.n)
    assert row[4:] == ["-"] * len(row[4:])


def test_tables(harmed):
    one, other = harmed
    table = drawn(shown.tables(scores(build(one)[0], other))[0])
    assert [row[0] for row in table.rows] == ["jitter:seed=2 (does nothing)", "h2o", "snapkv", "kivi:bits=2", "int8"]
    assert any("B is jitter: replicate 2" in note for note in table.notes)
    assert any("does nothing" in note for note in table.notes)


def test_families_that_names_hide(harmed):
    one, other = harmed
    found = scores(build(one)[0], other, {"int8": "h2o"})
    assert whole(found, "int8").jurors == ("snapkv", "kivi:bits=2")


def test_another_model_is_said(harmed):
    one, other = harmed
    found = scores(build(one)[0], replace(other, facts=other.facts | {"model": {"name": "big"}}))
    assert "another model than tiny chose these samples" in found.notes


def without(run, *methods):
    return replace(run, records=[r for r in run.records if r.method not in methods])


def test_refused(harmed):
    one, other = harmed
    found, _ = build(one)
    with pytest.raises(UsageError, match="is the run that chose"):
        scores(found, one)
    with pytest.raises(UsageError, match="the luck of having been chosen is still in them"):
        scores(found, without(other, "jitter", "jitter:seed=1", "jitter:seed=2"))
    with pytest.raises(UsageError, match="has no sample"):
        scores(found, replace(other, records=[r for r in other.records if r.sample != found.votes.base.keys[0][1]]))
    moved = [replace(r, prompt_hash="other") if r.sample == found.votes.base.keys[0][1] else r for r in other.records]
    with pytest.raises(UsageError, match="has another prompt than the benchmark's"):
        scores(found, replace(other, records=moved))
    with pytest.raises(UsageError, match="unknown method with scores in the run 'h20': did you mean 'h2o'"):
        build(one, ["h20"])
    with pytest.raises(UsageError, match="unknown task of the run 'jsn': did you mean 'json'"):
        build(one, tasks=["jsn"])
    with pytest.raises(UsageError, match="jurors of one family alone"):
        build(one, ["h2o"])
    with pytest.raises(UsageError, match="holds no scores"):
        build(without(one, "jitter", "h2o", "snapkv", "kivi:bits=2"))


def test_files_that_are_no_benchmark(harmed, tmp_path):
    with pytest.raises(UsageError, match="is not a negative benchmark"):
        read(tmp_path)
    found, stable = build(harmed[0])
    write(tmp_path / "b", found, {}, card(found, stable))
    file = tmp_path / "b" / ROWS
    file.write_text(file.read_text()[:-40])
    with pytest.raises(UsageError, match=f"line {len(found.votes.base)} is no sample"):
        read(tmp_path / "b")
    (tmp_path / "b" / FACTS).write_text('{"version": 2}')
    with pytest.raises(UsageError, match="version 2, not 1"):
        read(tmp_path / "b")


class TestStability:
    def votes(self, *fell):
        n = len(fell[0])
        nothing = np.full(n, math.nan)
        keys = [("d", str(at)) for at in range(n)]
        base = Arm("x", keys, [k for _, k in keys], np.ones(n), nothing, nothing, nothing, [None] * n, {"d": "f"})
        return Votes(base, dict(zip("abcd", map(np.array, fell), strict=False)))

    def of(self, *fell):
        return stability(self.votes(*fell), np.ones(len(fell[0])), Broken())

    def test_jurors_that_agree(self):
        one = np.random.default_rng(0).random(200) < 0.3
        found = self.of(one, one, one, one)
        assert (found.halvings, found.eligible) == (3, 200)
        assert found.correlation == pytest.approx(1)
        assert found.again == 1
        assert found.chosen == pytest.approx(one.mean())

    def test_jurors_that_fall_anywhere(self):
        rng = np.random.default_rng(1)
        found = self.of(*(rng.random(4000) < 0.4 for _ in range(4)))
        assert found.correlation == pytest.approx(0, abs=0.05)
        assert found.again == pytest.approx(found.chosen, abs=0.05)

    def test_three_families(self):
        found = self.of(*np.random.default_rng(2).random((3, 50)) < 0.5)
        assert found.halvings == 3


@pytest.fixture
def folders(harmed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name, run in zip("ab", harmed, strict=True):
        folder = RunFolder(tmp_path / name)
        folder.describe(run.facts | {"servers": {}})
        for record in run.records:
            folder.append(record)
    return tmp_path


def test_commands(folders, capsys):
    assert main(["negatives", "build", "a", "--into", "bench"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [f"bench/{name}" for name in (ROWS, FACTS, "README.md")]
    assert "without the prompts themselves: a was answered by servers" in err
    assert main(["negatives", "score", "bench", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["base"] == "jitter"
    assert main(["negatives", "score", "bench", "b"]) == 0
    assert "jitter:seed=2 (does nothing)" in capsys.readouterr().out
    assert main(["negatives", "score", "bench", "b", "--markdown"]) == 0
    assert "| candidate | n |" in capsys.readouterr().out
    assert main(["negatives", "score", "bench", "b", "--family", "x"]) == 2
    assert "write METHOD=FAMILY" in capsys.readouterr().err
    assert main(["negatives", "a", "--json"]) == 0, "counts as before"


def test_published_scores_are_what_the_command_prints(capsys):
    folder = Path(__file__).parents[2] / "reports" / "cpu" / "negatives"
    assert main(["negatives", "score", str(folder), str(folder / "replicate"), "--markdown"]) == 0
    assert capsys.readouterr().out == (folder / "scores.md").read_text()
