"""Samples of papers, code and puzzles are what they say, and scores what their authors' give."""

import gzip
import json
import sysconfig
from pathlib import Path

import pytest

from kvsuite import models, sandbox
from kvsuite.tasks import Sample, human_eval, reasoning, summarize, task


def words(text):
    return len(text.split())


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>Is it 5?</think>7", 0),
        ("<think>Is it 7?</think>\n\nIt is 5.", 1),
        ("opened in the prompt: 7</think>5", 1),
        ("<think>5 it is, but the cap", 0),
        ("5", 1),
    ],
)
def test_a_local_answer_is_scored_on_what_follows_its_thinking(text, score):
    from kvsuite.engines.request import Response
    from kvsuite.runs.here import record

    sample = Sample("n", "", "", "5", 8)
    found = record(task("needle"), sample, Response("n", "full", text=text, finish="stop"), 8)
    assert (found.score, found.text) == (score, text)


def sound(samples):
    assert len({s.id for s in samples}) == len(samples)
    assert all(s.cluster and s.reference and s.max_new_tokens for s in samples)


@pytest.fixture
def papers(tmp_path, monkeypatch):
    """Four papers with bodies, of which one is too old, in the form of ACLSum's."""
    (tmp_path / "paper_jsons").mkdir()
    rows = []
    for name in ("P18-1001", "2020.acl-main.4", "D16-1234", "N15-1000"):
        rows.append({"id": name, "summary": {aspect: f"The {aspect} of {name}." for aspect in summarize.ASPECTS}})
        body = [{"text": f"Sentence {i} of {name} says one more thing."} for i in range(60)]
        paper = {"title": name, "abstract": f"About {name}.", "pdf_parse": {"body_text": body}}
        (tmp_path / "paper_jsons" / f"{name}.json").write_text(json.dumps(paper))
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(models, "papers", lambda: tmp_path)


def test_papers_have_their_length_and_each_aspect_its_summary(papers):
    samples = task("summarize").samples(9, [100, 200], 0, words)
    sound(samples)
    assert {s.cluster for s in samples} == {"P18-1001", "2020.acl-main.4", "D16-1234"}
    assert len({s.cluster for s in samples[:3]}) == 3
    for at, sample in enumerate(samples):
        wanted, aspect = [100, 200][at % 2], sample.id.rpartition("-")[2]
        assert wanted - 10 <= words(sample.context + sample.question) <= wanted
        assert sample.reference == f"The {aspect} of {sample.cluster}."
        assert summarize.ASPECTS[aspect] in sample.question
    assert samples == task("summarize").samples(9, [100, 200], 0, words)
    assert samples != task("summarize").samples(9, [100, 200], 1, words)
    for count, length in ((10, 100), (1, 2000)):
        with pytest.raises(ValueError, match=f"do not make {count} samples of {length} tokens"):
            task("summarize").samples(count, [length], 0, words)


def test_a_papers_year():
    assert [summarize.year(x) for x in ("P18-1001", "W96-0213", "H05-1", "2020.acl-main.443")] == [
        2018,
        1996,
        2005,
        2020,
    ]


def test_a_line_of_code_stands_once_more_in_what_is_shown():
    samples = task("code-line").samples(4, [300, 600], 0, words)
    sound(samples)
    for at, sample in enumerate(samples):
        wanted = [300, 600][at % 2]
        text = "".join(said for _, said in sample.before) + sample.context + sample.question
        assert wanted - 40 <= words(text) <= wanted
        shown = [line.strip() for line in sample.context.split("\n")]
        assert sample.reference in shown[:-1]
        file, line = Path(sysconfig.get_path("stdlib"), f"{sample.cluster}.py"), int(sample.id.rpartition("-")[2])
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        assert (lines[line - 2], lines[line - 1]) == (shown[-1], sample.reference)
    assert samples == task("code-line").samples(4, [300, 600], 0, words)


@pytest.mark.parametrize(
    ("answer", "score"),  # fuzzywuzzy: round(100 · 2 M / T), M characters in matching blocks, T of both
    [("return xs", 1), ("```python\n    return xs\n```", 1), ("return x", 0.94), ("", 0), ("# none", 0), ("zzz", 0)],
)
def test_a_line_of_code_scores_by_its_letters(answer, score):
    assert task("code-line").score(Sample("c", "", "", "return xs", 64), answer) == score


PROBLEM = {
    "task_id": "HumanEval/7",
    "prompt": 'import math\n\n\ndef half(x):\n    """ Half of x. """\n',
    "canonical_solution": "    return x / 2\n",
    "entry_point": "half",
    "test": "def check(candidate):\n    assert candidate(3) == 1.5\n",
}


@pytest.fixture
def problems(tmp_path, monkeypatch):
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(json.dumps(PROBLEM) + "\n")
    monkeypatch.setattr(models, "problems", lambda: tmp_path)
    monkeypatch.setattr(sandbox, "check", lambda: None)
    return task("human-eval").samples(1, [512], 0, words)


WHOLE = "def half(x):\n    return math.floor(x) / 2 + 0.5 * (x % 1 > 0) + 0.0"
ANSWERS = {
    "return x / 2": 1,
    "    return x / 2\n": 1,
    "return x / 2\n\ndef check(candidate):\n    raise ValueError": 1,
    "y = x\n    return y / 2\nprint(half(": 1,
    "```python\ndef half(x):\n    return x / 2\n```\nThis halves.": 1,
    "Sure:\n```\nimport os\ndef half(x):\n    return other(x)\n\ndef other(x):\n    return x / 2\n```": 1,
    "```py\ndef half(x):\n    return math.fsum([x]) / 2": 1,
    "return x // 2": 0,
    "": 0,
    "I cannot do that.": 0,
    "```python\ndef third(x):\n    return x / 2\n```": 0,
    "```python\nimport sys\nsys.exit(0)\n```": 0,
}


@pytest.mark.parametrize(("answer", "score"), ANSWERS.items(), ids=range(len(ANSWERS)))
def test_code_passes_as_in_humaneval(problems, answer, score, monkeypatch):
    """The program is what check_correctness makes; here it runs as it is, for these answers are ours."""

    def passes(program):
        try:
            exec(program, {})  # noqa: S102  (of the published problems)
        except BaseException:
            return False
        return True

    monkeypatch.setattr(sandbox, "passes", passes)
    assert task("human-eval").score(problems[0], answer) == score


def test_a_bare_body_goes_behind_the_prompt_as_it_is():
    assert human_eval.completion("    return x / 2\n", "half") == "    return x / 2\n"


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        ("First 1.\nAnswer: 7", "7"),
        ("Answer: 1\nNo.\n**Answer:** 7.", "7"),
        ("The final answer is:\n\n7\nThat is all.", "7"),
        ("I think\n7", "7"),
        ("$7$", "7"),
        ("The answer is 7.", "7"),
        ("3 + 5 = 8, so\n8 - 1 = 7", "7"),
        ("", ""),
        ("Answer:", ""),
    ],
)
def test_the_result_of_a_trace(answer, result):
    assert reasoning.final(answer) == result


def test_puzzles_are_scored_by_their_library():
    pytest.importorskip("reasoning_gym")
    puzzles = task("reasoning")
    samples = puzzles.samples(10, [512], 0, words)
    sound(samples)
    assert samples == puzzles.samples(12, [512], 0, words)[:10]
    assert samples != puzzles.samples(10, [512], 1, words)
    for sample in samples:
        assert puzzles.score(sample, f"So it is.\nAnswer: {sample.reference}") == 1
        assert puzzles.score(sample, "Answer: nothing of that kind") < 0.7


def test_without_the_library_puzzles_say_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match=r"pip install 'kvsuite\[reasoning\]'"):
        task("reasoning").samples(1, [512], 0, words)
