"""pytest -m samples: every method answers the same samples; the summary compares, a test fails on broken invariants."""

import pytest

pytestmark = pytest.mark.samples


def test_answers(kv_session, kv_task, kv_method, record_property):
    answers = kv_session.answers(kv_task)
    mine, full = answers[kv_method.name], answers["full"]
    record_property("kvsuite", kv_session.fact(kv_task, kv_method.name))

    assert [a.response.error for a in mine if a.response.finish == "error"] == []
    assert [a.sample.id for a in mine] == [a.sample.id for a in full], "every method answers every sample once"
    for a, b in zip(mine, full, strict=True):
        assert 1 <= len(a.response.tokens) <= a.sample.max_new_tokens
        assert (a.response.prompt_tokens, a.response.context_tokens) == (
            b.response.prompt_tokens,
            b.response.context_tokens,
        ), "all methods read the same prompt"
        assert a.response.path.startswith("LayerCache/")
        assert 0 < a.response.kept <= b.response.kept
