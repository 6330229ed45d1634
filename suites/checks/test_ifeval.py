"""Rules give what IFEval's own code gives (google-research/instruction_following_eval, as lm-evaluation-harness 0.4.13
ships it; the answers to these cases were computed with it)."""

import pytest

from kvsuite import ifeval

CASES = [
    ("change_case:english_capital", None, "THE UNION IS STRONG, AND 3 TIMES SO.", True),
    ("change_case:english_capital", None, "THE UNION IS Strong.", False),
    ("change_case:english_capital", None, "1862", False),
    ("change_case:english_lowercase", None, "the state of the union is good & strong.", True),
    ("change_case:english_lowercase", None, "The state of the union is good.", False),
    ("punctuation:no_comma", None, "No comma; none at all", True),
    ("punctuation:no_comma", None, "1,000", False),
    ("punctuation:no_comma", None, " \n", False),
    ("keywords:existence", "banana", "Two BANANAS.", True),
    ("keywords:existence", "banana", "bana na", False),
    ("detectable_format:title", None, "<<The Union>>\nIt is.", True),
    ("detectable_format:title", None, "<< >> and <The Union>", False),
    ("detectable_format:title", None, "<<The\nUnion>>", False),
    ("detectable_format:number_bullet_lists", 3, "* one\n* two\n  - three", True),
    ("detectable_format:number_bullet_lists", 1, "**bold** is no bullet\n* one", True),
    ("detectable_format:number_bullet_lists", 2, "* one\n* two\n---", False),
    ("startend:end_checker", "That is all.", 'So it is. "that is ALL."\n', True),
    ("startend:end_checker", "That is all.", "That is all. Really.", False),
    ("startend:end_checker", "That is all.", "That is all", False),
    ("startend:end_checker", " I am done. ", "I AM DONE.", True),
    ("keywords:existence", "violin", "The violinist", True),
]


@pytest.mark.parametrize(("rule", "value", "answer", "kept"), CASES)
def test_a_rule_is_kept_as_in_ifeval(rule, value, answer, kept):
    assert ifeval.followed(rule, value, answer) is kept


JSON = [
    ('{"a": 1}', {"a": 1}),
    ('```json\n{"a": 1}\n```', {"a": 1}),
    ('```\n["a"]```', ["a"]),
    ('Sure: {"a": 1}', None),
    ('{"a": 1', None),
    ("```python\n{}\n```", None),
    ("", None),
]


@pytest.mark.parametrize(("answer", "value"), JSON)
def test_json_is_read_as_in_ifeval(answer, value):
    assert ifeval.parsed(answer) == value
