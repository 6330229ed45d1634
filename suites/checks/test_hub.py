"""Published benchmarks are asked and scored as published, from the hub's cache or a copy, and refused in a sentence."""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import fields
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from kvsuite import scorers
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.errors import UsageError
from kvsuite.plugin import options, schedule
from kvsuite.readers.base import LONGBENCH
from kvsuite.records import Answer, read
from kvsuite.runs import again
from kvsuite.runs.here import Here
from kvsuite.tasks import FRAME, base, hub, rows, task
from suites.checks.test_tasks import Chatting, asked_of
from suites.checks.tiny import ROOT, left

LONG = {"_id": "a1", "context": "C", "input": "I", "answers": ["x", "y"], "all_classes": None, "length": 3}
V2 = {"_id": "b", "context": " C\n", "question": "Q? ", "answer": "B", "difficulty": "easy"}
V2 |= {f"choice_{letter}": f" {letter.lower()}" for letter in "ABCD"}
RULER = {"context": "C ", "question": "Q?", "answer_prefix": " It is", "answer": ["7"], "task": "vt"}
TURN = {"input": "k?", "answer": "v"}
TALK = [("user", "write a poem"), ("assistant", "P1"), ("user", "Prepend zz to the 1st poem.")]
MRCR = {"prompt": json.dumps([{"role": role, "content": text} for role, text in TALK]), "answer": "zzP1"}
MRCR |= {"n_needles": 2, "random_string_to_prepend": "zz"}


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(base, "_FILES", {})


@pytest.fixture
def copy(tmp_path):
    """Write rows; give what --kv-tasks calls them."""

    def write(name, *found):
        file = tmp_path / f"{name.replace('/', '-')}.jsonl"
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in found), encoding="utf-8")
        return f"hub:{name}={file}"

    return write


def only(spec, count=1, room=None):
    made = task(spec)
    if room is not None:
        made.room = lambda answer: room
    made.fetch()
    return made.samples(count, [256], 0, len)


BOOK = "Read the book and answer the question. Be very concise in your answer.\n\n"
PROMPTS = [
    (
        "longbench/multi_news", LONG,
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\nC",
        "\n\nNow, write a one-page summary of all the news.\n\nSummary:", 512,
    ),
    (
        "longbench/qasper", LONG,
        "You are given a scientific article and a question. Answer the question as concisely as you can, using a "
        "single phrase or sentence if possible. If the question cannot be answered based on the information in the "
        'article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". '
        "Do not provide any explanation.\n\nArticle: C",
        "\n\n Answer the question based on the above article as concisely as you can, using a single phrase or "
        "sentence if possible. If the question cannot be answered based on the information in the article, write "
        '"unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide '
        "any explanation.\n\nQuestion: I\n\nAnswer:", 128,
    ),
    ("longbench/lcc", LONG, "Please complete the code given below. \nC", "Next line of code:\n", 64),
    (
        "longbench-e/trec", LONG | {"all_classes": ["x"]},
        "Please determine the type of the question below. Here are some examples of questions.\n\nC", "\nI", 64,
    ),
    (
        "longbench-v2", V2,
        "Please read the following text and answer the question below.\n\n<text>\nC",
        "\n</text>\n\nWhat is the correct answer to this question: Q?\nChoices:\n(A) a\n(B) b\n(C) c\n(D) d\n\n"
        'Format your response as follows: "The correct answer is (insert answer here)".', 128,
    ),
    ("ruler/vt@8192", RULER, "C ", "Q?", 30),
    ("gsm8k", {"question": "Q?", "answer": "a\n#### 3"}, "Q: Q?\nA: Let's think step by step.", "", 256),
    ("aime25", {"problem": "P", "answer": "70", "id": "0"}, "Question: P\nAnswer:", "", 32768),
    ("aime24", {"Problem": "P", "Answer": 70}, "Question: P\nAnswer:", "", 32768),
    ("mrcr", MRCR, "", "Prepend zz to the 1st poem.", 1 << 16),
    ("scbench/qa_eng", {"context": "C", "multi_turns": [TURN]}, f"{BOOK}C", "\n\nQuestion: k?\nAnswer:", 40),
    (
        "scbench/mf",
        {"context": [3, 5], "multi_turns": [{"input": "The largest number is", "answer": 5}]},
        "What is the largest number?\n\n[3, 5]", "\n\nThe largest number is", 5,
    ),
    (
        "scbench/choice_eng",
        {"context": "C", "multi_turns": [{"input": "q", "answer": "y", "options": ["w", "x", "y", "z"]}]},
        "Read the book and answer the question.\n\nC",
        "\n\nQuestion: q\nA. w\nB. x\nC. y\nD. z\n\nThe the correct answer is", 40,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "context", "question", "most"), PROMPTS, ids=[p[0] for p in PROMPTS])
def test_prompts_are_as_published(copy, name, row, context, question, most):
    [sample] = only(copy(name, row))
    assert (sample.context, sample.question, sample.max_new_tokens) == (context, question, most)


PLAIN = ("trec", "triviaqa", "samsum", "lcc", "repobench-p")


def test_every_table_is_whole():
    """Each part makes a benchmark whose rule is known and whose type is that of the paper."""
    known = {f.name for f in fields(hub.Benchmark)} | {"parts"}
    made = {}
    for name, entry in hub.table().items():
        assert entry.keys() <= known
        parts = entry.get("parts", {})
        names = [f"{name}/{part}" for part in parts] + [name] * (not parts or entry.get("whole", False))
        made |= {name: hub.Hub.parse(f"hub:{name}") for name in names}
    assert len(made) == 18 + 13 + 1 + 13 + 1 + 2 + 4 + 6
    for name, found in made.items():
        b = found.benchmark
        assert b.rule in hub.RULES, name
        assert b.source, name
        assert found.part in scorers.LONGBENCH_RULES or b.rule != "longbench"
        assert found.type == LONGBENCH.get(found.part, found.type)
    assert {n for n, t in made.items() if t.benchmark.plain} == {
        f"{b}/{part}" for b in ("longbench", "longbench-e") for part in PLAIN
    } | {"longbench/lsht"}
    assert {n: t.benchmark.chance for n, t in made.items() if t.benchmark.chance} == {
        "longbench-v2": 0.25,
        "scbench/choice_eng": 0.25,
    }


def test_turns_carry_the_right_answers_and_their_context(copy):
    turns = [{"input": f"k{i}?", "answer": f"v{i}"} for i in range(7)]
    spec = copy("scbench/kv", {"context": "C" * 900, "multi_turns": turns}, {"context": "D", "multi_turns": turns})
    samples = only(spec, 10)
    assert len({s.id for s in samples}) == 10, "five turns of each"
    assert len({s.cluster for s in samples}) == 2
    third = next(s for s in samples if s.id == "kv-1-turn-2")
    head = "Extract the value corresponding to the specified key in the JSON object below.\n\nD"
    assert third.before == (
        ("user", f"{head}\n\nk0?"), ("assistant", "v0"), ("user", "k1?"), ("assistant", "v1")
    )  # fmt: skip
    assert (third.context, third.question) == ("", "k2?")
    assert [task("scbench/kv").score(third, said) for said in ("v2!", "v1")] == [1, 0]
    short = [s for s in only(spec, 10, room=600) if s.id.startswith("kv-0")]
    assert len({(s.before or (("", s.context + s.question),))[0][1] for s in short}) == 1, "one cut for all turns"
    for s in short:
        assert sum(len(text) + hub.MESSAGE for _, text in s.before) + len(s.context + s.question) <= 600
    assert task("scbench/kv").fitted == {"cut in the middle": 5}


def test_conversations_are_asked_whole_or_not_at_all(copy):
    [sample] = only(copy("mrcr", MRCR))
    assert sample.before == tuple(TALK[:-1])
    many = json.dumps([{"role": "user", "content": "x" * 500}])
    spec = copy("mrcr/2needle", MRCR | {"prompt": many}, MRCR, MRCR | {"n_needles": 4})
    assert [s.id for s in only(spec, 9, room=90)] == ["2needle-1"]
    assert task("mrcr/2needle").fitted == {"rows left out as too long": 1}
    with pytest.raises(UsageError, match="hub:mrcr/2needle: no prompt fits the model's context"):
        only(spec, 9, room=10)


def test_a_long_prompt_keeps_its_first_and_last_half(copy):
    """With a character for a token, exactly what pred.py of LongBench leaves."""
    text = "".join(chr(33 + i % 90) for i in range(5000))
    spec = copy("longbench/hotpotqa", LONG | {"context": text})
    [whole], [cut] = only(spec), only(spec, room=3001)
    prompt = whole.context + whole.question
    half = int(3001 / 2)
    assert cut.context + cut.question == prompt[:half] + prompt[-half:]
    assert cut.question == whole.question
    assert cut.cluster == whole.cluster
    assert task("longbench/hotpotqa").fitted == {"cut in the middle": 1}
    [tiny] = only(spec, room=100)  # the question, too
    assert (tiny.context, tiny.question) == (prompt[:50], prompt[-50:])
    with pytest.raises(UsageError, match="does not fit the model's context, whatever is cut"):
        only(spec, room=1)
    asked = copy("longbench/qmsum", LONG | {"input": text})  # the cut is within the question
    [whole], [cut] = only(asked), only(asked, room=2000)
    prompt = whole.context + whole.question
    assert cut.context + cut.question == prompt[:1000] + prompt[-1000:]
    assert cut.context == whole.context


def test_what_is_said_first_and_what_has_no_template(copy, tiny_llama):
    engine = TransformersEngine(tiny_llama, Chatting())
    [given] = only(copy("ruler/vt", RULER, RULER | {"task": "cwe"}), 9)
    ask = Here.request(Here(options_setting()), given)
    ids, _ = engine.encode(ask, "prompt")
    assert "".join(map(chr, ids)) == "user:C Q?| It is"
    [code] = only(copy("longbench/lcc", LONG))
    ids, _ = engine.encode(Here.request(Here(options_setting()), code), "prompt")
    assert "".join(map(chr, ids)) == "Please complete the code given below. \nCNext line of code:\n"
    [served] = schedule.task_asks(task("ruler/vt"), [given], options.check({}), "baseline")
    assert served.messages == ({"role": "user", "content": "C Q? It is"},)
    assert asked_of(code).plain is False, "what others ask is asked as before"


def options_setting():
    class Setting:
        cap = 99

    return Setting()


def test_a_repository_is_read_from_a_copy_and_from_the_cache(tmp_path, monkeypatch):
    """A folder of the repository's files, as `hf download --local-dir` leaves, and what `datasets` has cached."""
    found = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(3)]
    folder, cache = tmp_path / "gsm8k", tmp_path / "cache"
    (folder / "main").mkdir(parents=True)
    head = "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: test, path: main/test-*}\n---\n"
    (folder / "README.md").write_text(head)
    datasets.Dataset.from_list(found).to_parquet(folder / "main" / "test-00000-of-00001.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    copied = task(f"hub:gsm8k={folder}")
    assert [dict(row) for row in copied.rows] == found
    made = next(cache.glob("gsm8k/main/0.0.0/*/gsm8k-test.arrow")).parent
    shutil.copytree(made, cache / "openai___gsm8k" / "main" / "0.0.0" / ("a" * 40))
    monkeypatch.setattr(base, "_FILES", {})
    cached = task("hub:gsm8k")
    assert [dict(row) for row in cached.rows] == found
    assert cached.fingerprint() == copied.fingerprint() == rows.fingerprint(found)
    assert rows.fingerprint([dict(reversed(row.items())) for row in found]) == cached.fingerprint()
    assert task("hub:gsm8k").rows is cached.rows, "loaded once, however often it is named"
    assert cached.fingerprint() != rows.fingerprint(found[:2])


def test_longbench_is_read_out_of_its_archive(tmp_path, monkeypatch):
    """Its repository has a loading script, which no `datasets` runs any more: in the hub's cache and in a copy."""
    snapshot = tmp_path / "datasets--THUDM--LongBench" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    with zipfile.ZipFile(snapshot / "data.zip", "w") as archive:
        for name in ("lsht", "trec_e"):
            archive.writestr(f"data/{name}.jsonl", json.dumps(LONG | {"input": name, "all_classes": ["x", "y"]}))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert only("hub:longbench/lsht")[0].question == "\nlsht"
    assert only("hub:longbench-e/trec")[0].question == "\ntrec_e"
    assert only(f"hub:longbench-e/trec@={snapshot}")[0].question == "\ntrec_e"
    with pytest.raises(UsageError, match=r"data.zip holds no data/musique.jsonl"):
        only("hub:longbench/musique")
    monkeypatch.setattr(rows, "LARGEST", 10)
    with pytest.raises(UsageError, match=r"data/trec_e.jsonl in data.zip has \d+ bytes, more than"):
        rows._archive(snapshot / "data.zip", "data/trec_e.jsonl")


@pytest.mark.parametrize("name", ["gsm8k", "longbench/multi_news"])
def test_without_a_hub_a_sentence_comes_at_once(name, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits for a hub that is not there"))
    dataset = task(f"hub:{name}").benchmark.dataset
    with pytest.raises(UsageError) as offline:
        task(f"hub:{name}").fetch()
    assert str(offline.value) == (
        f"{dataset} cannot be had from Hugging Face's hub (HF_HUB_OFFLINE is set, and it is not in the cache); run "
        "once where the hub can be reached, or name a copy: hub:NAME=PATH"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UsageError, match=f"{dataset} cannot be had from Hugging Face's hub \\(it cannot be reached, "):
        task(f"hub:{name}").fetch()
    assert datasets.config.HF_HUB_OFFLINE is False, "left as it was"


def test_the_sentence_needs_nothing_loaded_before(tmp_path):
    """The hub's client loads its modules when they are first imported, and no model has been loaded before."""
    code = "from kvsuite.tasks import task; task('hub:gsm8k').fetch()"
    here = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True, check=False)
    assert "UsageError: openai/gsm8k cannot be had from Hugging Face's hub (HF_HUB_OFFLINE is set" in done.stderr


def test_what_cannot_be_named_or_read_is_refused(copy, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "cut.jsonl").write_text('{"question": ')
    for spec, sentence in (
        ("hub:gsm9k", "unknown benchmark of --kv-tasks hub: 'gsm9k': did you mean 'gsm8k'?"),
        ("hub:longbench", "unknown part of --kv-tasks hub:longbench/ ''"),
        ("hub:longbench/multinews", "did you mean 'multi_news'?"),
        ("hub:gsm8k/main", "unknown part of --kv-tasks hub:gsm8k/ 'main'"),
    ):
        with pytest.raises(UsageError, match=sentence.replace("?", r"\?")):
            options.check({"tasks": spec})
    for spec, sentence in (
        (f"hub:gsm8k={tmp_path / 'none'}", "none' does not exist"),
        (f"hub:aime25={tmp_path / 'notes.txt'}", r"is no folder, and no .jsonl, .parquet or .zip"),
        (f"hub:aime24={tmp_path / 'cut.jsonl'}", "cannot be read as Maxwell-Jia/AIME_2024: "),
        (copy("longbench-v2", {"context": "C"}), "row 0 is not of the shape that was published .*; it has context"),
        (copy("scbench/vt", {"context": "", "multi_turns": [TURN]}), "no rule here to score vt of SCBench against 'v'"),
        (copy("mrcr/8needle", MRCR), "hub:mrcr/8needle: openai/mrcr has no rows of it"),
    ):
        with pytest.raises(UsageError, match=sentence) as told:
            task(spec).fetch()
        assert "\n" not in str(told.value)
    with pytest.raises(UsageError, match="there is a task 'gsm8k' already"):
        task("hub:gsm8k")


def test_a_run_says_what_it_read_and_what_it_cut(run, copy, world):
    """LongBench's prompt is cut to the model's 1024 tokens, by ``kvsuite why``, too; an answer to RULER goes on from
    its first words."""
    spec = copy("longbench/hotpotqa", LONG | {"context": "passage " * 300}, LONG | {"_id": "b"})
    given = f"{spec},{copy('ruler/vt@4096', *[RULER] * 2)}"
    outcome = run(
        "samples", "--kv-tasks", given, "--kv-compress", "context", "--kv-methods", "full,int8", "-k", "answers"
    )
    assert outcome.ret == 0, outcome.stdout
    facts = read(Path("left")).facts
    assert facts["fitted"] == {"longbench/hotpotqa": {"cut in the middle": 1}}
    assert facts["texts"].keys() == set(facts["settings"]["tasks"]) == {"longbench/hotpotqa", "ruler/vt@4096"}
    assert facts["texts"]["ruler/vt@4096"] == rows.fingerprint([RULER] * 2)
    answers = [a for a in left(Answer) if a.method == "full"]
    assert {a.sample for a in answers} == {"hotpotqa-a1", "hotpotqa-b", "vt-0", "vt-1"}
    longest = max(a.prompt_tokens for a in answers)
    assert longest in (1024 - FRAME - 6, 1024 - FRAME - 7)
    model = again.here(read(Path("left")), world / "model")
    wanted = {task: {a.sample for a in answers if a.task == task} for task in facts["texts"]}
    with pytest.raises(UsageError, match="say where they come from, --task hub:longbench/hotpotqa or"):
        again.samples(read(Path("left")), model, wanted)
    made = again.samples(read(Path("left")), model, wanted, given.split(","))
    assert {s.prompt_hash for some in made.values() for s in some} == {a.prompt_hash for a in answers}
    outcome.stdout.fnmatch_lines(["*longbench/hotpotqa 2 (1 cut in the middle)*"])


REAL = Path(os.environ.get("KVSUITE_LONGBENCH", "none"), "multi_news.jsonl")


@pytest.mark.skipif(not REAL.exists(), reason="KVSUITE_LONGBENCH names no folder with multi_news.jsonl")
def test_longbenchs_own_rows():
    """The 200 rows of multi_news; ROUGE-L is what the library `rouge` gives, of which LongBench takes ``f``."""
    import rouge

    name = f"hub:longbench/multi_news={REAL}"
    samples = only(name, 1000)
    assert len({s.id for s in samples}) == len(samples) == 200
    assert task(name).fitted == {}
    short = only(name, 200, room=8000)
    assert max(len(s.context + s.question) for s in short) == 8000
    assert task(name).fitted["cut in the middle"] == sum(len(s.context + s.question) > 8000 for s in samples)
    for sample in samples[:5]:
        answer, [reference] = " ".join(sample.context.split()[40:160]), json.loads(sample.reference)["answers"]
        expected = rouge.Rouge().get_scores([answer], [reference], avg=True)["rouge-l"]["f"]
        assert task(name).score(sample, answer) == pytest.approx(expected, abs=1e-12)
        assert 0 < expected < 1
