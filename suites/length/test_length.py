"""pytest -m length: every method answers the same open prompts at its own length; a test fails on broken invariants."""

import pytest

from kvsuite.analysis.speed import OURS

pytestmark = pytest.mark.length


def test_answers(kv_session, kv_method, kv_task):
    answers = kv_session.answers(kv_task)
    mine = {a.sample: a for a in answers if (a.method, a.repeat) == (kv_method.name, 0)}
    full = {a.sample: a for a in answers if (a.method, a.repeat) == ("full", 0)}
    assert mine.keys() == full.keys(), "every method answers every prompt once"
    assert {a.error for a in mine.values()} == {""}
    for sample, a in mine.items():
        assert 1 <= len(a.tokens) <= a.cap == full[sample].cap
        assert (a.finish == "length") == (len(a.tokens) == a.cap and a.finish != "stop")
        assert a.prompt_tokens == full[sample].prompt_tokens
        assert a.cache.startswith(OURS)


def test_the_baseline_has_a_control(kv_session, kv_task):
    if kv_session.options.temperature == 0:
        pytest.skip("greedy: the control is jitter")
    answers = kv_session.answers(kv_task)
    once, again = ({a.sample: a for a in answers if (a.method, a.repeat) == ("full", r)} for r in (0, 1))
    assert once.keys() == again.keys()
    assert any(once[s].tokens != again[s].tokens for s in once), "other noise gives other answers"
