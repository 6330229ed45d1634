"""Our cache inside transformers' models: logits equal eager's, K and V equal DynamicCache's, the rest is refused."""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache

from kvsuite import configs
from kvsuite.cache import adapter
from kvsuite.cache.adapter import KVCache, Member
from kvsuite.cache.observations import AttentionMass
from kvsuite.cache.prefill import PrefillCache
from kvsuite.errors import UsageError
from kvsuite.methods import parse

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
EXPERTS = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "num_shared_experts": 1,
}
MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": 24},
    "Qwen3": {},
    "Gemma3Text": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "Gemma2": {"sliding_window": 16, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 32},
    "GptOss": {"sliding_window": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    "Phi3": {},
    "Phimoe": {"sliding_window": 16, "num_local_experts": 2},  # the next two tell the mask alone of the window
    "Qwen2Moe": {
        "sliding_window": 16,
        "use_sliding_window": True,
        "max_window_layers": 1,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "Exaone4": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "HunYuanDenseV1": {},  # normalizes keys after it has rotated them
    "Afmoe": EXPERTS,  # views what attention returns
    "ExaoneMoe": EXPERTS,
    "Gemma4Text": {  # layers with heads of their own number and size, keys that are values, too
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "global_head_dim": 64,
        "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 8,
    },
    "MiMoV2Flash": {  # twice the kv heads where there is a window
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "v_head_dim": 32,
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
    },
}


def build(name, **more):
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(**SHAPE | MODELS.get(name, {}) | more)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval()
    model.set_experts_implementation("eager")  # the grouped product of mixtures knows no float64
    for parameter in model.parameters():  # sinks and norms start as constants or garbage
        torch.nn.init.normal_(parameter, std=0.3) if parameter.dim() == 1 else torch.nn.init.normal_(parameter, std=0.2)
    return model


def given(model, cache):
    """The cache as the keyword argument that this version of transformers wants."""
    return {adapter.cache_argument(type(model).forward): cache}


def ours(model, ids, split, chunk=1):
    """Logits of ``ids`` from `split` - 1 on: a prefilled context, then the rest through a layer cache."""
    model = copy.deepcopy(model)
    adapter.install(model)
    layers = adapter.contexts(model)
    prefilled = PrefillCache(layers)
    logits = [model(input_ids=ids[:, :split], use_cache=True, **given(model, prefilled)).logits[:, -1:]]
    method = parse("full")
    caches = [method.cache(layer, 1, ids.shape[1]) for layer in layers]
    method.compress(0, prefilled.prefilled, caches)
    cache = KVCache(Member(caches))
    for first in range(split, ids.shape[1], chunk):
        last = min(first + chunk, ids.shape[1])
        where = torch.arange(first, last)[None]
        out = model(input_ids=ids[:, first:last], position_ids=where, use_cache=True, **given(model, cache))
        logits.append(out.logits)
    return torch.cat(logits, dim=1), prefilled.prefilled, caches


@pytest.mark.parametrize("chunk", [1, 7], ids=["stepwise", "suffix"])
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_logits_equal_eager(name, chunk):
    model = build(name)
    ids = torch.randint(1, 96, (1, 60))
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids).logits[:, 39:]
    actual, _, _ = ours(model, ids, 40, chunk)
    # eager itself is this far from float64 arithmetic
    model.double()
    error = (model(input_ids=ids).logits[:, 39:] - expected).abs().max()
    assert (actual - expected).abs().max() <= 4 * error + 1e-6
    assert expected.std() > 0.1, "a model that says nothing would agree with anything"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
@torch.inference_mode()
def test_full_stores_what_dynamic_cache_stores(name, dtype):
    model = build(name).to(dtype)
    ids = torch.randint(1, 96, (1, 77))
    model.set_attn_implementation("sdpa")
    theirs = DynamicCache()
    model(input_ids=ids, use_cache=True, **given(model, theirs))
    _, seen, caches = ours(model, ids, 77)
    for layer, observed, cache in zip(theirs.layers, seen, caches, strict=True):
        held = cache.read(0)
        for head in range(2):
            assert torch.equal(held[head].k, layer.keys[0, head])
            assert torch.equal(held[head].v, layer.values[0, head])
        assert torch.equal(observed.k, layer.keys[0])


@torch.inference_mode()
def test_works_through_generate():
    model = build("Llama")
    ids = torch.randint(1, 96, (1, 20))
    mask = torch.ones_like(ids)
    asked = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=mask, **asked)
    adapter.install(model)
    caches = [parse("full").cache(layer, 1, 64) for layer in adapter.contexts(model)]
    assert torch.equal(
        model.generate(ids, attention_mask=mask, **given(model, KVCache(Member(caches))), **asked), expected
    )
    assert [cache.seen(0) for cache in caches] == [31, 31, 31]


@torch.inference_mode()
def test_mass_is_observed_under_a_sliding_window():
    model = build("Mistral")
    adapter.install(model)
    cache = PrefillCache(adapter.contexts(model), [AttentionMass()])
    model(input_ids=torch.randint(1, 96, (1, 50)), use_cache=True, **given(model, cache))
    for seen in cache.prefilled:
        torch.testing.assert_close(seen[AttentionMass()].sum(-1), torch.full((2,), 50.0))
        assert (seen[AttentionMass()][:, 0] < 24.001).all(), "a key is read by 24 queries at most"


@torch.inference_mode()
def test_padding_is_refused():
    model = build("Llama")
    adapter.install(model)
    cache = KVCache(Member([parse("full").cache(layer, 2, 64) for layer in adapter.contexts(model)], rows=(0, 1)))
    ids = torch.randint(1, 96, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with pytest.raises(ValueError, match="padding"):
        model(input_ids=ids, attention_mask=mask, use_cache=True, **given(model, cache))


@torch.inference_mode()
def test_a_foreign_cache_is_refused():
    model = build("Llama")
    adapter.install(model)
    with pytest.raises(ValueError, match="needs a cache of kvsuite"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kv_lora_rank": 8}, "latent"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "chunked_attention"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_what_is_not_understood_is_refused(change, sentence):
    config = transformers.LlamaConfig(**SHAPE)
    for key, value in change.items():
        object.__setattr__(config, key, value)
    with pytest.raises(UsageError, match=sentence):
        configs.refuse(config.to_dict())


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Gemma3Text", "Mistral", "Phi3"])
def test_rope_is_found_where_keys_are_half_split(name):
    model = build(name)
    adapter.install(model)
    assert all(layer.rope is not None for layer in adapter.contexts(model))


def test_attention_of_another_make_is_refused():
    config = transformers.BloomConfig(hidden_size=64, n_head=4, n_layer=2, vocab_size=96)
    model = transformers.BloomForCausalLM(config).eval()
    adapter.install(model)
    with pytest.raises(
        UsageError, match="'bloom' computes its attention itself, not by transformers' attention interface"
    ):
        adapter.contexts(model)


def test_no_selector_acts_beside_a_sliding_window():
    model = build("Mistral")
    adapter.install(model)
    with pytest.raises(UsageError, match="layer 0 has a sliding window"):
        parse("h2o:budget=16").cache(adapter.contexts(model)[0], 1, 64)
    parse("int8").cache(adapter.contexts(model)[0], 1, 64)


def test_layers_without_rope_have_none():
    model = build("SmolLM3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0])
    adapter.install(model)
    assert [layer.rope is not None for layer in adapter.contexts(model)] == [True, True, True, False]


def test_rope_is_not_found_where_keys_are_interleaved():
    more = {"hidden_size": 64, "layer_norm_eps": 1e-5}
    model = build("Cohere", **more)
    adapter.install(model)
    assert all(layer.rope is None for layer in adapter.contexts(model))
    with pytest.raises(UsageError, match="positions=absolute"):
        parse("streaming-llm:budget=16").cache(adapter.contexts(model)[0], 1, 64)
    parse("streaming-llm:budget=16,positions=absolute").cache(adapter.contexts(model)[0], 1, 64)
