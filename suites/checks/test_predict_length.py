"""The length predictor: what prompts tell is found, what they do not tell is not, and test prompts are never learned
from. Made-up embeddings."""

import dataclasses
import json
import math

import numpy as np
import pytest

from kvsuite.cli import main
from kvsuite.errors import UsageError
from kvsuite.predict import types
from kvsuite.predict.length import LEVELS, Lengths, Predictor, Quantiles, concordant, pinball
from kvsuite.predict.length_scores import elsewhere, told
from kvsuite.predict.prompts import COUNTED, counted, prompts_of
from kvsuite.records import Answer, RunFolder, read
from kvsuite.runs import verbosity

pytest.importorskip("sklearn")
CAP = 400
METHODS = {"full": 1.0, "int8": 1.0, "streaming-llm:budget=0.25": 1.5}


def embed(texts):
    """A text means its first word, a number; the other directions are its letters'."""
    vectors = [[float(t.split()[0]), *(t.count(c) / 9 for c in "abcde")] for t in texts]
    return np.array(vectors, dtype=np.float32), [len(t.split()) for t in texts]


def answers(knows=True, n=40, seed=0):
    """``n`` chats whose answers' lengths follow the prompts' first word, or do not; full answered each twice."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        means = float(np.round(rng.normal(), 3))
        words = " ".join("".join(rng.choice(list("abcde"), 3)) for _ in range(rng.integers(3, 9)))
        level = 80 * math.exp(0.7 * (means if knows else rng.normal()))
        for method, factor in METHODS.items():
            for repeat in range(2 if method == "full" else 1):
                length = round(min(CAP, max(1, level * factor * math.exp(rng.normal(0, 0.15)))))
                made.append(
                    Answer(
                        method, evaluation="length", task="chat", type="chat", sample=f"chat-{i}",
                        prompt=f"{means} {words}", prompt_tokens=10, repeat=repeat, tokens=[1] * length, cap=CAP,
                        finish="length" if length == CAP else "stop",
                    )
                )  # fmt: skip
    return made


def left(folder, some, model="m", cap=CAP):
    made = RunFolder(folder)
    made.describe(
        {"methods": list(METHODS), "baseline": "full", "model": {"name": model, "fingerprint": f"{model}0123456789"}}
    )
    for a in some:
        made.append(dataclasses.replace(a, cap=cap))
    return folder


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    lengths = Lengths.of(read(left(tmp_path_factory.mktemp("known"), answers())))
    return lengths, prompts_of(lengths.entries, embed)


def rows(found):
    return {(row.what, row.predictor): row for row in found}


@pytest.fixture(scope="module")
def found(known):
    return rows(told(*known))


def test_repeats_are_one_entry_and_caps_are_seen(tmp_path):
    some = [dataclasses.replace(a, sample="s", prompt="1 a") for a in answers(n=1)]
    some = [dataclasses.replace(a, tokens=[1] * n) for a, n in zip(some, (10, 30, 40, 400), strict=True)]
    some[3] = dataclasses.replace(some[3], finish="length")
    found = Lengths.of(read(left(tmp_path, some)))
    assert [(e.method, e.length, e.capped, e.base) for e in found.entries] == [
        ("full", 20, False, 20), ("int8", 40, False, 20), ("streaming-llm:budget=0.25", 400, True, 20),
    ]  # fmt: skip
    assert [e.change for e in found.entries] == [0, pytest.approx(math.log(2)), None]
    assert [(e.length, second, cut) for e, second, cut in found.twice] == [(10, 30, False)]


def test_harrells_pairs():
    right, pairs = concordant(
        np.array([1.0, 2, 2, 5]), np.array([10.0, 20, 30, 400]), np.array([False, False, False, True])
    )
    assert pairs.sum() == 6
    assert right.sum() == 5.5, "equal predictions are half right"
    _, pairs = concordant(np.zeros(3), np.array([400.0, 400, 10]), np.array([True, True, False]))
    assert pairs.sum() == 2, "of two capped answers nobody knows which is longer"


def test_pinball_is_least_at_the_quantiles():
    true = np.random.default_rng(0).lognormal(4, 1, 4000)
    best = np.quantile(true, LEVELS)
    least = pinball(true, np.tile(best, (len(true), 1))).mean()
    assert all(pinball(true, np.tile(best * k, (len(true), 1))).mean() > least for k in (0.8, 1.2))
    assert pinball(np.array([10.0]), np.full((1, 5), 10.0)) == [0]


def test_what_prompts_tell_is_found(found):
    learned, median = (found["methods' lengths", name] for name in ("learned", "training median"))
    assert learned.concordance[0] > 0.85
    assert median.concordance[0] == 0.5
    assert median.better
    assert found["methods' lengths", "prompt's length alone"].better
    ceiling = found["the baseline's length", "another answer of its own (ceiling)"]
    assert 0.85 < ceiling.concordance[0] < 1
    assert (learned.n, learned.prompts) == (80, 40)
    assert learned.concordance[1] < learned.concordance[0] < learned.concordance[2]


def test_the_change_of_a_method_is_found(known, found):
    assert found["methods' change", "no change"].better
    predictor = Predictor.learned(*known, known[0].entries)
    middle = LEVELS.index(0.5)
    longer = predictor.changes(known[1][:1], ["streaming-llm:budget=0.25"])[0, middle]
    assert longer == pytest.approx(1.5, rel=0.1)
    assert predictor.changes(known[1][:1], ["int8"])[0, middle] == pytest.approx(1, rel=0.1)


def test_what_prompts_do_not_tell_falls_to_the_nulls_accuracy(tmp_path):
    """Over several shuffles: no concordance, and in few of them a loss that looks surely less than the median's."""
    better, concordance = [], []
    for seed in range(2):
        lengths = Lengths.of(read(left(tmp_path / str(seed), answers(knows=False, n=24, seed=seed))))
        found = rows(told(lengths, prompts_of(lengths.entries, embed)))
        better.append(found["the baseline's length", "training median"].better)
        concordance.append(found["the baseline's length", "learned"].concordance[0])
    assert sum(better) <= 1
    assert np.mean(concordance) == pytest.approx(0.5, abs=0.12)


def test_a_prompt_is_not_learned_from_when_it_is_predicted(known):
    """18 prompts with a sign of their own, by which a model of 8 directions can remember most of their lengths."""
    lengths, _ = known
    some = [e for e in lengths.entries if e.method == "full"][:18]
    rng = np.random.default_rng(3)
    entries = [
        dataclasses.replace(e, length=float(n), capped=False) for e, n in zip(some, rng.permutation(18), strict=True)
    ]
    signs = np.column_stack([np.zeros((18, len(COUNTED))), rng.normal(size=(18, 8))])
    found = rows(told(dataclasses.replace(lengths, entries=entries, twice=[]), signs))
    assert found["the baseline's length", "learned"].concordance[0] < 0.7


def test_quantiles_rise_and_end_at_the_cap(known):
    lengths, x = known
    predictor = Predictor.learned(lengths, x, lengths.entries)
    q = predictor.lengths(x, [e.method for e in lengths.entries])
    assert (np.diff(q, axis=1) >= 0).all()
    assert q.max() <= CAP
    assert q.min() >= 0
    inside = [q[i, 0] <= e.length <= q[i, -1] for i, e in enumerate(lengths.entries)]
    assert np.mean(inside) > 0.8
    with pytest.raises(UsageError, match="unknown method of this predictor 'int9'"):
        predictor.lengths(x[:1], ["int9"])


def test_a_constant_feature_and_equal_embeddings_are_no_trouble():
    x = np.zeros((20, len(COUNTED) + 4))
    y = np.arange(20.0)
    q = Quantiles.learned(x, ["m"] * 20, y, [str(i) for i in range(20)])(x, ["m"] * 20)
    assert q[0, LEVELS.index(0.5)] == pytest.approx(9.5, abs=0.6)


def test_a_saved_predictor_says_the_same_and_knows_its_model(known, tmp_path):
    lengths, x = known
    predictor, file = Predictor.learned(lengths, x, lengths.entries), tmp_path / "p.json"
    predictor.save(file)
    again = Predictor.load(file)
    methods = [e.method for e in lengths.entries]
    assert again.lengths(x, methods) == pytest.approx(predictor.lengths(x, methods))
    again.check(lengths)
    assert elsewhere(again, lengths, x)[0].concordance[0] > 0.85
    with pytest.raises(UsageError, match=r"different models: m .* and other"):
        again.check(dataclasses.replace(lengths, model="other", fingerprint="x"))
    with pytest.raises(UsageError, match="lengths up to 400 tokens, the run's cap is 99"):
        again.check(dataclasses.replace(lengths, cap=99))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"kvsuite": "0.0.1"}))
    with pytest.raises(UsageError, match=r"is of kvsuite 0\.0\.1"):
        Predictor.load(file)


def test_runs_that_cannot_be_learned_from_are_refused(tmp_path):
    some = answers(n=3)
    with pytest.raises(UsageError, match="no answers to chats with their prompts"):
        Lengths.of(read(left(tmp_path / "a", [dataclasses.replace(a, evaluation="samples") for a in some])))
    mixed = RunFolder(left(tmp_path / "b", some))
    mixed.append(dataclasses.replace(some[0], sample="other", cap=99))
    with pytest.raises(UsageError, match="answers with caps 99, 400"):
        Lengths.of(read(tmp_path / "b"))
    lengths = Lengths.of(read(left(tmp_path / "c", some)))
    with pytest.raises(UsageError, match="3 prompts cannot say"):
        told(lengths, prompts_of(lengths.entries, embed))


def test_types_are_told_from_what_prompts_show_and_shuffled_ones_are_not():
    rng = np.random.default_rng(0)
    kinds = rng.choice(["qa", "code", "chat"], 120)
    x = rng.normal(0, 1, (120, 12))
    x[:, 3] += 4 * (kinds == "code")
    x[:, 4] += 4 * (kinds == "qa")
    known = [types.Typed("", 1, str(k), f"document {i // 2}") for i, k in enumerate(kinds)]
    found = types.held_out(x, known)
    assert found.learned.mean > 0.85
    assert found.gain.low > 0.2
    assert (found.n, found.groups) == (120, 60)
    shuffled = [dataclasses.replace(k, type=str(t)) for k, t in zip(known, rng.permutation(kinds), strict=True)]
    assert types.held_out(x, shuffled).gain.low < 0
    classifier = types.Classifier.learned(x, kinds)
    assert types.Classifier.of(json.loads(json.dumps(classifier.as_json())))(x) == classifier(x)
    two = types.Classifier.learned(x, [str(k == "code") for k in kinds])
    assert np.mean(np.array(two(x)) == (kinds == "code").astype(str)) > 0.9
    with pytest.raises(UsageError, match="all prompts are of type qa"):
        types.Classifier.learned(x, ["qa"] * 120)


def test_what_is_counted_of_a_prompt():
    found = dict(zip(COUNTED, counted("What IS 12?\n```x```", 7), strict=True))
    assert found["tokens"] == math.log(8)
    assert found["question marks"] == 1
    assert found["code"] == 1
    assert counted("", 0) == [0.0] * len(COUNTED)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verbosity, "MiniLM", lambda: embed)
    some = answers(n=12)
    some += [
        dataclasses.replace(a, evaluation="samples", task="qa", type="qa", prompt="9 a", prompt_tokens=99)
        for a in answers(n=8, seed=1)
    ]
    folder, file = left(tmp_path / "run", some), tmp_path / "p.json"
    assert main(["predict", "length", str(folder), "--save", str(file), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    learned = next(r for r in said["lengths"] if (r["what"], r["predictor"]) == ("methods' lengths", "learned"))
    assert learned["concordance_low"] <= learned["concordance"] <= learned["concordance_high"]
    assert said["types"]["learned"]["mean"] > 0.9
    assert main(["predict", "length", "--use", str(file), "--prompt", "9 a b", "--tokens", "99", "--json"]) == 0
    row = next(r for r in json.loads(capsys.readouterr().out) if r["method"] == "int8")
    assert row["type"] == "qa"
    assert row["length"]["0.05"] <= row["length"]["0.5"] <= row["length"]["0.95"] <= CAP
    assert main(["predict", "length", str(folder), "--use", str(file)]) == 0
    assert "of: all lengths" in capsys.readouterr().out
    other = left(tmp_path / "other", some, model="other")
    assert main(["predict", "length", str(other), "--use", str(file)]) == 2
    assert "of different models" in capsys.readouterr().err
    assert main(["predict", "length", "--prompt", "x"]) == 2
    assert "--use" in capsys.readouterr().err
