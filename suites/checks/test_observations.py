"""What selectors ask to see: each observation against its definition, its cost booked to those that asked for it."""

import time

import pytest
import torch

from kvsuite.cache import adapter
from kvsuite.cache.observations import AttentionMass, ExtraPass, HiddenStates, LastQueries, PreRopeMoments
from kvsuite.cache.prefill import PrefillCache
from kvsuite.engines.request import Request
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.kernels.backends import for_prefill
from kvsuite.methods import parse
from suites.checks import naive
from suites.checks.test_models import build, given

IDS = torch.randint(1, 96, (1, 50), generator=torch.Generator().manual_seed(0))
ALL = [AttentionMass(), LastQueries(7), LastQueries(80), HiddenStates(), PreRopeMoments(), ExtraPass("again", 20)]


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) % 96 for letter in text]}


@pytest.fixture(scope="module")
def seen():
    """A model's prefilled prompt with everything observed, what each cost, and what its first projection was given."""
    model, inputs = build("Llama"), []
    engine = TransformersEngine(model, Letters())
    first = engine.attention_modules[0].q_proj
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
    assert prompt.context[0][HiddenStates()].shape == (50, 64)
    assert torch.equal(prompt.context[0][HiddenStates()], inputs[0])
    assert not torch.equal(prompt.context[1][HiddenStates()], inputs[0])


def test_moments_are_those_of_queries_before_rope(seen):
    model, prompt, inputs = seen
    with torch.inference_mode():
        q = adapter.attention_modules(model)[0].q_proj(inputs[0]).view(50, 4, 32).transpose(0, 1).double()
    mean, covariance = prompt.context[0][PreRopeMoments()]
    torch.testing.assert_close(mean, q.mean(1).float(), rtol=1e-3, atol=1e-4)
    expected = torch.stack([torch.cov(own.T, correction=0) for own in q])
    torch.testing.assert_close(covariance, expected.float(), rtol=1e-3, atol=1e-3)


def test_moments_need_a_known_rope():
    model = build("Llama")
    engine = TransformersEngine(model, None)
    engine.layers = [type(x)(**{**vars(x), "rope": None}) for x in engine.layers]
    with pytest.raises(ValueError, match="cannot undo"):
        engine.prefill(Request("x", "", "", 1), IDS[0].tolist(), [], [PreRopeMoments()])


@torch.inference_mode()
def test_an_extra_pass_is_the_most_that_the_repeated_context_looks_back(seen):
    """Against transformers' own eager attention over prompt and context, chunk by chunk."""
    _, prompt, _ = seen
    eager = build("Llama")
    eager.set_attn_implementation("eager")
    again, most = [ord(letter) % 96 for letter in "again"], None
    for first in range(0, 50, 20):
        chunk = torch.tensor([[*IDS[0].tolist(), *again, *IDS[0, first : first + 20].tolist()]])
        weights = eager(input_ids=chunk, output_attentions=True).attentions
        found = torch.stack([w[0, :, 50:, :50].unflatten(0, (2, 2)).amax((1, 2)) for w in weights])
        most = found if most is None else torch.maximum(most, found)
    for layer, expected in zip(prompt.context, most, strict=True):
        torch.testing.assert_close(layer[ExtraPass("again", 20)], expected, rtol=1e-3, atol=1e-5)


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
