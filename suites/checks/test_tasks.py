"""Samples are what they say, and scores what they mean."""

import json

import pytest

from kvsuite import models
from kvsuite.engines.request import Request
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.errors import UsageError
from kvsuite.plugin import options, schedule
from kvsuite.tasks import base, task

WORDS = "The Congress shall hear of the state of the Union and of {i} matters more; let it be so."


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for at, sentences in enumerate((400, 30, 300)):
        (tmp_path / f"{at}.txt").write_text(" ".join(WORDS.format(i=i) for i in range(sentences)))
    monkeypatch.setattr(models, "messages", lambda: tmp_path)


def words(text):
    return len(text.split())


def test_needles_have_their_length_and_cover_all_depths(folder):
    samples = task("needle").samples(12, [300, 1000], 0, words)
    depths = []
    for at, sample in enumerate(samples):
        wanted = [300, 1000][at % 2]
        assert wanted - 30 <= words(sample.context + sample.question) <= wanted
        assert sample.context.count(sample.reference) == 1
        depths.append(sample.context.index(sample.reference) / len(sample.context))
    assert len({s.id for s in samples}) == 12
    for low in (0, 0.25, 0.5, 0.75):
        assert 2 <= sum(low <= depth < low + 0.25 for depth in depths) <= 4


def test_the_same_seed_gives_the_same_samples(folder):
    one, again, other = (task("needle").samples(6, [300], seed, words) for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert task("needle").samples(3, [300], 0, words) == one[:3]


@pytest.mark.parametrize(
    ("answer", "score"), [("48213", 1), ("It is 48,213.", 1), ("4821", 0), ("482130", 0), ("", 0), ("no 1 48213!", 1)]
)
def test_an_answer_counts_where_it_names_the_number(folder, answer, score):
    needle = task("needle")
    sample = needle.samples(1, [300], 0, words)[0]
    assert (
        needle.score(sample, answer.replace("48213", sample.reference).replace("48,213", f"{int(sample.reference):,}"))
        == score
    )


def test_references_are_those_of_another_task(folder, lines):
    scored, forced = task("needle"), task("reference:needle")
    assert (forced.name, forced.type, forced.evaluation) == ("reference:needle", "synthetic", "divergence")
    own, theirs = (t.samples(5, [300], 0, words) for t in (forced, scored))
    assert [(s.context, s.question, s.reference, s.id) for s in own] == [
        (s.context, s.question, s.reference, s.id) for s in theirs
    ]
    assert {s.max_new_tokens for s in own} == {1}, "what the reference has"
    assert forced.fetch() == scored.fetch()
    mine = task("reference:" + lines({"prompt": "1 + 1", "reference": "2"}, name="sums.jsonl"))
    assert (mine.name, task("reference:sums").name) == ("reference:sums", "reference:sums")
    for name in ("chat", "document", "digest", "reference:needle", "instructions"):
        with pytest.raises(UsageError, match="have no reference"):
            task(f"reference:{name}")
    with pytest.raises(UsageError, match="did you mean 'needle'"):
        task("reference:needel")


def test_no_two_digests_are_one(folder, tmp_path):
    """A prefix cache would find the second."""
    for name in "02":
        (tmp_path / f"{name}.txt").unlink()
    samples = task("digest").samples(60, [100], 0, words)
    assert len({s.context for s in samples}) == 60
    with pytest.raises(UsageError, match="do not hold 800 different prompts of 100 tokens"):
        task("digest").samples(800, [100], 0, words)


@pytest.fixture
def lines(tmp_path, monkeypatch):
    """Write a file of prompts, from rows or texts; give what --kv-tasks calls it."""
    monkeypatch.setattr(base, "_FILES", {})

    def write(*rows, name="mine.jsonl"):
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return f"jsonl:{tmp_path / name}"

    return write


GOOD = {"prompt": "a", "reference": "b"}
BAD = [
    ('{"prompt": "a", ', "line 2: not JSON; is it cut off?"),
    ('["a"]', "line 2: not an object with either prompt or messages"),
    ({"question": "a"}, "line 2: not an object with either prompt or messages"),
    (GOOD | {"messages": []}, "line 2: not an object with either prompt or messages"),
    (GOOD | {"prompt": " "}, "line 2: what the user says is ' ', not a text"),
    (GOOD | {"prompt": 5}, "line 2: what the user says is 5, not a text"),
    ({"messages": []}, "line 2: messages is not a list of messages"),
    ({"messages": ["a"]}, "line 2: a message is 'a', without a role of system, developer, user, assistant"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "line 2: the last message is not the user's"),
    ({"prompt": "a"}, "line 2: it has no reference, but the lines before have one"),
    (GOOD | {"reference": ["b"]}, "line 2: reference is ['b'], not a text"),
    (GOOD | {"id": "mine-1"}, "line 2: the id 'mine-1' is there twice"),
    (GOOD | {"id": 1.5}, "line 2: id is 1.5, not a text or a whole number"),
    (GOOD | {"max_new_tokens": 0}, "line 2: max_new_tokens is 0, not a whole number of at least 1"),
    (GOOD | {"max_new_tokens": True}, "line 2: max_new_tokens is True, not a whole number of at least 1"),
]


@pytest.mark.parametrize(("row", "sentence"), BAD, ids=lambda x: str(x)[:40])
def test_a_bad_line_is_refused_by_file_and_number(lines, row, sentence):
    with pytest.raises(UsageError) as told:
        options.check({"tasks": lines(GOOD, row)})
    assert f"mine.jsonl: {sentence}" in str(told.value)
    assert "\n" not in str(told.value)


def test_what_cannot_be_scored_is_refused_first(lines):
    for spec, sentence in (
        (lines(GOOD) + "#rouge-i", "unknown scorer of --kv-tasks .*: did you mean 'rouge-l'?"),
        (lines({"prompt": "a"}, name="bare.jsonl") + "#qa-f1", "has no references, so qa-f1 can score nothing"),
        (lines(GOOD) + "#retrieval", "sample 1, mine-1: the reference 'b' names no paragraph"),
        (lines(GOOD, name="chat.jsonl"), "there is a task 'chat' already; give the file another name"),
        (lines("", " ", name="empty.jsonl"), "empty.jsonl is empty"),
        ("jsonl:nowhere.jsonl", "'nowhere.jsonl' cannot be read"),
    ):
        with pytest.raises(UsageError, match=sentence):
            task(spec)
    task(lines(GOOD))
    with pytest.raises(UsageError, match="there is a task 'mine' already"):
        task(lines(GOOD) + "#contains")


def test_with_references_a_file_is_scored_and_without_it_is_about_length(lines):
    scored = task(lines(*[GOOD | {"prompt": f"p {i}", "max_new_tokens": 5} for i in range(9)]) + "#contains")
    assert (scored.name, scored.type, scored.evaluation, scored.spelled) == ("mine", "qa", "samples", "mine#contains")
    assert task("mine") is scored
    samples = scored.samples(4, [256], 0, words)
    assert samples == scored.samples(9, [256], 0, words)[:4]
    assert samples != scored.samples(4, [256], 1, words)
    assert {s.max_new_tokens for s in samples} == {5}
    assert [scored.score(samples[0], answer) for answer in ("a B c", "none")] == [1, 0]
    talk = task(lines({"prompt": "p", "answer": "overlooked"}, name="talk.jsonl"))
    assert (talk.type, talk.evaluation, talk.spelled) == ("chat", "length", "talk")
    assert talk.score(talk.samples(1, [256], 0, words)[0], "x") is None


def test_all_messages_are_asked(lines, tiny_llama):
    talk = [("system", "Be short."), ("user", "Hi."), ("assistant", "Hello."), ("user", "And now?")]
    spec = lines({"messages": [{"role": role, "content": text} for role, text in talk]})
    (sample,) = task(spec).samples(1, [256], 0, words)
    asked = options.check({"tasks": spec})
    (ask,) = schedule.task_asks(task("mine"), [sample], asked, "baseline")
    assert [(m["role"], m["content"]) for m in ask.messages] == talk
    templated = TransformersEngine(tiny_llama, Chatting())
    ids, _ = templated.encode(asked_of(sample), "prompt")
    assert "".join(map(chr, ids)) == "system:Be short.|user:Hi.|assistant:Hello.|user:And now?|"
    templated.tokenizer.chat_template = None
    with pytest.raises(UsageError, match="has several messages, but the model has no chat template"):
        templated.encode(asked_of(sample), "prompt")


class Chatting:
    chat_template = "one"

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return "".join(f"{m['role']}:{m['content']}|" for m in messages)


def asked_of(sample):
    return Request(sample.id, sample.context, sample.question, sample.max_new_tokens, sample.before)
