"""pytest -m samples: every arm answers the same samples; the report compares, a test fails on broken invariants."""

import pytest

from kvsuite.analysis.speed import OURS

pytestmark = pytest.mark.samples


def by_sample(answers, name):
    return {a.sample: a for a in answers if a.method == name}


def test_answers(kv_session, kv_arm, kv_task):
    answers = kv_session.answers(kv_task)
    mine, base = by_sample(answers, kv_arm), by_sample(answers, kv_session.options.arms[0])
    assert mine.keys() == base.keys(), "every arm answers every sample once"
    assert {a.error for a in mine.values()} == {""}
    for sample, a in mine.items():
        b = base[sample]
        assert a.cap == b.cap
        assert a.length <= a.cap or getattr(a, "counted", "usage") != "usage"
        assert a.prompt_tokens == b.prompt_tokens, "all read the same prompt"


def test_our_caches(kv_local, kv_method, kv_task):
    answers = kv_local.answers(kv_task)
    mine, full = by_sample(answers, kv_method.name), by_sample(answers, "full")
    for sample, a in mine.items():
        assert len(a.tokens) >= 1
        assert a.context_tokens == full[sample].context_tokens
        assert a.cache.startswith(OURS)
        assert 0 < a.kept <= full[sample].kept
