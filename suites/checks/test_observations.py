"""What selectors ask to see: each observation against its definition, its cost booked to those that asked for it."""

import time
from dataclasses import dataclass

import pytest
import torch

from kvsuite.cache import adapter
from kvsuite.cache.observations import (
    AttentionMass,
    ExtraPass,
    HiddenStates,
    LastQueries,
    PreRopeMoments,
    QueryCentres,
)
from kvsuite.cache.prefill import PrefillCache
from kvsuite.engines.request import Request
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.errors import UsageError
from kvsuite.kernels.backends import for_prefill
from kvsuite.methods import parse, parse_all
from suites.checks import naive
from suites.checks.test_models import build, given

IDS = torch.randint(1, 96, (1, 50), generator=torch.Generator().manual_seed(0))
EXTRA = ExtraPass(20, 4), ExtraPass(20, 4, normalized=True)


@dataclass(frozen=True)
class Whole:
    """Keeps all of a hidden state, and which layer's it is."""

    def note(self, hidden, layer):
        return torch.cat([hidden.T, torch.full((1, len(hidden)), layer)])


HIDDEN = HiddenStates(Whole())
ALL = [AttentionMass(), LastQueries(7), LastQueries(80), HIDDEN, PreRopeMoments(), QueryCentres(), *EXTRA]


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) % 96 for letter in text]}


@pytest.fixture(scope="module")
def seen():
    """A model's prefilled prompt with everything observed, what each cost, and what its first projection was given."""
    model, inputs = build("Llama"), []
    engine = TransformersEngine(model, Letters())
    first = adapter.attention_modules(model)[0].q_proj
    hook = first.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    prompt = engine.prefill(Request("x", "", "", 1), IDS[0].tolist(), [], [*ALL, LastQueries(7)])
    hook.remove()
    return model, prompt, inputs


def test_nothing_is_collected_that_nobody_asked_for(seen):
    model, _, _ = seen
    cache = PrefillCache(adapter.contexts(model), [LastQueries(7)])
    with torch.inference_mode():
        model(input_ids=IDS, use_cache=True, **given(model, cache))
    assert [set(layer.observed) for layer in cache.prefilled] == [{LastQueries(7)}] * 3
    assert set(cache.seconds) == {LastQueries(7)}


def test_each_observation_is_collected_once_and_its_cost_is_its_own(seen):
    _, prompt, _ = seen
    assert [set(layer.observed) for layer in prompt.context] == [set(ALL)] * 3
    assert set(prompt.observing) == set(ALL)
    assert all(seconds > 0 for seconds in prompt.observing.values())
    assert sum(prompt.observing.values()) < prompt.seconds


def test_last_queries_are_the_newest_rotated_ones(seen):
    _, prompt, _ = seen
    for layer in prompt.context:
        assert layer[LastQueries(7)].shape == (4, 7, 32)
        assert layer[LastQueries(80)].shape == (4, 50, 32)
        assert torch.equal(layer[LastQueries(7)], layer[LastQueries(80)][:, -7:])
        where = torch.arange(50)
        weights = [
            naive.weights(layer[LastQueries(80)][h], layer.k[h // 2], layer.params.scale, naive.causal(where, where))
            for h in range(4)
        ]
        mass = torch.stack([(weights[2 * g].sum(0) + weights[2 * g + 1].sum(0)) / 2 for g in range(2)])
        torch.testing.assert_close(layer[AttentionMass()], mass.float(), rtol=1e-4, atol=1e-5)


def test_hidden_states_are_what_the_projections_are_given(seen):
    _, prompt, inputs = seen
    first, second = (prompt.context[at][HIDDEN] for at in range(2))
    assert torch.equal(first, torch.cat([inputs[0].T, torch.zeros(1, 50)]))
    assert second[-1].eq(1).all()
    assert not torch.equal(second[:-1], inputs[0].T)


def test_no_layer_keeps_its_hidden_states(seen):
    model, _, _ = seen
    cache = PrefillCache(adapter.contexts(model), [HIDDEN])
    with torch.inference_mode():
        adapter.forward(model, cache, IDS)
    assert cache.prefilled[2][HIDDEN].shape == (65, 50)
    assert [layer.hidden for layer in cache.layers] == [None] * 3


def test_moments_are_those_of_queries_before_rope(seen):
    model, prompt, inputs = seen
    with torch.inference_mode():
        q = adapter.attention_modules(model)[0].q_proj(inputs[0]).view(50, 4, 32).transpose(0, 1).double()
    mean, covariance = prompt.context[0][PreRopeMoments()]
    torch.testing.assert_close(mean, q.mean(1).float(), rtol=1e-3, atol=1e-4)
    expected = torch.stack([torch.cov(own.T, correction=0) for own in q])
    torch.testing.assert_close(covariance, expected.float(), rtol=1e-3, atol=1e-3)


def test_centres_are_those_of_queries_before_rope(seen):
    model, prompt, inputs = seen
    with torch.inference_mode():
        q = adapter.attention_modules(model)[0].q_proj(inputs[0]).view(50, 4, 32).transpose(0, 1).double()
    mean, size = prompt.context[0][QueryCentres()].split([32, 16], 1)
    torch.testing.assert_close(mean, q.mean(1).float(), rtol=1e-3, atol=1e-4)
    lengths = torch.complex(*q.chunk(2, -1)).abs().mean(1)
    torch.testing.assert_close(size, lengths.float(), rtol=1e-3, atol=1e-4)
    assert (lengths > torch.complex(*q.mean(1).chunk(2, -1)).abs() + 1e-3).any()


@pytest.mark.parametrize("what", [PreRopeMoments(), QueryCentres()])
def test_what_is_before_rope_needs_a_known_rope(what):
    model = build("Llama")
    engine = TransformersEngine(model, None)
    engine.layers = [type(x)(**{**vars(x), "rope": None}) for x in engine.layers]
    with pytest.raises(ValueError, match="cannot undo"):
        engine.prefill(Request("x", "", "", 1), IDS[0].tolist(), [], [what])


REQUESTS = (
    "\n\nRepeat the previous context exactly.",
    "\n\nRepeat the part of the previous context exactly, starting with",
)


@pytest.mark.parametrize("what", EXTRA)
@torch.inference_mode()
def test_an_extra_pass_is_the_most_that_the_repeated_context_looks_back(seen, what):
    """Against transformers' own eager attention over context, request and chunk. Its weights over some of the keys,
    divided by their sum, are the softmax over these."""
    _, prompt, _ = seen
    eager = build("Llama")
    eager.set_attn_implementation("eager")
    modules, hidden = [block.self_attn for block in eager.model.layers], {}
    for at, module in enumerate(modules):
        module.register_forward_pre_hook(
            lambda module, args, kwargs, at=at: hidden.update({at: kwargs["hidden_states"][0]}), with_kwargs=True
        )
    context = IDS[0].tolist()
    for first in (0, 20, 40):
        own, sinks = context[first : first + 20], min(4, first)
        asked = [*map(ord, REQUESTS[first > 0])]
        fed = [*asked, *(context[first - 8 : first] if first else []), ord("\n"), *own]
        ids = torch.tensor([[*context, *(n % 96 for n in fed)]])
        weights = eager(input_ids=ids, output_attentions=True).attentions
        for layer, (w, module) in enumerate(zip(weights, modules, strict=True)):
            w = w[0, :, 50:].double()  # (heads, fed, 50 + fed)
            w = torch.cat([w[..., :sinks], w[..., first : first + len(own)], w[..., 50:]], -1)
            w = (w / w.sum(-1, keepdim=True))[..., sinks : sinks + len(own)]
            if what.normalized:
                v = prompt.context[layer].v[:, first : first + 20].double()
                o = module.o_proj.weight.double().view(64, 4, 32)
                written = torch.stack([(v[h // 2] @ o[:, h].T).norm(dim=-1) for h in range(4)])
                w = w * written[:, None] / hidden[layer][50:].double().norm(dim=-1)[:, None]
            expected = w.unflatten(0, (2, 2)).amax((1, 2)).float()
            torch.testing.assert_close(
                prompt.context[layer][what][:, first : first + 20], expected, rtol=1e-3, atol=1e-5
            )


class Templated(Letters):
    """The same with a chat template."""

    chat_template = "there is one"

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return "".join(f"<{role}>{text}<end>" for role, text in ((m["role"], m["content"]) for m in messages)) + "<ai>"


@pytest.mark.parametrize(("tokenizer", "turn"), [(Templated(), "<end><ai>"), (Letters(), "\n")])
def test_a_repetition_begins_where_an_answer_does(tokenizer, turn):
    fed = []
    engine = TransformersEngine(build("Llama"), tokenizer)
    engine.model.register_forward_pre_hook(
        lambda module, args, kwargs: fed.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    engine.prefill(Request("x", "", "", 1), IDS[0].tolist(), [], [ExtraPass(30)])
    text = [ord(letter) % 96 for letter in REQUESTS[0] + turn]
    assert fed[1] == [*text, *IDS[0, :30].tolist()]
    text = [ord(letter) % 96 for letter in REQUESTS[1]], [ord(letter) % 96 for letter in turn]
    assert fed[2] == [*text[0], *IDS[0, 22:30].tolist(), *text[1], *IDS[0, 30:].tolist()]


def test_a_context_too_long_to_be_repeated_is_refused():
    engine = TransformersEngine(build("Llama", max_position_embeddings=100), None)
    engine.encode = lambda request, how: (IDS[0].tolist(), [])
    requests = [Request("x", "", "", 9)]
    list(engine.generate(requests, parse_all(["full,kvzip:chunk=20"])))
    engine.encode = lambda request, how: (IDS[0].tolist() * 2, [])
    with pytest.raises(UsageError, match="sample x needs 120 tokens for kvzip:chunk=20, which repeats the context"):
        list(engine.generate([Request("x", "", "", 0)], parse_all(["full,kvzip:chunk=20"])))


def test_a_method_pays_for_its_own_observations_only(monkeypatch, tiny_llama):
    """The observation is made slow; only what asked for it is told to have prefilled for long."""
    slow, backend = 0.2, for_prefill("cpu")
    real = backend.column_mass

    def column_mass(*args, **more):
        time.sleep(slow)
        return real(*args, **more)

    monkeypatch.setattr(backend, "column_mass", column_mass)
    engine = TransformersEngine(tiny_llama, None)
    prompt = engine.prefill(Request("x", "", "", 2), list(range(60)), [], parse("h2o:budget=20").observes)
    spent = {}
    for text in ("full", "h2o:budget=20"):
        worker = engine.worker(parse(text), 1, [(60, 2)])
        row = worker.compress(prompt)
        spent[text] = worker.sequences[row].response.prefill_seconds
    assert spent["h2o:budget=20"] - spent["full"] > 2 * slow * 0.9
