"""Scores of published benchmarks, each from 0 to 1 as the benchmark's own code gives it; pure functions.

LongBench: github.com/THUDM/LongBench, LongBench/metrics.py and eval.py (Bai et al. 2024). RULER:
github.com/NVIDIA/RULER, scripts/eval/synthetic/constants.py (Hsieh et al. 2024), as kvpress applies it. Others say
where they are from. What follows is written anew; oddities that change a score are kept and named.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from kvsuite.errors import UsageError

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)
CONTROL = re.compile(r"[\x00-\x1f]")
FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
"""Datasets of LongBench whose answers count up to the first line's end."""


def qa_f1(answer: str, reference: str) -> float:
    """F1 of the words both share, without case, punctuation and articles (LongBench: qa_f1_score)."""
    said, wanted = _words(answer), _words(reference)
    same = (Counter(said) & Counter(wanted)).total()
    return 2 * same / (len(said) + len(wanted)) if same else 0.0


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L's F as the library ``rouge`` computes it, which is not what ``rouge-score`` gives (LongBench:
    rouge_score). As there, an answer that the library fails on scores 0: an empty one, or one of about a thousand words
    without a full stop. Of an answer 8,192 characters count: the library's time grows with their square."""
    library = _rouge()
    try:
        scores = library.get_scores([answer[:8192]], [reference])
    except (ValueError, RecursionError):
        return 0.0
    return float(scores[0]["rouge-l"]["f"])


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """1 over the number of classes an answer names, if the right one is among them (LongBench: classification_score). A
    class whose name is part of the right one's is not counted, except, as in the authors' loop, right after another
    such."""
    named = [name for name in classes if name in answer]
    at = 0
    while at < len(named):
        if named[at] in reference and named[at] != reference:
            del named[at]
        at += 1
    return 1 / len(named) if reference in named else 0.0


def count(answer: str, reference: str) -> float:
    """The part of an answer's numbers that are the right one (LongBench: count_score)."""
    numbers = re.findall(r"\d+", answer)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(answer: str, reference: str) -> float:
    """The part of an answer's numbers that are the right paragraph's (LongBench: retrieval_score and its Chinese
    twin)."""
    paragraph = re.search(r"(?:Paragraph |段落)(\d+)", reference)
    if paragraph is None:
        raise UsageError(f"the reference {reference!r} names no paragraph")
    return count(answer, paragraph[1])


def code_similarity(answer: str, reference: str) -> float:
    """How alike the first line of code is, in whole percents (LongBench: code_sim_score). Lines with a backtick, ``#``
    or ``//`` are no code. The authors' fuzzywuzzy uses difflib; with python-Levenshtein beside it, it gives other
    numbers. Of a line 4,096 characters count: difflib can take seconds for one of more."""
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line[:4096], reference).ratio()) / 100


def longbench(dataset: str, answer: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """An answer's score on a dataset of LongBench: that of the reference it suits best (eval.py: scorer). Raises
    UsageError for a dataset it does not know, those among them whose Chinese text must first be cut into words."""
    if dataset not in LONGBENCH_RULES:
        raise UsageError(f"there is no rule here to score {dataset}; there is one for {', '.join(LONGBENCH_RULES)}")
    if dataset in FIRST_LINE:
        answer = answer.lstrip("\n").split("\n")[0]
    rule = LONGBENCH_RULES[dataset]
    if rule is classification:
        if not classes:
            raise UsageError(f"{dataset} cannot be scored without the names of its classes")
        rule = functools.partial(classification, classes=classes)
    return max((rule(answer, reference) for reference in references), default=0.0)


def string_match_all(answer: str, references: Sequence[str]) -> float:
    """The part of the references that an answer contains, in either case (RULER: string_match_all)."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def string_match_part(answer: str, references: Sequence[str]) -> float:
    """1 if an answer contains any of the references, in either case (RULER: string_match_part)."""
    return float(any(reference.lower() in answer.lower() for reference in references))


def ruler(task: str, answer: str, references: Sequence[str]) -> float:
    """An answer's score on a task of RULER: any reference for ``qa`` and ``qa_…``, all for the others. Control
    characters do not count; what they separate is joined, as in kvpress."""
    rule = string_match_part if task.split("_")[0] == "qa" else string_match_all
    return rule(CONTROL.sub("", answer.strip()).strip(), references)


def choice(answer: str, reference: str) -> float:
    """1 if an answer says "The correct answer is (A)", with the right letter, brackets or not (LongBench v2:
    github.com/THUDM/LongBench, pred.py, as kvpress applies it)."""
    answer = answer.replace("*", "")
    return float(any(f"The correct answer is {said}" in answer for said in (f"({reference})", reference)))


def first_choice(answer: str, reference: str) -> float:
    """1 if the first "The correct answer is (A)" of an answer names the right letter; without brackets where there is
    none with (LongBench v2: github.com/THUDM/LongBench, pred.py: extract_answer)."""
    answer = answer.strip().replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", answer) or re.search(
        r"The correct answer is ([A-D])", answer
    )
    return float(found is not None and found[1] == reference)


def after_prefix(answer: str, reference: str, prefix: str) -> float:
    """difflib's ratio of answer and reference, both without the prefix with which an answer must begin (MRCR: grade in
    the dataset's README.md)."""
    if not answer.startswith(prefix):
        return 0.0
    return difflib.SequenceMatcher(None, answer.removeprefix(prefix), reference.removeprefix(prefix)).ratio()


def scbench(task: str, answer: str, reference: Any, options: Sequence[str] = ()) -> float:
    """An answer's score on a task of SCBench (github.com/microsoft/MInference, scbench/compute_scores.py, of which
    tasks with other rules are left out). Raises UsageError for a reference that its rule does not take."""
    match task:
        case "kv" | "prefix_suffix" if isinstance(reference, str):
            return float(reference in answer)
        case "vt" if isinstance(reference, list) and reference:
            return round(string_match_all(answer, reference), 2)
        case "qa_eng" if isinstance(reference, str):
            return float(reference.upper() in answer.upper())
        case "mf" if isinstance(reference, (int, float)):
            number = re.search(r"\d+\.\d+|\d+", answer)
            said = math.inf if number is None else float(number[0])
            return float(math.isfinite(said) and type(reference)(said) == reference)
        case "choice_eng" if reference in options:
            return _book_choice(answer.strip(), (reference, "ABCD"[list(options).index(reference)]))
    raise UsageError(f"there is no rule here to score {task} of SCBench against {reference!r}"[:200])


def first_boxed(answer: str, reference: str) -> float:
    r"""1 if the first ``\boxed{…}`` of an answer holds the reference (kvpress: math500/calculate_metrics.py)."""
    _, box, rest = answer.partition("boxed{")
    return float(bool(box) and _to_brace(rest) == reference)


def last_boxed(answer: str, reference: str) -> float:
    r"""1 if the last ``\boxed{…}`` of an answer holds the reference (kvpress: aime25/calculate_metrics.py). As there,
    an answer without a box is read like the inside of one."""
    return float(_to_brace(answer.rpartition("boxed{")[2]) == reference)


LONGBENCH_RULES: dict[str, Any] = {
    name: rule
    for rule, names in {
        qa_f1: "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique triviaqa",
        rouge_l: "gov_report qmsum multi_news samsum",
        classification: "trec lsht",
        count: "passage_count",
        retrieval: "passage_retrieval_en passage_retrieval_zh",
        code_similarity: "lcc repobench-p",
    }.items()
    for name in names.split()
}
"""Dataset of LongBench → its rule. Left out are multifieldqa_zh, dureader and vcsum."""


BY_NAME: dict[str, tuple[Any, str]] = {
    "qa-f1": (qa_f1, "qa"),
    "rouge-l": (rouge_l, "summarization"),
    "contains": (lambda answer, reference: string_match_part(answer, [reference]), "qa"),
    "choice": (choice, "qa"),
    "first-boxed": (first_boxed, "qa"),
    "last-boxed": (last_boxed, "qa"),
    "count": (count, "synthetic"),
    "retrieval": (retrieval, "synthetic"),
    "code-similarity": (code_similarity, "code"),
}
"""Scorers of an answer and one reference, and the type of task they are for."""


def _book_choice(answer: str, labels: Sequence[str]) -> float:
    """SCBench: get_score_one_longbook_choice_eng, with the option's text and letter as labels."""
    if not answer:
        return 0.0
    if answer[0] in "ABCD":
        return float(answer[0] in labels)
    if answer in labels:
        return 1.0
    answer = re.sub(" {2,}", " ", re.sub("[\n\"'.,?!{}]", " ", answer))
    for prefix in ("answer is:", "answer:", "answer is", "option is"):
        _, found, after = answer.partition(prefix)
        if found:  # one character, a space, is passed over unseen
            return float(any(after[1:].startswith(label) for label in labels)) if after else 0.0
    word = next((word for word in answer.split() if word in "ABCD"), "")
    return float(word in labels)


def _to_brace(text: str) -> str:
    """What stands before the next ``boxed{`` and before the next ``}``."""
    return text.partition("boxed{")[0].partition("}")[0]


def _words(text: str) -> list[str]:
    return ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split()


@functools.cache
def _rouge() -> Any:
    return _library("rouge").Rouge(metrics=["rouge-l"])


def _library(name: str) -> ModuleType:
    """An optional library. Raises UsageError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"this score needs the library {name}: pip install 'kvsuite[scores]'") from error
