"""Other tools' results are read as their sources say they are written, and what is not whole is refused by name."""

import csv
import functools
import gzip
import io
import json
import math
import sys

import numpy as np
import pytest

from kvsuite import scorers
from kvsuite.columns import align
from kvsuite.errors import UsageError
from kvsuite.readers import Load, formats, read
from kvsuite.records import Answer, RunFolder


def refused(spec, *words):
    """The one sentence that ``spec`` is refused with."""
    with pytest.raises(UsageError) as caught:
        read(spec)
    said = str(caught.value)
    for word in words:
        assert str(word) in said
    assert "\n" not in said
    return said


def put(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def scores(arm):
    return {f"{dataset} {sample}": score for (dataset, sample), score in zip(arm.keys, arm.score, strict=True)}


# by name


def test_formats_are_found_by_file_name():
    assert {"artifact", "guidellm", "kvpress", "lm-eval", "vllm-bench"} <= set(formats())
    assert "base" not in formats()


def test_an_unknown_format_lists_the_known(tmp_path):
    refused(f"lm_eval:{tmp_path}", "unknown format of results 'lm_eval'", "did you mean 'lm-eval'", "vllm-bench")


@pytest.mark.parametrize("name", ["artifact", "guidellm", "kvpress", "lm-eval", "vllm-bench"])
def test_what_is_not_there_is_said(name, tmp_path):
    refused(f"{name}:{tmp_path}/nothing/here.json", f"there is no file or folder '{tmp_path}/nothing")


@pytest.mark.parametrize("there", ["", "a", "a#1"], ids=["alone", "beside a", "beside a#1"])
def test_a_path_may_hold_the_sign_that_chooses(there, tmp_path):
    folder = tmp_path / "a#1#b"
    if there:
        samples(tmp_path / there, "t", sample(9, acc=0.25))
    samples(folder, "t", sample(0, acc=1, em=0))
    assert scores(read(f"lm-eval:{folder}")) == {"t 0": 1}
    assert scores(read(f"lm-eval:{folder}#em")) == {"t 0": 0}
    assert scores(read(f"lm-eval:{folder}/samples_t*#em")) == {"t 0": 0}
    artifact(folder, "full#2_trec", rows(0.5))
    assert scores(read(f"artifact:{folder}/full#2")) == {"trec 0": 0.5}
    refused(f"lm-eval:{folder}/gone#em", f"no file or folder '{folder}/gone'")
    RunFolder(folder).describe({})
    RunFolder(folder).append(Answer("m", task="t", sample="s", score=0.5))
    assert scores(read(f"{folder}#m")) == scores(read(f"run:{folder}#m")) == {"t s": 0.5}


# what programs do to a file on its way here


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    files = {
        "lm-eval": samples(tmp_path / "l", "t", sample(0, acc=1)),
        "kvpress": predictions(tmp_path / "k", {"answer": "2", "predicted_answer": "2"}, config="aime25"),
        "artifact": artifact(tmp_path, "full_trec", rows(1)),
        "vllm-bench": put(tmp_path / "v.json", serving()),
        "guidellm": report(tmp_path, benchmark(request(0))),
    }
    for file in (*files.values(), tmp_path / "k" / "config.yaml"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    for name, file in files.items():
        assert len(read(f"{name}:{tmp_path / 'full' if name == 'artifact' else file}"))


@pytest.mark.parametrize("sample_id", [None, ""])
def test_a_sample_without_an_id_is_refused(sample_id, tmp_path):
    for spec, file in (
        (f"artifact:{tmp_path}/x", artifact(tmp_path, "x_trec", [{"id": sample_id, "score": 1}])),
        (f"lm-eval:{tmp_path}/l", samples(tmp_path / "l", "t", sample(sample_id, acc=1))),
    ):
        refused(spec, file, f"has the id {sample_id!r}")


@pytest.mark.parametrize("name", ["artifact:{0}", "kvpress:{0}", "lm-eval:{0}", "vllm-bench:{0}", "guidellm:{0}"])
def test_a_compressed_file_is_refused_by_name(name, tmp_path):
    file = tmp_path / ("samples_t.jsonl" if "lm" in name else "x_eval.json")
    file.write_bytes(gzip.compress(b'{"doc_id": 0}'))
    refused(name.format(tmp_path / "x" if "artifact" in name else file), file)


# artifact: github.com/LLMkvsys/rethink-kv-compression


def artifact(folder, name, rows):
    return put(folder / f"{name}_eval.json", rows)


def rows(*scores, first=0):
    return [{"id": at, "score": score} for at, score in enumerate(scores, first)]


def test_an_artifact_has_the_datasets_that_its_file_names_say(tmp_path):
    for dataset in ("repobench-p", "passage_retrieval_en", "2wikimqa"):
        artifact(tmp_path, f"llama_kivi_{dataset}", rows(0.25, 1))
    artifact(tmp_path, "llama_h2o_trec", rows(0))
    arm = read(f"artifact:{tmp_path}/llama_kivi")
    assert sorted(arm.types.items()) == [
        ("2wikimqa", "qa"),
        ("passage_retrieval_en", "synthetic"),
        ("repobench-p", "code"),
    ]
    assert scores(arm)["repobench-p 0"] == 0.25
    assert np.isnan(arm.tokens).all()
    assert len(arm) == 6
    assert read(f"artifact:{tmp_path}/llama_kivi_").keys == arm.keys


def test_an_artifacts_folder_may_be_a_pattern_or_have_brackets(tmp_path):
    artifact(tmp_path / "a" / "x", "full_trec", rows(1))
    artifact(tmp_path / "b" / "x", "full_lcc", rows(0))
    artifact(tmp_path / "m[1]", "full_qmsum", rows(0.5))
    assert scores(read(f"artifact:{tmp_path}/*/x/full")) == {"trec 0": 1, "lcc 0": 0}
    assert scores(read(f"artifact:{tmp_path}/m[1]/full")) == {"qmsum 0": 0.5}
    artifact(tmp_path / "b" / "x", "full_trec", rows(1))
    refused(f"artifact:{tmp_path}/*/x/full", "dataset trec is there twice", tmp_path / "a", tmp_path / "b")


def test_an_artifact_of_two_configurations_is_refused(tmp_path):
    one, other = artifact(tmp_path, "kivi_trec", rows(1)), artifact(tmp_path, "kivi4_trec", rows(1))
    refused(f"artifact:{tmp_path}/kivi", one, other, "two configurations")
    refused(f"artifact:{tmp_path}/kivi_trec", one, "no room for a dataset")
    refused(f"artifact:{tmp_path}/h2o", "no file", "'h2o'")
    refused(f"artifact:{tmp_path}/", "say how the file names begin")
    refused(f"artifact:{tmp_path}/kivi_#trec", "no file", "starts with 'kivi_#trec'")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('[{"id": 0, "score": 0.5}, {"id": 1, "sc', "is it cut off?"),
        ([], "not a list of scores"),
        ({"id": 0, "score": 1}, "not a list of scores"),
        ([{"id": 0, "score": 1}, {"id": 1}], "entry 1 has no id and score"),
        ([{"id": 0, "score": None}], "sample 0 of trec has no score"),
        (rows(1, math.nan), "sample 1 of trec has the score nan, not a number from 0 to 1"),
        (rows(37.5), "sample 0 of trec has the score 37.5"),
        (rows(math.inf), "sample 0 of trec has the score inf"),
        (rows(-0.1), "sample 0 of trec has the score -0.1"),
        ([{"id": 0, "score": True}], "sample 0 of trec has the score True"),
        ([{"id": 0, "score": "1"}], "sample 0 of trec has the score '1'"),
        ([*rows(1), *rows(0)], "sample 0 of trec is there twice"),
    ],
)
def test_a_broken_artifact_is_refused_by_file_and_sample(content, said, tmp_path):
    refused(f"artifact:{tmp_path}/x", artifact(tmp_path, "x_trec", content), said)


def test_arms_that_lack_samples_are_refused_unless_that_is_allowed(tmp_path):
    long, short = artifact(tmp_path, "a_trec", rows(1, 0, 1)), artifact(tmp_path, "b_trec", rows(0, 1, first=1))
    artifact(tmp_path, "a_lcc", rows(1))
    arms = [read(f"artifact:{tmp_path}/{name}") for name in ("a_", "b_")]
    with pytest.raises(UsageError, match="has no dataset lcc"):
        align(arms)
    aligned, said = align(arms, allow_missing=True)
    assert [list(arm.score) for arm in aligned] == [[0, 1], [0, 1]]
    assert [arm.keys for arm in aligned] == [[("trec", "1"), ("trec", "2")]] * 2
    assert said == [
        "left out of lcc: 1 of 1 samples that not all have (0)",
        "left out of trec: 1 of 3 samples that not all have (0)",
    ]
    only = [read(f"artifact:{tmp_path}/{name}") for name in ("a_t", "b_t")]
    (tmp_path / "a_lcc_eval.json").unlink()
    with pytest.raises(UsageError, match=f"{short} has no sample 0 of rec, which {long} has; --allow-missing"):
        align(only)
    assert align(only[:1] * 2) == (only[:1] * 2, [])


def test_aligned_arms_have_one_order(tmp_path):
    artifact(tmp_path, "a_trec", [{"id": "x", "score": 1}, {"id": "y", "score": 0}])
    artifact(tmp_path, "b_trec", [{"id": "y", "score": 0.5}, {"id": "x", "score": 0.25}])
    aligned, said = align([read(f"artifact:{tmp_path}/{name}") for name in ("a_", "b_")], allow_missing=True)
    assert [list(arm.score) for arm in aligned] == [[1, 0], [0.25, 0.5]]
    assert said == []


# kvpress 0.5.4: evaluation/evaluate.py (_save_results: pandas' to_csv of all columns but the context, in any order);
# a column of lists holds NumPy arrays, which pandas prints


def listed(*strings):
    return str(np.array(strings, dtype=object))


def predictions(folder, *rows, config=""):
    if config:
        put(folder / "config.yaml", f"dataset: {config}\ndata_dir: '4096'\nmodel: m\n")
    folder.mkdir(exist_ok=True, parents=True)
    with (folder / "predictions.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    return folder / "predictions.csv"


def needle(predicted, *answers, task="niah_multivalue"):
    return {
        "answer": listed(*answers), "task": task, "question": "What are all the special magic numbers?",
        "answer_prefix": "The special magic", "max_new_tokens": 128, "predicted_answer": predicted,
        "compression_ratio": 0.5,
    }  # fmt: skip


def test_ruler_is_scored_as_kvpress_scores_it(tmp_path):
    # benchmarks/ruler/calculate_metrics.py: the part of the references that are there, or for qa any
    file = predictions(
        tmp_path,
        needle("12, and\n34", "12", "34", "56", "78"),
        needle("", "12"),
        needle("It's PARIS.", "Lyon", "It's Paris", task="qa_1"),
        needle("no", "a\n'b'", '"c" \\', task="vt"),
    )
    arm = read(f"kvpress:{file}")
    assert list(arm.score) == [0.5, 0, 1, 0]
    assert arm.dataset == ["niah_multivalue", "niah_multivalue", "qa_1", "vt"]
    assert arm.types == {"niah_multivalue": "synthetic", "qa_1": "qa", "vt": "synthetic"}
    assert arm.text[:2] == ["12, and\n34", ""]
    assert read(f"kvpress:{tmp_path}").keys == arm.keys
    assert [sample.split("-")[1] for _, sample in arm.keys] == ["0", "1", "2", "3"]


def test_ruler_joins_what_a_control_character_separates(tmp_path):
    file = predictions(tmp_path, needle("4\n2", "42"), needle("4 2", "42"))
    assert list(read(f"kvpress:{file}").score) == [1, 0]


def test_lists_may_also_be_printed_by_python(tmp_path):
    row = needle("a, b and c", "x") | {"answer": "['a', \"it's\", 'c', 'z']"}
    assert list(read(f"kvpress:{predictions(tmp_path, row)}").score) == [0.5]


def test_rows_of_other_samples_do_not_align(tmp_path):
    one = predictions(tmp_path / "a", needle("1", "1"), needle("2", "2"))
    same = predictions(tmp_path / "b", needle("x", "1"), needle("y", "2") | {"question": ""})
    other = predictions(tmp_path / "c", needle("1", "1"), needle("2", "3"))
    aligned, _ = align([read(f"kvpress:{one}"), read(f"kvpress:{same}")])
    assert [list(arm.score) for arm in aligned] == [[1, 1], [0, 0]]
    with pytest.raises(UsageError, match="has no sample row-1-"):
        align([read(f"kvpress:{one}"), read(f"kvpress:{other}")])


def longbench(task, predicted, *answers, classes="", id="7"):
    # benchmarks/longbench/create_huggingface_dataset.py keeps all columns of THUDM/LongBench
    return {
        "_id": id, "answers": listed(*answers), "all_classes": listed(*classes) if classes else "", "task": task,
        "length": 3000, "language": "en", "question": "?", "predicted_answer": predicted,
    }  # fmt: skip


def test_longbench_is_scored_by_each_datasets_rule(tmp_path):
    file = predictions(
        tmp_path,
        longbench("hotpotqa", "the Cat, sat", "a dog", "cat sat down"),
        longbench("trec", "Food\nor Animal", "Food", classes=("Food", "Animal")),
        longbench("lcc", "\n# no\n    return x\n", "    return y"),
        longbench("passage_count", "3 or 4 or 3", "3"),
        longbench("passage_retrieval_en", "Paragraph 12 or 1", "Paragraph 12"),
    )
    arm = read(f"kvpress:{file}")
    assert scores(arm) == {
        "hotpotqa 7": pytest.approx(0.8),
        "trec 7": 1,
        "lcc 7": 0.92,  # fuzzywuzzy: 92 %
        "passage_count 7": pytest.approx(2 / 3),
        "passage_retrieval_en 7": 0.5,
    }
    assert arm.types["lcc"] == "code"


def test_kvpress_strips_longbench_but_not_longbench_e(tmp_path):
    row = longbench("lcc", "    x = 1", "    x = 1")
    plain, strict = (predictions(tmp_path / name, row, config=name) for name in ("longbench", "longbench-e"))
    assert list(read(f"kvpress:{plain}").score) == [0.71]
    assert list(read(f"kvpress:{strict}").score) == [1]


def test_other_benchmarks_of_kvpress(tmp_path):
    math500 = {"answer": "3/4", "question": "?", "predicted_answer": r"so \boxed{3/4}"}
    v2 = {"answer": "A", "choice_A": "x", "_id": "66f", "predicted_answer": "**The correct answer is (A)**"}
    assert scores(read(f"kvpress:{predictions(tmp_path / 'v2', v2)}")) == {"longbench-v2 66f": 1}
    arm = read(f"kvpress:{predictions(tmp_path / 'm', math500, math500, config='math500')}")
    assert arm.dataset == ["math500", "math500"]
    assert list(arm.score) == [1, 1]


# NVIDIA/kvpress, evaluation/benchmarks/aime25/calculate_metrics.py and math500/calculate_metrics.py: what extract_boxed
# and score_aime of both files gave when they were run on these answers
BOXED = [
    (r"\boxed{1} \boxed{2}", "2", 1, 0),
    (r"\boxed{1} \boxed{2}", "1", 0, 1),
    ("2", "2", 1, 0),
    ("no box", "2", 0, 0),
    ("2} and more", "2", 1, 0),
    (r"\boxed{2", "2", 1, 1),
    (r"\boxed{\boxed{2}}", "2", 1, 0),
    (r"\boxed{ 2 }", "2", 0, 0),
    (r"\boxed{2}, or 3", "2", 1, 1),
    (r"\boxed{1 \boxed{2}", "1 \\", 0, 1),
    (r"\boxed{\frac{1}{2}}", r"\frac{1", 1, 1),
    ("\\boxed{2\n}", "2\n", 1, 1),
    (r"\boxed{}", "2", 0, 0),
]


@pytest.mark.parametrize(("config", "at"), [("aime25", 2), ("math500", 3)])
def test_boxed_answers_are_scored_as_kvpress_scores_them(config, at, tmp_path):
    rows = [{"answer": case[1], "question": "?", "predicted_answer": case[0]} for case in BOXED]
    arm = read(f"kvpress:{predictions(tmp_path, *rows, config=config)}")
    assert list(arm.score) == [case[at] for case in BOXED]


def test_any_reference_counts_for_a_task_called_qa(tmp_path):
    # NVIDIA/kvpress, ruler/calculate_metrics.py: the category is what stands before the first "_"
    arm = read(f"kvpress:{predictions(tmp_path, needle('Paris', 'Lyon', 'Paris', task='qa'), config='ruler')}")
    assert (list(arm.score), arm.types) == ([1], {"qa": "qa"})


def test_a_column_score_is_taken_as_it_is(tmp_path):
    rows = [
        {"predicted_answer": str(at), "question": str(at), "score": score} for at, score in enumerate((0.25, "True"))
    ]
    arm = read(f"kvpress:{predictions(tmp_path / 'loogle__shortdep_qa__m__snapkv__0.50', *rows, config='loogle')}")
    assert list(arm.score) == [0.25, 1]
    assert set(arm.dataset) == {"loogle"}


@pytest.mark.parametrize("score", ["nan", "inf", "37.5", "-1", "", "good"])
def test_a_score_that_is_none_is_refused(score, tmp_path):
    file = predictions(tmp_path, {"predicted_answer": "a", "task": "t", "question": "q", "score": score})
    refused(f"kvpress:{file}", file, "score", score)


@pytest.mark.parametrize("config", ["needle_in_haystack", "infinitebench", "zero_scrolls"])
def test_what_cannot_be_scored_is_said(config, tmp_path):
    file = predictions(tmp_path, needle("x", "y", task="passkey"), config=config)
    refused(f"kvpress:{file}", "line 2 (passkey)", f"answers of {config} cannot be scored", "longbench-v2", "ruler")
    refused(
        f"kvpress:{predictions(tmp_path / 'x', needle('x', 'y', task='passkey'))}", "these answers cannot be scored"
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answer": ""}, "line 3 (niah_multivalue): there is nothing in the column answer"),
        ({"answer": "[]"}, "line 3 (niah_multivalue): there is no answer to compare with"),
        ({"answer": "['a' ... 'b']"}, "line 3 (niah_multivalue): \"['a' ... 'b']\" is not a list of strings"),
    ],
)
def test_a_row_without_answers_is_refused_by_line(change, said, tmp_path):
    file = predictions(tmp_path, needle("1", "1"), needle("2", "2") | change)
    refused(f"kvpress:{file}", file, said)


def test_longbench_beyond_its_rules_is_refused(tmp_path):
    file = predictions(tmp_path, longbench("dureader", "x", "y"))
    refused(f"kvpress:{file}", "line 2 (dureader)", "no rule here to score dureader", "hotpotqa")
    refused(f"kvpress:{predictions(tmp_path, longbench('trec', 'x', 'y'))}", "without the names of its classes")
    refused(f"kvpress:{predictions(tmp_path, longbench('passage_retrieval_en', 'x', 'y'))}", "'y' names no paragraph")


def test_long_answers_are_read(tmp_path):
    assert list(read(f"kvpress:{predictions(tmp_path, needle('x ' * 200_000 + '1', '1'))}").score) == [1]


def test_a_cut_off_csv_is_refused(tmp_path):
    file = predictions(tmp_path, *(needle("1, 2\n3", "1", "2") for _ in range(3)))
    whole = file.read_text()
    for length in (len(whole) - 1, len(whole) - 20, whole.rindex("\n3") + 1, whole.rindex(",") + 1):
        file.write_text(whole[:length])
        refused(f"kvpress:{file}", file, "cut off?")
    file.write_text(whole[: whole.rindex("special")] + "\n")
    refused(f"kvpress:{file}", "line 6", "cut off?")
    file.write_text(whole[: whole.rindex("]") + 1] + "\n")
    refused(f"kvpress:{file}", file, "line 6 has not the 7 fields of its head but 1; is it cut off?")
    file.write_text('task,score,predicted_answer\na,1,"first\n')
    refused(f"kvpress:{file}", "cannot be read as CSV from line 2 on; is it cut off?")
    file.write_bytes(b"predicted_answer\n\xff\n")
    refused(f"kvpress:{file}", "cannot be read as CSV")


@pytest.mark.parametrize("ending", ["\n", "\r\n"], ids=["LF", "CRLF"])
def test_line_ends_within_an_answer_end_no_row(ending, tmp_path):
    # pandas leaves what quotes to csv.writer: of "\r" and "\n", those that end the file's lines are quoted
    texts = ["a\rb", "\r42", "a\r\nb", "a\nb\r", "a\u2028b\x85c\x0bd\x0ce", "\r"]
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator=ending)
    writer.writerows([["answer", "predicted_answer"], *(["42", text] for text in texts)])
    file = put(tmp_path / "config.yaml", "dataset: aime25\n").with_name("predictions.csv")
    file.write_bytes(table.getvalue().encode())
    assert read(f"kvpress:{file}").text == texts
    file.write_bytes(table.getvalue().encode() + f"42{ending}".encode())
    refused(f"kvpress:{file}", "has not the 2 fields of its head but 1")


def test_lists_that_were_wrapped_by_another_system_are_read(tmp_path):
    row = needle("b", "x") | {"answer": "['a'\r\n 'b']"}
    assert list(read(f"kvpress:{predictions(tmp_path, row)}").score) == [0.5]


def test_what_is_no_prediction_is_refused(tmp_path):
    file = predictions(tmp_path, {"task": "a", "answer": "b"})
    refused(f"kvpress:{file}", file, "no column predicted_answer; it has answer, task")
    refused(f"kvpress:{file}#x", "nothing after '#'")
    file.write_text("predicted_answer,task\n")
    refused(f"kvpress:{file}", "there is no answer in it")
    file.unlink()
    refused(f"kvpress:{tmp_path}", f"{tmp_path} has no predictions.csv")


def test_a_pattern_reads_several_files_and_refuses_duplicates(tmp_path):
    predictions(tmp_path / "lcc__snapkv", longbench("lcc", "a", "a"))
    predictions(tmp_path / "trec__snapkv", longbench("trec", "a", "a", classes=("a",)))
    assert scores(read(f"kvpress:{tmp_path}/*__snapkv")) == {"lcc 7": 1, "trec 7": 1}
    assert len(read(f"kvpress:{tmp_path}/*/predictions.csv")) == 2
    predictions(tmp_path / "trec__x__snapkv", longbench("trec", "a", "a", classes=("a",)))
    refused(f"kvpress:{tmp_path}/*__snapkv", "sample 7 of trec is there twice")


# scorers: LongBench, LongBench/metrics.py


@pytest.mark.parametrize(
    ("rule", "answer", "reference", "score"),
    [
        (scorers.qa_f1, "The Cat!", "a cat", 1),
        (scorers.qa_f1, "", "cat", 0),
        (scorers.qa_f1, "cat cat dog", "cat", 0.5),
        (scorers.count, "There are 5.", "5", 1),
        (scorers.count, "15", "5", 0),
        (scorers.count, "five", "5", 0),
        (scorers.retrieval, "段落3 4", "段落3", 0.5),
        (scorers.code_similarity, "", "", 1),
        (scorers.code_similarity, "", "x", 0),
        (scorers.code_similarity, "// a\n`b`\nabcd\nx", "abxx", 0.5),
        (scorers.choice, "The correct answer is A", "A", 1),
        (scorers.choice, "A", "A", 0),
    ],
)
def test_scorers(rule, answer, reference, score):
    assert rule(answer, reference) == pytest.approx(score)


def test_a_class_that_is_part_of_the_right_one_is_not_counted():
    classes = ["date", "Other date", "city"]
    assert scorers.classification("Other date", "Other date", classes) == 1
    assert scorers.classification("Other date in a city", "Other date", classes) == 0.5
    assert scorers.classification("date", "Other date", classes) == 0
    # the authors' loop skips the class after one it removes
    assert scorers.classification("Other date", "Other date", ["date", "Other", "Other date"]) == 0.5


def test_only_the_first_line_of_a_few_shot_answer_counts():
    assert scorers.longbench("triviaqa", "\nno\nParis", ["Paris"]) == 0
    assert scorers.longbench("narrativeqa", "\nno\nParis", ["Paris"]) == pytest.approx(2 / 3)


def test_rouge_is_that_of_longbench(tmp_path):
    pytest.importorskip("rouge")
    rows = [longbench("gov_report", answer, "no", "A report. It is long.") for answer in ("", "A report. It's long.")]
    file = predictions(tmp_path, *(row | {"_id": at} for at, row in enumerate(rows)))
    assert list(read(f"kvpress:{file}").score) == pytest.approx([0, 2 * 3 / (5 + 4)], abs=1e-6)
    assert scorers.rouge_l("the cat sat", "the cat ran") == pytest.approx(2 / 3, abs=1e-6)
    assert scorers.rouge_l("", "the cat") == scorers.rouge_l("a " * 2000, "a " * 2000) == 0


def test_a_missing_library_is_named_with_what_brings_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "rouge", None)
    scorers._rouge.cache_clear()
    file = predictions(tmp_path, longbench("qmsum", "a", "b"))
    refused(f"kvpress:{file}", "line 2 (qmsum)", "needs the library rouge: pip install 'kvsuite[scores]'")


# lm-eval 0.4.13: lm_eval/evaluator.py (example), loggers/evaluation_tracker.py (save_results_samples), as it wrote them
# for two small tasks of our own

STAMP = "2026-11-21T10-11-18.547132"


def sample(doc, filter="none", responses=("lol",), **metrics):
    return {
        "doc_id": doc, "doc": {"q": "a"}, "target": "x", "arguments": {"gen_args_0": {"arg_0": "a"}},
        "resps": [list(responses)], "filtered_resps": list(responses), "filter": filter, "metrics": list(metrics),
        "doc_hash": "b6", "prompt_hash": "ca", "target_hash": "2d", **metrics,
    }  # fmt: skip


def samples(folder, task, *rows, stamp=f"_{STAMP}"):
    return put(folder / f"samples_{task}{stamp}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def test_samples_of_lm_eval_are_read(tmp_path):
    samples(
        tmp_path / "model",
        "tiny_mc",
        *(sample(at, responses=(["-0.1", "False"],), acc=at % 2, acc_norm=1) for at in (0, 1)),
    )
    samples(tmp_path / "model", "longbench_2wikimqa_e", sample(5, score=0.25, qa_f1_score=0.25), stamp="")
    arm = read(f"lm-eval:{tmp_path}")
    assert scores(arm) == {"longbench_2wikimqa_e 5": 0.25, "tiny_mc 0": 0, "tiny_mc 1": 1}
    assert arm.types == {"longbench_2wikimqa_e": "qa"}
    assert arm.text == ["lol", None, None]
    assert np.isnan(arm.tokens).all()
    assert scores(read(f"lm-eval:{tmp_path}/*/samples_tiny*#acc_norm")) == {"tiny_mc 0": 1, "tiny_mc 1": 1}


def test_the_first_metric_that_is_a_number_is_taken(tmp_path):
    file = samples(tmp_path, "t", *(sample(at, f1=[1, 2], acc=at == 0, em=0.0) for at in (0, 1)))
    assert list(read(f"lm-eval:{file}").score) == [1, 0]
    refused(f"lm-eval:{file}#f1", file, "line 1", "f1 of document 0 is [1, 2], not a number", "it has f1, acc, em")
    refused(f"lm-eval:{file}#rouge", "not every sample has the metric 'rouge'; it has f1, acc, em")
    refused(f"lm-eval:{samples(tmp_path, 'u', sample(0, f1=[1]))}", "has no metric that is a number; it has f1")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "", "1", [1]])
@pytest.mark.parametrize("which", ["", "#f1"])
def test_a_metric_that_is_none_for_a_sample_is_refused_by_its_id(value, which, tmp_path):
    # and the next metric is not taken: the other arm's file, whole, would be read by f1
    file = samples(tmp_path, "t", sample(4, f1=0.5, em=1), sample(7, f1=value, em=1))
    refused(f"lm-eval:{file}{which}", file, f"line 2: f1 of document 7 is {value!r}, not a number from 0 to 1")


def test_a_line_of_samples_is_what_ends_with_a_newline(tmp_path):
    file = samples(tmp_path, "t", sample(0, acc=1, responses=("a\rb\u2028c\x85d",)), sample(1, acc=0))
    file.write_bytes(file.read_bytes().replace(b"\\u2028", "\u2028".encode()).replace(b"\n", b"\r\n"))
    arm = read(f"lm-eval:{file}")
    assert (list(arm.score), arm.text[0]) == ([1, 0], "a\rb\u2028c\x85d")


def test_several_filters_demand_a_choice(tmp_path):
    lines = [sample(at, filter, exact_match=float(filter == "flexible-extract"))
             for filter in ("strict-match", "flexible-extract") for at in (0, 1)]  # fmt: skip
    file = samples(tmp_path, "gsm8k", *lines)
    samples(tmp_path, "tiny_mc", sample(0, acc=1))
    refused(f"lm-eval:{file}", file, "strict-match, flexible-extract; choose one", "#METRIC,FILTER")
    refused(f"lm-eval:{file}#exact_match,strict", "has no filter 'strict', but strict-match, flexible-extract")
    assert list(read(f"lm-eval:{file}#exact_match,strict-match").score) == [0, 0]
    assert list(read(f"lm-eval:{tmp_path}#,flexible-extract").score) == [1, 1, 1]


@pytest.mark.parametrize("value", [37.5, -1, math.nan, "1.0", None])
def test_a_metric_beyond_0_and_1_is_refused_by_line(value, tmp_path):
    file = samples(tmp_path, "t", sample(0, acc=1, bleu=0.5), sample(1, acc=1, bleu=value))
    refused(f"lm-eval:{file}#bleu", file, f"line 2: bleu of document 1 is {value!r}", "it has acc, bleu")


def test_two_runs_of_a_task_are_refused(tmp_path):
    one = samples(tmp_path, "t", sample(0, acc=1))
    other = samples(tmp_path, "t", sample(0, acc=1), stamp="_2026-11-22T10-11-18")
    refused(f"lm-eval:{tmp_path}", "task t is there twice", one, other)
    file = samples(tmp_path / "x", "t", sample(3, acc=1), sample(3, acc=1))
    refused(f"lm-eval:{file}", file, "sample 3 of t is there twice")


def test_broken_samples_are_refused_by_line(tmp_path):
    file = samples(tmp_path, "t", sample(0, acc=1), sample(1, acc=1))
    whole = file.read_text()
    file.write_text(whole[:-20])
    refused(f"lm-eval:{file}", file, "line 2 is not JSON; is it cut off?")
    file.write_text('{"id": 1}\n')
    refused(f"lm-eval:{file}", file, "line 1 is not a sample with a doc_id")
    file.write_text("\n")
    refused(f"lm-eval:{file}", file, "is empty")
    file.write_bytes(b"\xff\n")
    refused(f"lm-eval:{file}", file, "line 1 is not JSON")
    refused(f"lm-eval:{put(tmp_path / 'results_x.json', {})}", "not named like", "samples_TASK_TIMESTAMP.jsonl")
    (tmp_path / "empty").mkdir()
    refused(f"lm-eval:{tmp_path / 'empty'}", "no samples_*.jsonl")


def test_samples_before_0_4_7_need_a_metrics_name(tmp_path):
    old = {key: value for key, value in sample(0, acc=1).items() if key not in ("filter", "metrics")}
    file = samples(tmp_path, "t", old)
    refused(f"lm-eval:{file}", file, "does not list its metrics; name one")
    assert list(read(f"lm-eval:{file}#acc").score) == [1]


# vLLM: vllm/benchmarks/serve.py (result, main_async), lib/endpoint_request_func.py (RequestFuncOutput)


def serving(**changes):
    return {
        "date": "20260801-000000", "backend": "openai", "model_id": "m", "tokenizer_id": "m", "num_prompts": 4,
        "request_rate": "inf", "burstiness": 1.0, "max_concurrency": 2, "duration": 4.0, "completed": 3, "failed": 1,
        "total_output_tokens": 9, "mean_ttft_ms": 200.0, "start_times": [10.0, 10.5, 11.0, 11.5],
        "input_lens": [100, 200, 300, 400], "output_lens": [5, 0, 1, 3], "ttfts": [0.1, 0.0, 0.2, 0.3],
        "itls": [[0.25, 0.5, 0.25], [], [], [0.5, 0.5]], "generated_texts": ["a", "", "b", "c"],
        "errors": ["", "Bad Gateway", "", ""], **changes,
    }  # fmt: skip


def test_a_result_of_vllm_bench_is_read_in_seconds(tmp_path):
    load = read(f"vllm-bench:{put(tmp_path / 'a.json', serving())}")
    assert isinstance(load, Load)
    np.testing.assert_allclose(load.ttft, [0.1, 0.2, 0.3])
    np.testing.assert_allclose(load.itl, [0.25, math.nan, 0.5])  # of 5 tokens in 4 chunks: per token
    np.testing.assert_allclose(load.e2e, [1.1, 0.2, 1.3])
    assert list(load.prompt_tokens) == [100, 300, 400]
    assert list(load.tokens) == [5, 1, 3]
    assert list(load.start) == [10, 11, 11.5]
    assert (load.failed, load.duration, load.throughput) == (1, 4, 9 / 4)
    assert load.setting == {"model_id": "m", "num_prompts": 4, "request_rate": "inf", "max_concurrency": 2}


def test_a_request_may_fail_without_a_reason_or_half_way(tmp_path):
    half = serving(errors=["", "", "", "Traceback"], completed=2, output_lens=[5, 0, 1, 0])
    load = read(f"vllm-bench:{put(tmp_path / 'a.json', half)}")
    assert (len(load), load.failed) == (2, 2)
    assert list(load.tokens) == [5, 1]


def test_old_results_of_vllm_say_no_start(tmp_path):
    old = {key: value for key, value in serving().items() if key not in ("start_times", "failed", "max_concurrency")}
    load = read(f"vllm-bench:{put(tmp_path / 'a.json', old)}")
    assert np.isnan(load.start).all()
    assert "max_concurrency" not in load.setting


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"itls": [[0.1], [], []]}, "not of one number of requests: ttfts 4, itls 3"),
        ({"start_times": [1.0]}, "start_times 1"),
        ({"ttfts": [0.1, 0.0, math.nan, 0.3]}, "request 2: ttfts has nan, not a number from 0"),
        ({"ttfts": [0.1, 0.0, "0.2", 0.3]}, "request 2: ttfts has '0.2'"),
        ({"itls": [[0.1, -1], [], [], []]}, "request 0: itls has -1"),
        ({"itls": [0.1, [], [], []]}, "request 0: itls has 0.1, not a list"),
        ({"output_lens": [5, 0, None, 3]}, "request 2: output_lens has None"),
        ({"output_lens": 0}, "no list output_lens"),
        ({"ttfts": None}, "no list ttfts; only a load test of generated answers"),
        ({"completed": 4}, "3 answered requests, but says that 4 were; is it whole?"),
        ({"errors": ["x"] * 4, "completed": 0}, "none of its 4 requests was answered"),
        ({"duration": 0}, "its duration is 0, not a number over 0"),
        ({"duration": math.inf}, "its duration is inf"),
    ],
)
def test_a_broken_result_of_vllm_is_refused_by_request(changes, said, tmp_path):
    file = put(tmp_path / "a.json", serving(**changes))
    refused(f"vllm-bench:{file}", file, said)


def test_a_result_of_vllm_needs_its_requests(tmp_path):
    # without --save-detailed vLLM deletes these, but not latencies and queue_times
    detailed = ("input_lens", "output_lens", "start_times", "ttfts", "itls", "generated_texts", "errors")
    file = put(tmp_path / "a.json", {k: v for k, v in serving(latencies=[1.0]).items() if k not in detailed})
    refused(f"vllm-bench:{file}", file, "run vllm bench serve with --save-detailed")
    refused(f"vllm-bench:{file}#0", "nothing after '#'")
    put(tmp_path / "b.json", serving())
    refused(f"vllm-bench:{tmp_path}/*.json", "2 files", file, "name one file")
    refused(f"vllm-bench:{tmp_path}", "is a folder; name one file")
    refused(f"vllm-bench:{put(file, json.dumps(serving())[:-9])}", file, "is it cut off?")
    refused(f"vllm-bench:{put(file, [1])}", "not a result of vllm bench serve")


# guidellm 0.8.1: src/guidellm/schemas/request_stats.py (computed fields), benchmark/schemas/benchmark.py; fields as it
# wrote them in a run against its own mock server


def request(at, tokens=5, **changes):
    start = 1000.0 + at
    return {
        "type_": "generative_request_stats", "request_id": f"r{at}", "output": "a", "request_start_time": start,
        "request_end_time": start + 0.75, "request_latency": 0.75, "prompt_tokens": 50, "output_tokens": tokens,
        "time_to_first_token_ms": 150.0, "time_per_output_token_ms": 150.0, "inter_token_latency_ms": 125.0, **changes,
    }  # fmt: skip


def benchmark(*successful, errored=0, incomplete=0, strategy=None, **changes):
    return {
        "type_": "generative_benchmark", "start_time": 1000.0, "end_time": 1010.0, "duration": 10.0,
        "config": {
            "strategy": strategy or {"type_": "constant", "worker_count": 10, "max_concurrency": 10240, "rate": 2.5},
            "constraints": {"max_requests": {"type_": "max_requests", "args": {"count": [8, 16]}, "current_index": 1}},
            "sample_size": None, "backend": {"kind": "openai_http", "model": "m"},
        },
        "metrics": {"request_totals": {
            "successful": len(successful), "errored": errored, "incomplete": incomplete,
            "total": len(successful) + errored + incomplete,
        }},
        "requests": {"successful": list(successful), "errored": [], "incomplete": [], "total": None}, **changes,
    }  # fmt: skip


def report(folder, *benchmarks):
    return put(folder / "benchmarks.json", {"metadata": {"version": 2}, "config": {}, "benchmarks": list(benchmarks)})


def test_a_report_of_guidellm_is_read_in_seconds(tmp_path):
    one = request(1, tokens=1, inter_token_latency_ms=None, request_latency=0.2)
    file = report(tmp_path, benchmark(request(0), one, errored=2, incomplete=1))
    load = read(f"guidellm:{file}")
    np.testing.assert_allclose(load.ttft, [0.15, 0.15])
    np.testing.assert_allclose(load.itl, [0.125, math.nan])
    np.testing.assert_allclose(load.e2e, [0.75, 0.2])
    assert list(load.prompt_tokens) == [50, 50]
    assert list(load.tokens) == [5, 1]
    assert list(load.start) == [1000, 1001]
    assert (load.failed, load.duration, load.throughput) == (2, 10, 0.6)
    assert load.setting == {"model": "m", "strategy": "constant", "rate": 2.5, "num_prompts": 16}
    assert len(read(f"guidellm:{tmp_path}#0")) == 2


def test_requests_of_warm_up_and_cool_down_do_not_count(tmp_path):
    before, over, after = request(-1), request(9.9), request(10.5)
    measured = benchmark(before, request(0), over, after)
    measured["metrics"]["request_totals"]["successful"] = 2
    load = read(f"guidellm:{report(tmp_path, measured | {'warmup_duration': 1.0, 'cooldown_duration': 0.5})}")
    assert list(load.start) == [1000, 1009.9]
    assert load.duration == pytest.approx(10.65)  # that of the requests counted: the last outlives the 10 s measured


def test_a_report_of_0_3_is_read(tmp_path):
    # v0.3.1: src/guidellm/benchmark/benchmark.py
    old = request(0, start_time=1000.0, end_time=1000.75, first_token_time=1000.15, last_token_time=1000.65)
    single = {**old, "output_tokens": 1, "inter_token_latency_ms": 0.0}
    names = ("request_start_time", "request_end_time")
    rows = [{key: value for key, value in row.items() if key not in names} for row in (old, single)]
    now = benchmark(*rows)
    then = {
        **now, "metrics": {}, "request_totals": now["metrics"]["request_totals"], "worker": {"backend_model": "m"},
        "args": {"strategy": {"type_": "concurrent", "streams": 4}, "max_number": 2, "max_duration": None},
    }  # fmt: skip
    del then["config"]
    load = read(f"guidellm:{put(tmp_path / 'a.json', {'benchmarks': [then]})}")
    np.testing.assert_allclose(load.itl, [0.125, math.nan])
    assert list(load.start) == [1000, 1000]
    assert load.setting == {"model": "m", "strategy": "concurrent", "streams": 4, "num_prompts": 2}


def test_a_number_chooses_among_benchmarks(tmp_path):
    streams = functools.partial(dict, type_="concurrent", max_concurrency=2)
    file = report(tmp_path, benchmark(request(0)), benchmark(request(0), request(1), strategy=streams(streams=2)))
    assert [len(read(f"guidellm:{file}#{at}")) for at in (0, 1)] == [1, 2]
    for which in ("", "#2", "#-1", "#x"):
        refused(f"guidellm:{file}{which}", file, "#0 constant, rate 2.5; #1 concurrent, streams 2; choose one")


def test_a_sampled_report_is_refused(tmp_path):
    sampled = benchmark(request(0), request(1))
    sampled["metrics"]["request_totals"]["successful"] = 40
    refused(f"guidellm:{report(tmp_path, sampled)}", "holds 2 of 40 answered requests; run guidellm without sampling")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"time_to_first_token_ms": math.nan}, "request r1: time_to_first_token_ms is nan, not a number from 0"),
        ({"request_latency": -1}, "request r1: request_latency is -1"),
        ({"output_tokens": "5"}, "request r1: output_tokens is '5'"),
        ({"prompt_tokens": True}, "request r1: prompt_tokens is True"),
    ],
)
def test_a_broken_request_of_guidellm_is_refused(changes, said, tmp_path):
    file = report(tmp_path, benchmark(request(0), request(1, **changes)))
    refused(f"guidellm:{file}", file, said)


def test_a_broken_report_of_guidellm_is_refused(tmp_path):
    file = report(tmp_path, benchmark(request(0)))
    whole = file.read_text()
    refused(f"guidellm:{put(file, whole[:-9])}", file, "is it cut off?")
    refused(f"guidellm:{put(file, {'benchmarks': []})}", file, "not a report of guidellm")
    refused(f"guidellm:{put(file, [])}", file, "not a report of guidellm")
    refused(f"guidellm:{put(file, whole.replace('request_latency', 'x'))}", file, "request_latency")
    refused(f"guidellm:{report(tmp_path, benchmark(duration=0.0))}", "none of its 0 requests was answered")
    refused(f"guidellm:{report(tmp_path, benchmark(request(0), duration=0.0))}", "its duration is 0.0")
    refused(
        f"guidellm:{report(tmp_path, benchmark(request(0), requests=None))}", file, "not a report of guidellm as known"
    )
    report(tmp_path / "b", benchmark(request(0)))
    report(tmp_path / "c", benchmark(request(0)))
    refused(f"guidellm:{tmp_path}/?", "2 files", "name one file")
