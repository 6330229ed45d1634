"""How many tokens stay where a threshold, weights or a file of the user's say it: dms, kvzap, headwise."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kvsuite.cache.observations import HiddenStates
from kvsuite.engines.request import Request
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.errors import UsageError
from kvsuite.kernels.quantspec import PAGE
from kvsuite.methods import parse, parse_all
from kvsuite.methods.artifact import Artifact
from kvsuite.methods.budgets import headwise
from suites.checks.table import DIM, KV_HEADS, SCALE, context, layer, loaded, tokens
from suites.checks.test_models import build


@pytest.mark.parametrize("text", ["knorm:budget={} + dms", "h2o:budget={} + dms", "kvzip:budget={},sinks=2 + dms"])
@settings(max_examples=5)
@given(budget=st.integers(5, 60), length=st.integers(70, 120), seed=st.integers(0, 99))
def test_one_threshold_for_all_layers_and_heads(text, budget, length, seed):
    method = parse(text.format(budget))
    seen = [context(length, seed + at, torch.float32, at) for at in range(3)]
    caches = [method.cache(layer(torch.float32, at), 1, length) for at in range(3)]
    method.compress(0, seen, caches)
    scores = torch.stack([method.selector.score(one, budget) for one in seen])
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for at, cache in enumerate(caches):
        for head, held in enumerate(cache.read()):
            kept[at, head, held.positions.long()] = True
    assert int(kept.sum()) == 3 * KV_HEADS * budget
    assert scores[kept].min() >= scores[~kept].max()
    counts = kept.sum(-1)
    assert len(counts.unique()) > 1
    assert sum(cache.kv.held_pages(0) for cache in caches) == int((-(-counts // PAGE)).sum()), "pages are freed"


@pytest.mark.parametrize("threshold", [-8.0, -5.5, -3.0, 0.0])
def test_a_threshold_lets_the_prompt_decide_how_much_stays(threshold):
    method = parse(f"knorm + dms:threshold={threshold}")
    for seed in range(3):
        seen = context(90, seed, torch.float32)
        cache = method.cache(layer(torch.float32), 1, method.capacity(90, 4))
        method.compress(0, [seen], [cache])
        for head, held in enumerate(cache.read()):
            expected = (seen.k[head].norm(dim=-1) <= -threshold).nonzero()[:, 0]
            assert held.positions.tolist() == expected.tolist()
        q, k, v = tokens(4, 1, torch.float32)
        for i in range(4):
            cache.append(k[None, :, i : i + 1], v[None, :, i : i + 1])
            assert cache.attend(q[None, :, i : i + 1], SCALE).isfinite().all(), "a head may have kept nothing"
    method.check_context(20), "there is no budget that could be too large"


def kvzap(hidden, tensors, at):
    """float64 (kv_heads, T): two matrices with a GELU between, or one."""
    names = [f"layers.{at}.0", f"layers.{at}.2"] if f"layers.{at}.0.weight" in tensors else [f"layers.{at}"]
    x = hidden.double()
    for i, name in enumerate(names):
        x = x * (1 + torch.erf(x / 2**0.5)) / 2 if i else x
        x = x @ tensors[f"{name}.weight"].double().T + tensors[f"{name}.bias"].double()
    return x.T


def weights(folder, layers, hidden, kv_heads, inner=0):
    """A file as nvidia/KVzap-* have it."""
    noise, tensors = torch.Generator().manual_seed(0), {}
    for at in range(layers):
        shapes = {f"{at}": (kv_heads, hidden)}
        if inner:
            shapes = {f"{at}.0": (inner, hidden), f"{at}.2": (kv_heads, inner)}
        for name, shape in shapes.items():
            tensors[f"layers.{name}.weight"] = torch.randn(shape, generator=noise)
            tensors[f"layers.{name}.bias"] = torch.randn(shape[:1], generator=noise)
    file = folder / f"zap-{layers}-{hidden}-{kv_heads}-{inner}.safetensors"
    save_file(tensors, str(file))
    return file, tensors


@pytest.mark.parametrize("inner", [0, 24])
def test_kvzap_scores_are_those_of_its_weights(tmp_path, inner):
    file, tensors = weights(tmp_path, 2, DIM, KV_HEADS, inner)
    method = parse(f"kvzap:weights={file},budget=30,recent=5")
    for at in range(2):
        seen = context(80, at, torch.float32, at)
        hidden, (observed,) = seen.k.amax(0), method.observes
        assert isinstance(observed, HiddenStates)
        seen.observed[observed] = observed.notes.note(hidden, at)
        scores, expected = method.selector.score(seen, 30), kvzap(hidden, tensors, at)
        assert scores[:, -5:].isinf().all()
        torch.testing.assert_close(scores[:, :-5], expected[:, :-5].float(), rtol=1e-4, atol=1e-4)
        for head, held in enumerate(loaded(method, [seen], 0, torch.float32, at).read()):
            own = expected[head].clone()
            own[-5:] = torch.inf
            assert held.positions.tolist() == own.topk(30).indices.sort().values.tolist()


def test_weights_of_another_model_are_refused_in_one_sentence(tmp_path):
    def refused(said, *shape):
        file, _ = weights(tmp_path, *shape)
        with pytest.raises(UsageError, match=said):
            parse(f"kvzap:weights={file}").check_model([layer(index=at) for at in range(2)])

    refused("is for 3 layers, the model has 2", 3, DIM, KV_HEADS)
    refused("has 3 kv heads in layer 0, the model has 2", 2, DIM, 3)
    refused("has 3 kv heads in layer 0, the model has 2", 2, DIM, 3, 8)
    refused("has 16 channels of hidden states in layer 0, the model has 32", 2, 16, KV_HEADS)
    file, _ = weights(tmp_path, 2, DIM, KV_HEADS)
    parse(f"kvzap:weights={file}").check_model([layer(index=at) for at in range(2)])
    for text, said in (("kvzap", "name the file of its weights"), ("kvzap:weights=no", "there is no file 'no'")):
        with pytest.raises(UsageError, match=said):
            parse(text)
    (tmp_path / "a.safetensors").write_text("{}")
    with pytest.raises(UsageError, match="is no file of safetensors"):
        parse(f"kvzap:weights={tmp_path / 'a.safetensors'}").check_model([layer()])


def shares(folder, numbers):
    file = folder / "shares.json"
    file.write_text(json.dumps(numbers))
    headwise.loaded.cache_clear()
    return file


def test_each_head_keeps_its_own_share(tmp_path):
    file = shares(tmp_path, [[1, 0.2], [0.05, 0.5]])
    method = parse(f"streaming-llm:positions=absolute,sinks=2 + headwise:shares={file}")
    caches = [method.cache(layer(index=at), 1, method.capacity(80, 30)) for at in range(2)]
    method.compress(0, [context(80, at, index=at) for at in range(2)], caches)
    assert [[len(held.positions) for held in cache.read()] for cache in caches] == [[80, 16], [4, 40]]
    q, k, v = tokens(30, 1)
    for i in range(30):
        for cache in caches:
            cache.append(k[None, :, i : i + 1], v[None, :, i : i + 1])
            cache.attend(q[None, :, i : i + 1], SCALE)
    held = [[own.positions.tolist() for own in cache.read()] for cache in caches]
    assert held[0] == [[*range(110)], [0, 1, *range(96, 110)]]
    assert held[1] == [[0, 1, 108, 109], [0, 1, *range(72, 110)]]


def test_shares_of_another_model_are_refused_in_one_sentence(tmp_path):
    for numbers, said in (
        ([[1, 0.2]], "has 1 layers of 2 kv heads, the model has 2 layers of 2 kv heads"),
        ([[1], [1]], "has 2 layers of 1 kv heads, the model has"),
    ):
        with pytest.raises(UsageError, match=said):
            parse(f"knorm + headwise:shares={shares(tmp_path, numbers)}").check_model([layer()] * 2)
    for numbers, said in (([[0.0, 1]], "above 0 and at most 1"), ([3], "no JSON list of lists"), ({"a": 1}, "no JSON")):
        with pytest.raises(UsageError, match=said):
            parse(f"knorm + headwise:shares={shares(tmp_path, numbers)}")
    parse(f"knorm + headwise:shares={shares(tmp_path, [[1, 0.2]] * 2)}").check_model([layer()] * 2)


def test_the_hash_of_weights_is_in_the_answer_and_wrong_ones_cost_their_own(tmp_path):
    engine = TransformersEngine(build("Llama"), None)
    engine.encode, engine.stop = lambda request, how: (list(range(1, 61)), []), frozenset()
    right, tensors = weights(tmp_path, 3, 64, 2)
    wrong, _ = weights(tmp_path, 2, 64, 2)
    texts = [f"kvzap:weights={right},recent=8+dms:threshold=0", f"kvzap:weights={wrong},recent=8", "full"]
    found = {r.method: r for r in engine.generate([Request("x", "", "", 5)], parse_all(texts))}
    assert found[texts[0]].artifact == Artifact(tensors).hash
    assert found[texts[0]].error == found["full"].error == found["full"].artifact == ""
    assert found[texts[1]].error.startswith(f"UsageError: kvzap: {wrong} is for 2 layers, the model has 3")
    assert found[texts[0]].nbytes < 0.9 * found["full"].nbytes
