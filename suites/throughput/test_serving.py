"""pytest -m throughput: servers on the same requests, in turn; each answer is one record. Speed, and whether
answers are answers, is the report's matter (`--kv-strict`): a test fails on requests that failed."""

import pytest

pytestmark = pytest.mark.throughput


def test_every_request_is_answered(kv_serving, kv_arm, kv_cell):
    mine, base = (kv_serving.timed(arm, kv_cell.name) for arm in (kv_arm, kv_serving.options.arms[0]))
    assert {a.error for a in mine} == {""}
    prompts = [sorted((a.block, a.sample, a.cap, a.prompt_tokens) for a in answers) for answers in (mine, base)]
    assert prompts[0] == prompts[1], "every arm is asked the same"
    assert len({a.leg for a in mine}) == 2 * kv_serving.options.rounds
