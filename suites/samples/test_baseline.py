"""pytest -m samples: what `full` answers is transformers' answer, and belongs to its prompt alone."""

import pytest
import torch
from transformers import DynamicCache

from kvsuite.methods import parse

pytestmark = pytest.mark.samples

CLOSE = 1e-3
"""Gap between the two highest logits in float32 below which rounding may decide."""


@pytest.fixture
def shortest(kv_session, kv_task):
    """The 8 shortest answered samples of `full`; all of them in float32, where their equality is promised."""
    answers = sorted(kv_session.answers(kv_task)["full"], key=lambda a: a.response.prompt_tokens)
    return answers if kv_session.dtype == "float32" else answers[:8]


def first_difference(mine, theirs):
    """Where two answers part and the gap between the two best tokens there, or None."""
    for at, (a, b) in enumerate(zip(mine.tokens, theirs, strict=False)):
        if a != b:
            return at, mine.margins[at]
    return None if len(mine.tokens) == len(theirs) else (min(len(mine.tokens), len(theirs)), float("inf"))


def compare(kv_session, record_property, task, what, answers, others):
    """Record on how many samples the tokens agree; in float32 they may part at close calls only, 1 in 1,000 at most."""
    found = [first_difference(a.response, others[a.sample.id]) for a in answers]
    apart = [d for d in found if d is not None]
    fact = {"kind": "agreement", "what": what, "task": task, "n": len(found), "same": len(found) - len(apart)}
    record_property("kvsuite", fact | {"dtype": kv_session.dtype})
    if kv_session.dtype == "float32":  # bfloat16 decides many calls by rounding: counted, not promised
        assert [d for d in apart if d[1] >= CLOSE] == []
        assert len(apart) <= max(1, len(found) // 1000)


def test_full_answers_as_transformers(kv_session, kv_task, shortest, record_property):
    engine = kv_session.engine
    engine.model.set_attn_implementation("sdpa")
    try:
        others = {a.sample.id: greedy(engine, kv_session.request(a.sample)) for a in shortest}
    finally:
        engine.model.set_attn_implementation("kvsuite")
    compare(kv_session, record_property, kv_task, "against transformers' own cache", shortest, others)


@torch.inference_mode()
def test_full_stores_what_transformers_stores(kv_session, kv_task, shortest):
    engine, request = kv_session.engine, kv_session.request(shortest[0].sample)
    ids, _ = engine.encode(request, "prompt")
    observed = engine.prefill(request, ids, [], frozenset()).context
    caches = [parse("full").cache(layer, 1, len(ids)) for layer in engine.layers]
    parse("full").compress(0, observed, caches)
    theirs = DynamicCache()
    engine.model.set_attn_implementation("sdpa")
    try:
        engine.model(
            input_ids=torch.tensor([ids], device=engine.model.device), past_key_values=theirs, logits_to_keep=1
        )
    finally:
        engine.model.set_attn_implementation("kvsuite")
    for cache, layer in zip(caches, theirs.layers, strict=True):
        for head, held in enumerate(cache.materialise(0)):
            assert torch.equal(held.k, layer.keys[0, head])
            assert torch.equal(held.v, layer.values[0, head])


def test_an_answer_is_bitwise_independent_of_mates_row_and_order(kv_session, kv_task, shortest):
    o = kv_session.options
    requests = [kv_session.request(a.sample) for a in shortest[:8]]
    again = {
        r.id: r for r in kv_session.engine.generate(requests[::-1], [parse("full")], width=o.batch, compress=o.compress)
    }
    for answer in shortest[:8]:
        mine, other = answer.response, again[answer.sample.id]
        assert (mine.tokens, mine.margins) == (other.tokens, other.margins)


def test_widths_agree(kv_session, kv_task, shortest, record_property):
    o, other = kv_session.options, 8 if kv_session.options.batch == 1 else 1
    requests = [kv_session.request(a.sample) for a in shortest]
    found = kv_session.engine.generate(requests, [parse("full")], width=other, compress=o.compress)
    others = {r.id: r.tokens for r in found}
    compare(kv_session, record_property, kv_task, f"at width {o.batch} against {other}", shortest, others)


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
