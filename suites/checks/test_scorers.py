"""The scorers of published benchmarks, by answers whose scores follow from the published rules."""

import pytest

from kvsuite import scorers
from kvsuite.errors import UsageError
from kvsuite.final_numbers import last_number, whole_number

V2 = [
    ("The correct answer is (A)", 1),
    ("The correct answer is (A).", 1),
    ("**The correct answer is (A)**", 1),
    ("The correct answer is **(A)**.", 1),
    ("The correct answer is A", 1),
    ("The correct answer is *A*", 1),
    ("I think so. The correct answer is (A) since B is wrong.", 1),
    ("The correct answer is Apples", 1),
    ("The correct answer is B. No: The correct answer is (A)", 1),
    ("\n The correct answer is (A)\n", 1),
    ("The correct answer is (A). The correct answer is (B)", 1),
    ("The correct answer is (B). The correct answer is (A)", 0),
    ("The correct answer is A. No: The correct answer is (B)", 0),
    ("the correct answer is (A)", 0),
    ("(A)", 0),
    ("A", 0),
    ("", 0),
    ("The correct answer is (E) or The correct answer is (a)", 0),
    ("The correct answer is: (A)", 0),
    ("The correct answer is  (A)", 0),
]
GSM8K = [
    ("So 1,234 dollars.", 1),
    ("#### 1234", 1),
    ("The answer is $1,234.", 1),
    ("$1234", 1),
    ("1234.", 1),
    ("1 + 2 = 1234", 1),
    ("It is 1,2,3,4", 1),
    ("first 1234\nQ: What is 5 + 5?\nA: 10", 1),
    ("1234</s> 5", 1),
    ("1234<|im_end|>\n7", 1),
    ("12\n1234", 1),
    ("1234 is what 30 and 40 make", 0),
    ("-1234", 0),
    ("1234.0", 0),
    ("1234%", 1),
    ("12 34", 0),
    ("", 0),
    ("twelve", 0),
    ("1234 of them...", 0),
    ("#### 1235", 0),
    ("1234 apples at 5.", 0),
]
AIME = [
    (r"\boxed{70}", 1),
    ("70", 1),
    ("$70$", 1),
    ("It is $70$.", 1),
    (r"so \boxed{7}, no: \boxed{70}.", 1),
    (r"\boxed 70$ x", 1),
    (r"\boxed{ 70 }", 1),
    (r"\boxed{x=70}", 1),
    (r"\boxed{70^\circ}", 1),
    (r"\boxed{70\%}", 1),
    (r"\boxed{70\text{ cm}}", 1),
    (r"\boxed{\left70\right}", 1),
    (r"\boxed{70\!}", 1),
    ("$x$ and $70$", 0),
    ("It is 70", 0),
    (r"\boxed{070}", 0),
    (r"\boxed{70}, then Question: \boxed{5}", 1),
    (r"\boxed{70.0}", 0),
    (r"\boxed{xyz=70}", 0),
    (r"\boxed{70", 0),
    ("", 0),
    (r"\boxed{70}, no: \boxed{71}", 0),
    (r"\fbox{70}", 0),
]


@pytest.mark.parametrize(("answer", "score"), V2)
def test_longbench_v2_takes_the_first_letter_in_brackets(answer, score):
    assert scorers.first_choice(answer, "A") == score


@pytest.mark.parametrize(("answer", "score"), GSM8K)
def test_gsm8k_takes_the_last_number(answer, score):
    assert last_number(answer, "He has 5, so 5 + 1229 = <<5+1229=1234>>1,234\n#### 1,234") == score


@pytest.mark.parametrize(("answer", "score"), AIME)
def test_aime_takes_the_last_box(answer, score):
    assert whole_number(answer, "70") == score


MRCR = [
    ("zzpoem", 1),
    ("poem", 0),
    ("", 0),
    (" zzpoem", 0),
    ("Zzpoem", 0),
    ("zz", 0),
    ("zzpoe", 6 / 7),
    ("zzpo", 4 / 6),
    ("zzp", 2 / 5),
    ("zzpoems", 8 / 9),
    ("zzzzpoem", 8 / 10),
    ("zz poem", 8 / 9),
    ("zzmeop", 2 / 8),
    ("zzpoempoem", 8 / 12),
    ("zzxxxx", 0),
    ("zzp\noem", 8 / 9),
    ("zzPOEM", 0),
    ("zzem", 4 / 6),
    ("xzzpoem", 0),
    ("zpoem", 0),
    ("zzo", 2 / 5),
]


@pytest.mark.parametrize(("answer", "score"), MRCR)
def test_mrcr_is_a_ratio_behind_the_prefix(answer, score):
    assert scorers.after_prefix(answer, "zzpoem", "zz") == pytest.approx(score)


OPTIONS = ["Tom Sawyer", "Huck", "Jim", "Becky"]
SCBENCH = [
    ("kv", "it is v1.", "v1", 1),
    ("kv", "V1", "v1", 0),
    ("prefix_suffix", "a v1 b", "v1", 1),
    ("prefix_suffix", "", "v1", 0),
    ("vt", "A, B and C", ["A", "B", "C"], 1),
    ("vt", "a only", ["A", "X", "Z"], 0.33),
    ("vt", "none", ["XX"], 0),
    ("qa_eng", "It was TOM.", "tom", 1),
    ("qa_eng", "Huck", "tom", 0),
    ("mf", "5", 5, 1),
    ("mf", "It is 5.9", 5, 1),
    ("mf", "1 or 5", 5, 0),
    ("mf", "none", 5, 0),
    ("mf", "2.50", 2.5, 1),
    ("choice_eng", "B. Huck", "Huck", 1),
    ("choice_eng", "B", "Tom Sawyer", 0),
    ("choice_eng", "Huck", "Huck", 1),
    ("choice_eng", "the answer is: B", "Huck", 1),
    ("choice_eng", "the answer is Huck Finn", "Huck", 1),
    ("choice_eng", "the answer is", "Huck", 0),
    ("choice_eng", "the answer is no B", "Huck", 0),
    ("choice_eng", "I say B, not C", "Huck", 1),
    ("choice_eng", "", "Huck", 0),
    ("choice_eng", "I say C, not B", "Huck", 0),
    ("choice_eng", "nobody", "Huck", 0),
]


@pytest.mark.parametrize(("task", "answer", "reference", "score"), SCBENCH)
def test_scbench_scores_by_task(task, answer, reference, score):
    assert scorers.scbench(task, answer, reference, OPTIONS) == score


def test_scbench_refuses_what_its_rule_would_read_letter_by_letter():
    for task, reference in (("vt", "ABC"), ("mf", "5"), ("choice_eng", "Sid"), ("summary", "a")):
        with pytest.raises(UsageError, match=f"no rule here to score {task} of SCBench"):
            scorers.scbench(task, "5", reference, OPTIONS)
