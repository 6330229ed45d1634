"""pytest -m length: every arm answers the same open prompts at its own length; a test fails on broken invariants."""

import pytest

from kvsuite.analysis.speed import OURS

pytestmark = pytest.mark.length


def by_sample(answers, name, repeat=0):
    return {a.sample: a for a in answers if (a.method, a.repeat) == (name, repeat)}


def test_answers(kv_session, kv_arm, kv_task):
    answers = kv_session.answers(kv_task)
    mine, base = by_sample(answers, kv_arm), by_sample(answers, kv_session.options.arms[0])
    assert mine.keys() == base.keys(), "every arm answers every prompt once"
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
    once, again = (by_sample(answers, "full", repeat) for repeat in (0, 1))
    assert once.keys() == again.keys()
    assert any(once[s].tokens != again[s].tokens for s in once), "other noise gives other answers"
