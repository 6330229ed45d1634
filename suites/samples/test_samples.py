"""pytest -m samples: every method answers the same samples; the report compares, a test fails on broken invariants."""

import pytest

from kvsuite.analysis.speed import OURS

pytestmark = pytest.mark.samples


def test_answers(kv_session, kv_method, kv_task):
    answers = kv_session.answers(kv_task)
    mine = {a.sample: a for a in answers if a.method == kv_method.name}
    full = {a.sample: a for a in answers if a.method == "full"}
    assert mine.keys() == full.keys(), "every method answers every sample once"
    assert {a.error for a in mine.values()} == {""}
    for sample, a in mine.items():
        b = full[sample]
        assert 1 <= len(a.tokens) <= a.cap == b.cap
        assert (a.prompt_tokens, a.context_tokens) == (b.prompt_tokens, b.context_tokens), "all read the same prompt"
        assert a.cache.startswith(OURS)
        assert 0 < a.kept <= b.kept
