"""``kvsuite verbosity``: whether longer answers to chats are worse ones. Made-up embeddings but for one check."""

import json
import math
import sys

import numpy as np
import pytest

from kvsuite import models, tasks
from kvsuite.analysis import verbosity as analysis
from kvsuite.analysis.report import analyse
from kvsuite.analysis.tables import paper
from kvsuite.analysis.tables.verbosity import verbosity as tables
from kvsuite.cli import main
from kvsuite.errors import UsageError
from kvsuite.records import Answer, Run, RunFolder, Similarity, read
from kvsuite.runs.verbosity import MiniLM, Verbosity

MINILM = models.cache_folder() / f"all-minilm-l6-v2-{models.EMBEDDER.version}"


def angles(texts):
    """A text means the angle that it begins with, in degrees; so many words are so many pieces."""
    assert len(set(texts)) == len(texts)
    assert all(texts)
    turned = np.radians([float(text.split()[0]) for text in texts])
    return np.column_stack([np.cos(turned), np.sin(turned)]).astype(np.float32), [len(text.split()) for text in texts]


def cos(degrees):
    return pytest.approx(math.cos(math.radians(degrees)), abs=1e-4)


def chat(method, sample, text, length=10, repeat=0):
    ids = [sum(map(ord, text)) % 100] * length
    return Answer(method, evaluation="length", task="chat", sample=sample, text=text, tokens=ids, repeat=repeat, cap=99)


def left(folder, answers):
    methods = list(dict.fromkeys(a.method for a in answers))
    made = RunFolder(folder)
    settings = {"temperature": 0, "cap": 99, "samples": {"": 4}, "tasks": ["chat"]}
    where = {"gpu": None, "threads": 1, "compute_dtype": "float32", "kv_dtype": "float32"}
    facts = {"methods": methods, "baseline": "full", "settings": settings, "environment": where, "model": {"name": "m"}}
    made.describe(facts)
    for a in answers:
        made.append(a)
    return folder


@pytest.fixture
def referenced(monkeypatch):
    """The first two chats have a reference answer, of 0 degrees."""
    monkeypatch.setattr(type(tasks.task("chat")), "references", lambda self: {"a": "0 good", "b": "0 good"})


def test_every_answer_is_held_against_the_baselines_last_and_only_once(tmp_path, referenced):
    answers = [chat("full", "a", f"{10 * repeat} x", repeat=repeat) for repeat in range(3)]
    answers += [chat("int4", "a", "80 x y", repeat=0), chat("int4", "a", "<think>5 no</think>50 x", repeat=1)]
    answers += [chat("full", "c", "30", repeat=repeat) for repeat in range(3)] + [chat("int4", "c", " ", repeat=0)]
    folder = left(tmp_path / "run", answers)
    found = list(Verbosity(read(folder)).similarities(angles))
    known = {(r.method, r.sample, r.repeat): (r.reference, r.baseline, r.pieces) for r in found}
    assert len(known) == len(found) == 9
    assert known["full", "a", 2] == (cos(20), None, 2), "itself"
    assert known["full", "a", 0] == (cos(0), cos(20), 2)
    assert known["full", "a", 1] == (cos(10), cos(10), 2)
    assert known["int4", "a", 0] == (cos(80), cos(60), 3)
    assert known["int4", "a", 1] == (cos(50), cos(30), 2), "its thinking is no part of the answer"
    assert known["full", "c", 1] == (None, cos(0), 1)
    assert known["int4", "c", 0] == (None, 0.0, 0), "an empty answer means nothing"
    assert [r for r in read(folder).records if isinstance(r, Similarity)] != []
    again = Verbosity(read(folder))
    assert not again.asked
    assert list(again.similarities()) == [], "and the model is not loaded"


def planted(tmp_path, control="jitter"):
    """Four chats, two with references; int4 is far from both in two of them, and 1.5 times as long in one."""
    turned = {"full": (10, 20, 30, 40), control: (10, 30, 30, 50), "int4": (70, 20, 90, 40)}
    longer = {"int4": (15, 10, 10, 10)}
    answers = [
        chat(method, sample, f"{turned[method][i]} {method if turned[method] != turned['full'] else ''} x {i}",
             longer.get(method, (10,) * 4)[i])
        for method in turned if method for i, sample in enumerate("abcd")
    ]  # fmt: skip
    same = chat("int4", "b", answers[1].text)
    answers = [same if (a.method, a.sample) == ("int4", "b") else a for a in answers]
    list(Verbosity(read(left(tmp_path, answers))).similarities(angles))
    return read(tmp_path)


def test_the_figures_of_a_method_beside_its_controls(tmp_path, referenced):
    run = planted(tmp_path)
    [noise, int4] = analysis.verbosity(run)["chat"]
    assert (noise.name, noise.control, int4.name, int4.control) == ("jitter", True, "int4", False)
    c = {x: math.cos(math.radians(x)) for x in (0, 10, 20, 30, 60, 70)}
    assert (int4.pairs, int4.referenced) == (4, 2)
    assert int4.change.mean == pytest.approx((c[70] - c[10]) / 2, abs=1e-4), "only a and b have references, b is alike"
    assert int4.baseline.mean == pytest.approx((c[60] + 1 + c[60] + 1) / 4, abs=1e-4)
    assert noise.baseline.mean == pytest.approx((2 + 2 * c[10]) / 4, abs=1e-4)
    assert int4.beyond.mean == pytest.approx(int4.baseline.mean - noise.baseline.mean, abs=1e-4)
    assert noise.beyond is None
    assert int4.change.low < int4.change.mean < int4.change.high
    assert (int4.longer, noise.longer) == (1, 0)
    assert int4.longer_change.mean == pytest.approx(c[70] - c[10], abs=1e-4)
    assert int4.longer_baseline.mean == pytest.approx(c[60], abs=1e-4)
    assert noise.longer_change is None
    assert (int4.verbose, int4.differing) == (1, 1), "b is full's answer to the letter"
    assert (noise.verbose, noise.differing) == (2, 2), "no shorter, no closer"
    [table] = tables(run)
    assert table.key in {t.key for t in analyse(run).tables}
    assert table.cell("int4", "verbose").of == 1
    assert "Of 4 answers of a method 2 are to prompts that have a reference answer." in [n.text for n in table.notes]
    [theirs] = paper.figures(["table4"], [run], None)
    assert theirs.cell("int4: Q ≤ Q_full and L ≥ L_full", "ours").value == "1 of 1"
    assert theirs.cell("jitter (noise): Q ≤ Q_full and L ≥ L_full", "ours").value == "2 of 2"
    assert theirs.cell("int4: similarity to the reference - full's", "ours").value == f"{(c[70] - c[10]) / 2:+.3f}"
    assert "were chosen for longer answers" in theirs.notes[0].text


def test_without_control_reference_or_all_of_a_text_that_is_said(tmp_path):
    answers = [chat("full", "own", "10 x"), chat("int4", "own", "20 " + "x " * analysis.SEEN)]
    list(Verbosity(read(left(tmp_path, answers))).similarities(angles))
    [table] = tables(read(tmp_path))
    said = {note.text: note.severity for note in table.notes}
    assert "None of these prompts has a reference answer." in said
    assert "Of 1 answers the embedder saw the first 256 word pieces alone." in said
    assert [severity for text, severity in said.items() if text.startswith("No floor measured")] == ["warning"]
    assert table.cell("int4", "change").value is None
    assert table.cell("int4", "baseline").value == cos(10)


def test_methods_that_do_nothing_show_nothing_even_where_they_are_longer(tmp_path):
    """Selected for longer answers, the control as well: a difference that noise makes is in no interval's way."""
    draw, found = np.random.default_rng(0), []
    for _ in range(50):
        records = []
        for i in range(30):
            for method in ("full", "jitter", "int4"):
                length, cosine = int(draw.integers(5, 40)), float(draw.uniform(0, 1))
                records.append(chat(method, str(i), f"{method} {i}", length))
                records.append(
                    Similarity(method, task="chat", sample=str(i), reference=cosine, baseline=float(draw.uniform(0, 1)))
                )
        run = Run(tmp_path, {"methods": ["full", "jitter", "int4"], "baseline": "full"}, records)
        found.append(analysis.verbosity(run)["chat"][1])
    for key in ("change", "beyond", "longer_change"):
        outside = sum(not getattr(row, key).low < 0 < getattr(row, key).high for row in found)
        assert outside <= 7, key


def test_reference_answers_are_those_of_the_turn_that_is_asked(tmp_path, monkeypatch):
    asked = [{"question_id": i, "category": "math", "turns": [f"q{i}", f"then{i}"]} for i in (1, 2)]
    (tmp_path / "question.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    good = {"question_id": 2, "choices": [{"turns": ["first", "second"]}]}
    (tmp_path / "gpt-4.jsonl").write_text(json.dumps(good))
    monkeypatch.setattr(models, "questions", lambda: tmp_path)
    monkeypatch.setattr(models, "references", lambda: tmp_path)
    for name, wanted in (("chat", {"chat-math-2": "first"}), ("chat-2", {"chat-2-math-2": "second"})):
        task = tasks.task(name)
        assert task.references() == wanted
        assert set(wanted) <= {s.id for s in task.samples(9, [], 0, len)}


def test_what_cannot_be_compared_is_one_sentence(tmp_path, capsys, monkeypatch):
    scored = Answer("full", task="needle", sample="a", text="x", score=1.0)
    assert main(["verbosity", str(left(tmp_path / "scored", [scored]))]) == 2
    assert "holds no answers to chats beside the baseline's" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UsageError, match=r"embedding answers needs transformers: pip install 'kvsuite\[local\]'"):
        MiniLM()


@pytest.mark.skipif(not MINILM.is_dir(), reason="all-MiniLM-L6-v2 is not in the cache (kvsuite fetch)")
def test_the_model_tells_a_paraphrase_from_another_subject():
    words = ["A dog runs across the park.", "In the park, a puppy is running.", "The bank raised its interest rates."]
    long = "word " * 300
    vectors, pieces = MiniLM()([*words, long, long + "and a dog"])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert vectors[0] @ vectors[1] > 0.6 > 0.2 > vectors[0] @ vectors[2]
    assert vectors[3] @ vectors[4] == pytest.approx(1, abs=1e-5), "what comes after 256 pieces is not seen"
    assert pieces[0] == 9
    assert pieces[3:] == [302, 305]
    alone, _ = MiniLM()(words[:1])
    assert alone[0] == pytest.approx(vectors[0], abs=1e-5), "padding has no part in the mean"
