"""pytest -m samples: an uncompressed cache answers as transformers' own does, and an answer belongs to its prompt.

`full` stores K and V in the checkpoint's dtype. Where the model computes in another, the arm that is exact against
transformers' cache is ``full:dtype=…``, and that one is compared."""

import pytest

from kvsuite import tasks
from kvsuite.records import Agreement

torch = pytest.importorskip("torch")  # servers are compared without it
transformers = pytest.importorskip("transformers")
adapter = pytest.importorskip("kvsuite.cache.adapter")
padded_width = pytest.importorskip("kvsuite.engines.decoder").padded_width
step_rows = pytest.importorskip("kvsuite.engines.pool").step_rows
pytestmark = pytest.mark.samples

FEW = 4
"""Prompts that are answered again: what is compared is the same for all."""
CLOSE = 1e-3
"""Gap between the two highest logits in float32 below which rounding may decide."""


@pytest.fixture(scope="module")
def made():
    """The exact arm's answers, by task: made once for all tests of this file."""
    return {}


@pytest.fixture
def shortest(kv_local, kv_task, made):
    """The exact arm's answers to the `FEW` shortest prompts, by request; in float32 to all, where `full` itself is
    exact, since those are there."""
    o, method, task = kv_local.options, kv_local.exact, tasks.task(kv_task)
    answers = {a.sample: a for a in kv_local.answers(kv_task) if a.method == "full"}
    chosen = sorted(kv_local.samples(task), key=lambda s: answers[s.id].prompt_tokens)
    if method.name == "full":
        few = chosen if kv_local.engine.model.dtype == torch.float32 else chosen[:FEW]
        return [(kv_local.request(s), answers[s.id]) for s in few]
    requests = [kv_local.request(s) for s in chosen[:FEW]]
    if kv_task not in made:
        found = kv_local.engine.generate(requests, [method], width=o.width, compress=o.compress)
        made[kv_task] = {r.id: r for r in found}
    return [(request, made[kv_task][request.id]) for request in requests]


def not_yet(kv_local, task, other):
    kv_local.skip_recorded(Agreement(kv_local.exact.name, other=other, task=task).job)


def first_difference(mine, tokens):
    """Where two answers part and the gap between the two best tokens there, or None."""
    for at, (a, b) in enumerate(zip(mine.tokens, tokens, strict=False)):
        if a != b:
            return at, mine.margins[at]
    return None if len(mine.tokens) == len(tokens) else (min(len(mine.tokens), len(tokens)), float("inf"))


def compare(kv_local, task, other, answers, tokens):
    """Record on how many samples the tokens agree; in float32 they may part at close calls only, 1 in 1,000 at most."""
    found = [first_difference(answer, tokens[request.id]) for request, answer in answers]
    apart = [d for d in found if d is not None]
    where = {"cache": answers[0][1].cache, "path": answers[0][1].path, "width": answers[0][1].width}
    kv_local.record(
        Agreement(kv_local.exact.name, **where, other=other, task=task, n=len(found), same=len(found) - len(apart))
    )
    if kv_local.engine.model.dtype == torch.float32:  # bfloat16 decides many calls by rounding: counted, not promised
        assert [d for d in apart if d[1] >= CLOSE] == []
        assert len(apart) <= max(1, len(found) // 1000)


def test_full_answers_as_transformers(kv_local, kv_task, shortest):
    engine, name = kv_local.engine, "transformers' own cache"
    not_yet(kv_local, kv_task, name)
    engine.model.set_attn_implementation("sdpa")
    try:
        others = {request.id: greedy(engine, request) for request, _ in shortest}
    finally:
        engine.model.set_attn_implementation("kvsuite")
    compare(kv_local, kv_task, name, shortest, others)


@torch.inference_mode()
def test_full_stores_what_transformers_stores(kv_local, kv_task, shortest):
    engine, request = kv_local.engine, shortest[0][0]
    ids, _ = engine.encode(request, "prompt")
    observed = engine.prefill(request, ids, [], frozenset()).context
    caches = [kv_local.exact.cache(layer, 1, len(ids)) for layer in engine.layers]
    kv_local.exact.compress(0, observed, caches)
    theirs = transformers.DynamicCache()
    engine.model.set_attn_implementation("sdpa")
    try:
        adapter.forward(engine.model, theirs, torch.tensor([ids], device=engine.model.device))
    finally:
        engine.model.set_attn_implementation("kvsuite")
    for cache, layer in zip(caches, theirs.layers, strict=True):
        for head, held in enumerate(cache.read(0)):
            assert torch.equal(held.k, layer.keys[0, head])
            assert torch.equal(held.v, layer.values[0, head])


def test_an_answer_is_bitwise_independent_of_mates_row_and_order(kv_local, kv_task, shortest):
    o, few = kv_local.options, shortest[:FEW]
    requests = [request for request, _ in few][::-1]
    found = kv_local.engine.generate(requests, [kv_local.exact], width=o.width, compress=o.compress)
    again = {r.id: (r.tokens, r.margins) for r in found}
    for request, answer in few:
        assert again[request.id] == (answer.tokens, answer.margins)


def test_widths_agree(kv_local, kv_task, shortest):
    o, other = kv_local.options, 8 if kv_local.options.width == 1 else 1
    name = f"itself in steps of {padded_width(step_rows(other, o.device))} rows"
    not_yet(kv_local, kv_task, name)
    requests = [request for request, _ in shortest]
    found = list(kv_local.engine.generate(requests, [kv_local.exact], width=other, compress=o.compress))
    compare(kv_local, kv_task, name, shortest, {r.id: r.tokens for r in found})


@torch.inference_mode()
def greedy(engine, request):
    """The tokens transformers generates with its DynamicCache and SDPA, one prompt at a time."""
    ids, _ = engine.encode(request, "prompt")
    prompt = torch.tensor([ids], device=engine.model.device)
    plain = transformers.GenerationConfig(  # the folder's own may penalize repetitions
        max_new_tokens=request.max_new_tokens, do_sample=False, eos_token_id=sorted(engine.stop), pad_token_id=0
    )
    out = engine.model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=plain)
    return out[0, len(ids) :].tolist()
