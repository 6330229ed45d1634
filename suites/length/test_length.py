"""pytest -m length: every arm answers the same open prompts at its own length; a test fails on broken invariants."""

import pytest

from kvsuite.analysis.speed import OURS
from kvsuite.records import REFERENCE, is_reference

pytestmark = pytest.mark.length


def by_sample(answers, name, repeat=0):
    return {a.sample: a for a in answers if (a.method, a.repeat) == (name, repeat)}


def repeats(answers, name):
    return {a.repeat for a in answers if a.method == name}


def test_answers(kv_session, kv_arm, kv_task):
    answers = kv_session.answers(kv_task)
    base = by_sample(answers, kv_session.options.arms[0])
    assert set(range(kv_session.options.repeats)) <= repeats(answers, kv_arm)
    for repeat in repeats(answers, kv_arm):
        mine = by_sample(answers, kv_arm, repeat)
        assert mine.keys() == base.keys(), "every arm answers every prompt once, or as often as is asked"
        assert {a.error for a in mine.values()} == {""}
        for sample, a in mine.items():
            assert a.cap == base[sample].cap
            assert a.length <= a.cap or getattr(a, "counted", "usage") != "usage"  # others count by a few tokens wrong
            assert a.prompt_tokens == base[sample].prompt_tokens


def test_our_caches(kv_local, kv_method, kv_task):
    for a in by_sample(kv_local.answers(kv_task), kv_method.name).values():
        assert len(a.tokens) >= 1
        assert (a.finish == "length") == (len(a.tokens) == a.cap and a.finish != "stop")
        assert a.cache.startswith(OURS)


def test_the_baseline_has_a_control(kv_local, kv_task):
    if kv_local.options.temperature == 0:
        pytest.skip("greedy: the control is jitter")
    answers = kv_local.answers(kv_task)
    once = by_sample(answers, "full")
    assert repeats(answers, "full") == set(range(kv_local.options.repeats + 1))
    for repeat in repeats(answers, "full") - {0}:
        again = by_sample(answers, "full", repeat)
        assert once.keys() == again.keys()
        assert any(once[s].tokens != again[s].tokens for s in once), "other noise gives other answers"


def test_other_temperatures(kv_local, kv_task):
    if not kv_local.options.references:
        pytest.skip("none was asked for (--kv-reference-temperatures)")
    answers = [a for a in kv_local.answers(kv_task) if is_reference(a.method)]
    assert {a.method for a in answers} == {f"{REFERENCE}{t:g}" for t in kv_local.options.references}
    assert {a.error for a in answers} == {""}
