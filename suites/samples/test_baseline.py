"""pytest -m samples: `full` answers what transformers' own cache answers, or differs first at a close call."""

import pytest
import torch

pytestmark = pytest.mark.samples

CLOSE = 1e-3
"""Gap between the two highest logits in float32 below which rounding may decide."""


def test_full_answers_as_transformers(kv_session, kv_task, record_property):
    answers = kv_session.answers(kv_task)["full"]
    exact = kv_session.dtype == "float32"
    if not exact:
        answers = answers[:4]  # counted, not promised: bfloat16 decides many calls by rounding
    engine, differing = kv_session.engine, []
    engine.model.set_attn_implementation("sdpa")
    try:
        for answer in answers:
            mine, theirs = answer.response, greedy(engine, kv_session.request(answer.sample))
            if mine.tokens != theirs:
                pairs = enumerate(zip(mine.tokens, theirs, strict=False))
                first = next(i for i, (a, b) in pairs if a != b)
                differing.append((answer.sample.id, first, mine.margins[first]))
    finally:
        engine.model.set_attn_implementation("kvsuite")
    same = len(answers) - len(differing)
    fact = {"kind": "transformers", "task": kv_task, "same": same, "n": len(answers), "dtype": kv_session.dtype}
    record_property("kvsuite", fact)
    if exact:
        assert [d for d in differing if d[2] >= CLOSE] == []
        assert len(differing) <= max(1, len(answers) // 1000)


@torch.inference_mode()
def greedy(engine, request):
    """The tokens transformers generates with its DynamicCache and SDPA, one prompt at a time."""
    ids, _ = engine.encode(request, "prompt")
    prompt = torch.tensor([ids], device=engine.model.device)
    out = engine.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=request.max_new_tokens, do_sample=False,
        eos_token_id=sorted(engine.stop), pad_token_id=0,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()
