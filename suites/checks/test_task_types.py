"""Tasks of all types hold in their prompts what they ask for, and score what they say."""

import itertools
import json

import pytest

from kvsuite import models
from kvsuite.analysis.tables.answers import answers
from kvsuite.engines.request import Response
from kvsuite.records import Answer, Run, decode, encode
from kvsuite.runs.here import record
from kvsuite.tasks import Sample, few_shot, task
from kvsuite.tasks.needle import Needle

NAMES = ("Polk", "Grant", "Taft", "Nixon", "Hayes", "Obama")
MADE = ["few-shot", "instructions", "json", "kv-retrieval", "multi-needle", "passage-count", "qa"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Six messages of two centuries in which no sentence comes twice."""
    for at, name in enumerate(NAMES):
        said = (f"In {at} the {name} House shall hear of {i} matters; let it be so." for i in range(120))
        (tmp_path / f"{1800 + 20 * at + 90 * (at >= 3)}-{name}-1.txt").write_text(" ".join(said))
    monkeypatch.setattr(models, "messages", lambda: tmp_path)


def words(text):
    return len(text.split())


def prompt(sample):
    return " ".join(text for _, text in sample.before) + sample.context + sample.question


@pytest.mark.parametrize("name", MADE)
def test_prompts_have_their_length_and_follow_the_seed(name):
    samples = task(name).samples(8, [300, 600], 0, words)
    again, other = (task(name).samples(8, [300, 600], seed, words) for seed in (0, 1))
    assert samples == again
    assert {s.prompt_hash for s in samples}.isdisjoint(s.prompt_hash for s in other)
    assert task(name).samples(3, [300, 600], 0, words) == samples[:3]
    assert len({s.id for s in samples}) == len({s.prompt_hash for s in samples}) == 8
    for at, sample in enumerate(samples):
        wanted = [300, 600][at % 2]
        assert 0.75 * wanted <= words(prompt(sample)) <= 1.02 * wanted
        assert 0 <= sample.chance < 1
        assert task(name).score(sample, "") == task(name).score(sample, "Well.") == 0 or name == "instructions"


@pytest.mark.parametrize("name", sorted(set(MADE) - {"instructions"}))
def test_the_reference_is_the_best_answer(name):
    for sample in task(name).samples(8, [300, 600], 0, words):
        assert task(name).score(sample, sample.reference) == 1


def test_several_needles_are_spread_and_each_counts():
    for at, sample in enumerate(task("multi-needle").samples(8, [300, 600], 0, words)):
        numbers = sample.reference.split()
        assert len(numbers) == (1 if at // 2 % 2 else 4)
        depths = [sample.context.index(number) / len(sample.context) for number in numbers]
        assert depths == sorted(depths)
        if len(numbers) == 4:
            assert all(b - a > 0.15 for a, b in itertools.pairwise(depths))
            assert task("multi-needle").score(sample, f"{numbers[2]} and 12") == 0.25
        assert sample.context.count("secret number") == 4


def test_a_key_has_its_own_value():
    (sample,) = task("kv-retrieval").samples(1, [300], 0, words)
    pairs = json.loads(sample.context[sample.context.index("{") :])
    key = sample.question.split('"')[1]
    assert str(pairs[key]) == sample.reference
    assert sample.chance == 1 / len(pairs)
    other = next(str(value) for name, value in pairs.items() if name != key)
    assert task("kv-retrieval").score(sample, other) == 0


def test_different_passages_are_counted():
    for sample in task("passage-count").samples(8, [300], 0, words):
        found = [text.partition(": ")[2] for text in sample.context.split("\n\n") if text.startswith("Paragraph ")]
        assert len(found) == 6
        assert str(len(set(found))) == sample.reference
        assert task("passage-count").score(sample, f"{sample.reference} of 9") == 0.5


def test_examples_have_their_class():
    (sample,) = task("few-shot").samples(1, [600], 0, words)
    asked = [text for role, text in sample.before if role == "user"]
    labels = [text for role, text in sample.before if role == "assistant"]
    assert len(labels) >= 6
    for text, label in zip([*asked, sample.question], [*labels, sample.reference], strict=True):
        name = next(name for name in NAMES if name in text)
        assert label == few_shot.CLASSES[NAMES.index(name) >= 3]
    assert task("few-shot").score(sample, " or ".join(few_shot.CLASSES)) == 0.5


def test_the_year_that_is_asked_is_in_the_text():
    for sample in task("qa").samples(8, [300, 600], 0, words):
        year, name, _ = sample.cluster.split("-")
        assert sample.context.count(f"Message of President {name}, {year}:\n") == 1
        assert sample.context.count("Message of President") == 4
        assert f"President {name} " in sample.question
        assert sample.reference == year
        assert task("qa").score(sample, f"It was {year}.") == 0.5


def test_rules_stand_before_the_text_and_each_counts():
    for at, sample in enumerate(task("instructions").samples(40, [300], 0, words)):
        rules = json.loads(sample.reference)
        assert len(rules) == 3
        roles = [role for role, _ in sample.before]
        assert roles == (["user", "assistant"] if at % 2 else ["system", "user", "assistant"])
        assert sample.before[0][1].startswith("You always follow these rules in your answers:\n1. ")
        assert all(value is None or str(value) in sample.before[0][1] for _, value in rules)
        assert task("instructions").score(sample, sample.before[-1][1]) == 1, "the example keeps them"
    sample = Sample("", "", "", '[["keywords:existence", "guitar"], ["punctuation:no_comma", null]]', 8)
    assert [task("instructions").score(sample, said) for said in ("A guitar", "Well", "A guitar, a")] == [1, 0.5, 0.5]


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ('```json\n{"port": "bergen", "captain": " Novak ", "sailors": "31"}\n```', 1),
        ('{"port": "Lisbon", "captain": "Novak"}', (1 + 2 / 3 + 1 / 3) / 3),
        ("{}", 1 / 3),
        ('["Bergen", "Novak", 31]', 0),
        ('The object is {"port": "Bergen"}', 0),
    ],
)
def test_json_has_three_parts(answer, score):
    sample = Sample("", "", "", '{"port": "Bergen", "captain": "Novak", "sailors": 31}', 8)
    assert task("json").score(sample, answer) == pytest.approx(score)


def test_second_questions_follow_the_reference_answer(tmp_path, monkeypatch):
    rows = [{"question_id": i, "category": "math", "turns": [f"first {i}", f"then {i}"]} for i in range(5)]
    (tmp_path / "question.jsonl").write_text("\n".join(map(json.dumps, rows)))
    known = [{"question_id": i, "choices": [{"turns": [f"answer {i}", "no"]}]} for i in (1, 3)]
    (tmp_path / "gpt-4.jsonl").write_text("\n".join(map(json.dumps, known)))
    monkeypatch.setattr(models, "questions", lambda: tmp_path)
    monkeypatch.setattr(models, "references", lambda: tmp_path)
    samples = task("chat-2").samples(9, [300], 0, words)
    assert {s.id for s in samples} == {"chat-2-math-1", "chat-2-math-3"}
    for s in samples:
        i = s.id[-1]
        assert (s.before, s.context, s.question) == (
            (("user", f"first {i}"), ("assistant", f"answer {i}")),
            "",
            f"then {i}",
        )


def test_a_hash_tells_whole_prompts_apart():
    one = Sample("a", "x" * 999, "why?", "", 8, before=(("system", "Be short."),))
    assert one.prompt_hash == Sample("b", "x" * 999 + "why", "?", "", 8, before=one.before).prompt_hash
    others = [Sample("a", "y" + "x" * 998, "why?", "", 8, before=one.before), Sample("a", "x" * 999, "why?", "", 8)]
    assert len({one.prompt_hash, *(other.prompt_hash for other in others)}) == 3
    written = record(Needle(), one, Response("a", "full", text="it"), 8)
    assert decode(encode(written)).prompt_hash == one.prompt_hash


def notes(scores, chance):
    found = [
        Answer(method="full", task="t", type="qa", sample=str(at), score=score, chance=chance, tokens=[1])
        for at, score in enumerate(scores)
    ]
    facts = {
        "methods": ["full"],
        "settings": {"length": [8], "compress": "prompt", "temperature": 0},
        "model": {"name": "tiny"},
        "environment": {"gpu": None, "threads": 1, "dtype": "float32"},
        "expected": {"samples": {"t": len(scores)}},
    }
    return [note for note in answers(Run(models.messages(), facts, found))[0].notes if "full scores" in note.text]


def test_a_score_without_room_is_told():
    (none,) = notes([1, 0] * 8, 0.5)
    assert none.severity == "warning"
    assert none.text == (
        "Measures nothing here: full scores 0.50 (0.28–0.72) on 16 samples, which is not above guessing (0.50)."
    )
    assert [note.severity for note in notes([0] * 8, 0.0)] == ["warning"]
    (most,) = notes([1] * 8, 0.25)
    assert most.text == "full scores 1 on all 8 samples: a method can only lose."
    assert notes([1, 0] * 8, 0.25) == notes([1, 0], 0.0) == []
