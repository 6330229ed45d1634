"""Models that a user brings: exact, or refused in one sentence before anything runs."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvsuite import configs
from kvsuite.cache import adapter
from kvsuite.cache.prefill import PrefillCache
from kvsuite.cache.rope import find_rope
from kvsuite.engines import pretrained, twin
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.errors import UsageError
from kvsuite.kernels.rope import Rope
from kvsuite.methods import parse
from kvsuite.plugin import options
from kvsuite.plugin.local import Local
from suites.checks.depth import depth
from suites.checks.sweep import TYPES, outcome
from suites.checks.test_models import build

FULL, SLIDING = "full_attention", "sliding_attention"
EXACT = (
    *("gpt2", "opt", "biogpt", "gpt_neox", "glm", "phi", "cohere", "gemma2", "gemma3", "gemma4_text", "glm4"),
    *("mistral", "mixtral", "qwen2_moe", "phimoe", "exaone4", "exaone_moe", "afmoe", "gpt_oss", "smollm3", "olmo2"),
    *("granite", "stablelm", "hunyuan_v1_dense"),
)
"""One of each mechanism: learned and rotated positions, windows, norms, experts, sinks, layers that differ."""
REFUSED = {
    "bart": "is an encoder-decoder",
    "bert": "understands causal masks",
    "bloom": "computes its attention itself",
    "deepseek_v3": "caches latent vectors",
    "diffllama": "a layer attends twice",
    "doge": "computes its attention itself",
    "dots3_note_text": "caches latent vectors",
    "gemma3n_text": "read another layer's K and V",
    "jamba": "has recurrent layers",
    "llama4_text": "chunked_attention",
    "mimo_v2_flash": "keys are 2 × 192 .* values 2 × 128",
    "mllama": "attend to images",
    "qwen3_next": "linear_attention",
    "rwkv": "cannot be checked on a small copy",
    "xglm": "computes its attention itself",
}


def of(kind, **more):
    return AutoConfig.for_model(kind, **more)


def contexts(name, **more):
    model = build(name, **more)
    adapter.install(model)
    return adapter.contexts(model)


# what the twin sees


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3_text", "gpt_oss", "gpt2"])
def test_a_model_that_is_exact_passes(kind):
    assert len(twin.check(of(kind))) in (2, 4)


def test_a_twin_is_small_and_has_two_layers_of_each_kind():
    small = twin.shrunken(of("gemma3_text"))
    assert small.layer_types == [SLIDING, SLIDING, FULL, FULL]
    assert small.num_hidden_layers == 4
    assert small.sliding_window == 8
    assert small.head_dim == of("gemma3_text").head_dim, "rotations depend on it"
    with torch.device("meta"):
        model = pretrained.auto_class(small).from_config(small)
    assert sum(p.numel() for p in model.parameters()) < 2e7


def test_a_window_that_never_acts_stays():
    assert twin.shrunken(of("mistral", sliding_window=4096, max_position_embeddings=4096)).sliding_window == 4096


def drop_window(monkeypatch):
    mask_forward = adapter.mask_forward
    monkeypatch.setattr(adapter, "mask_forward", lambda *a, **k: mask_forward(*a, **k) and adapter.Causal(None))


def half_scale(monkeypatch):
    attention_forward = adapter.attention_forward

    def halved(*args, scaling, **more):
        return attention_forward(*args, scaling=scaling / 2, **more)

    monkeypatch.setattr(adapter, "attention_forward", halved)


@pytest.mark.parametrize(("kind", "breaks"), [("phimoe", drop_window), ("llama", half_scale)])
def test_a_twin_that_computes_something_else_is_refused(monkeypatch, kind, breaks):
    breaks(monkeypatch)
    with pytest.raises(UsageError, match=f"'{kind}' computes something else .* off by"):
        twin.check(of(kind, sliding_window=4096))


def test_a_method_that_cannot_act_on_the_layers_is_refused(model):
    with pytest.raises(UsageError, match=r"group=32 does not divide .* 16; leave it out of --kv-methods for broken"):
        check(model, "full,kivi:bits=4")


# the window is the mask's


def test_a_window_that_only_attention_is_told_is_refused():
    module, q = torch.nn.Identity(), torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match="attention is told a window of 8, its mask one of None"):
        adapter.attention_forward(module, q, adapter._Layer(0, ()), q, adapter.Causal(None), sliding_window=8)


@pytest.mark.parametrize("told", [{"indices": 1}, {"position_bias": 1}, {"is_causal": False}])
def test_what_attention_is_told_and_would_drop_is_refused(told):
    module, q = torch.nn.Identity(), torch.zeros(1, 1, 1, 8)
    with pytest.raises(ValueError, match=f"attention is told {next(iter(told))!r}"):
        adapter.attention_forward(module, q, adapter._Layer(0, ()), q, adapter.Causal(None), **told)


MASKS = {
    "causal": (lambda b, h, q, k: k <= q, None, True),
    "window": (lambda b, h, q, k: (k <= q) & (k > q - 4), 4, True),
    "chunks": (lambda b, h, q, k: (k <= q) & (k // 4 == q // 4), 4, False),
    "both ways": (lambda b, h, q, k: (k >= 0) & (q >= 0), None, False),
    "a window nobody is told of": (lambda b, h, q, k: (k <= q) & (k > q - 4), None, False),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_asked_what_may_be_read(name):
    function, window, understood = MASKS[name]
    told = {"q_length": 11, "kv_length": 11, "mask_function": function, "local_size": window}
    if understood:
        assert adapter.mask_forward(**told) == adapter.Causal(window)
    else:
        with pytest.raises(ValueError, match="not this model's"):
            adapter.mask_forward(**told)


def test_a_mask_with_an_unknown_argument_is_refused():
    with pytest.raises(ValueError, match="the mask is told 'block_table'"):
        adapter.mask_forward(1, 1, MASKS["causal"][0], block_table=[1])


# RoPE by the layer's own keys

ROTATED = {
    "HunYuanDenseV1": ({}, [False, False, False]),
    "Exaone4": ({"sliding_window": 512, "layer_types": [SLIDING, FULL, SLIDING]}, [True, False, True]),
    "ExaoneMoe": ({"sliding_window": 512, "layer_types": [SLIDING, FULL, SLIDING]}, [True, False, True]),
    "Afmoe": ({"sliding_window": 512, "layer_types": [SLIDING, FULL, SLIDING]}, [True, False, True]),
}


@pytest.mark.parametrize("name", ROTATED)
def test_rope_is_what_the_keys_of_a_layer_show(name):
    more, rotated = ROTATED[name]
    layers = contexts(name, **more)
    assert [layer.rope is not None for layer in layers] == rotated
    assert [layer.window for layer in layers] == [None] * 3, "as long as the context: it never acts"
    with pytest.raises(UsageError, match="cannot re-rotate this model's keys; use positions=absolute"):
        parse("streaming-llm:budget=16").check_layers(layers)
    parse("streaming-llm:budget=16,positions=absolute").check_layers(layers)


def test_a_key_of_zeros_shows_no_rope():
    zeros, ropes = torch.zeros(2, 8), [Rope(torch.tensor([1.0, 0.1]))]
    assert find_rope(ropes, zeros, zeros, 500) is None
    ones = torch.ones(2, 8)
    assert find_rope(ropes, ones, ropes[0].rotate(ones, 500), 500) is ropes[0]


def test_what_attention_returns_can_be_viewed():
    """AFMoE does so, whatever the cache makes of it."""
    layer, q = adapter._Layer(0, ()), torch.zeros(1, 2, 3, 8)
    layer.attend = lambda q, *_: torch.zeros(1, 2, 3, 8)
    adapter.attention_forward(None, q, layer, q, adapter.Causal(None))[0].view(1, 3, 16)


def test_layers_are_as_they_were_seen():
    assert [(x.heads, x.kv_heads, x.head_dim, x.window) for x in contexts("Gemma4Text")] == [
        (4, 2, 32, 16), (4, 1, 64, None), (4, 1, 64, None),
    ]  # fmt: skip
    layers = contexts("MiMoV2Flash")
    assert [(x.kv_heads, x.window) for x in layers] == [(2, None), (4, 16), (2, None)]
    with pytest.raises(UsageError, match="layer 1 has a sliding window"):
        parse("h2o:budget=16").check_layers(layers)


def test_no_selector_acts_on_layers_that_differ_in_kv_heads():
    layers = contexts("MiMoV2Flash", sliding_window=512)
    assert [x.window for x in layers] == [None] * 3
    with pytest.raises(UsageError, match="layers differ in their kv heads"):
        parse("h2o:budget=16").check_layers(layers)


# folders


def folder_of(kind, path, world, **more):
    """A folder with a small random model of a kind and the letters' tokenizer."""
    config = of(kind, **more)
    torch.manual_seed(0)
    pretrained.auto_class(config).from_config(config).save_pretrained(path)
    for file in (world / "model").glob("tokenizer*"):
        shutil.copy(file, path)
    return path


SMALL = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024, "eos_token_id": 0,
}  # fmt: skip
EYES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
SEEING = {
    "llava": {"text_config": {"model_type": "llama", **SMALL}, "vision_config": {"model_type": "clip_vision_model",
              "patch_size": 14, **EYES}, "image_token_index": 100},
    "gemma3": {"text_config": {"model_type": "gemma3_text", "sliding_window": 64, **SMALL},
               "vision_config": {"patch_size": 14, **EYES}, "image_token_index": 100, "mm_tokens_per_image": 4},
    "qwen2_5_vl": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                   "mrope_section": [2, 3, 3]}, **SMALL},
                   "vision_config": {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2,
                                     "out_hidden_size": 64, "fullatt_block_indexes": [0]},
                   "image_token_id": 100, "video_token_id": 99, "vision_start_token_id": 98,
                   "vision_end_token_id": 97},
}  # fmt: skip


@pytest.mark.parametrize("kind", SEEING)
@torch.inference_mode()
def test_a_folder_of_a_model_that_sees_answers_text(kind, tmp_path, world):
    folder = folder_of(kind, tmp_path, world, **SEEING[kind])
    twin.check(pretrained.read_config(folder))
    engine = TransformersEngine.load(folder, "float32")
    ids = torch.randint(1, 90, (1, 60))
    engine.model.set_attn_implementation("eager")
    expected = engine.model(input_ids=ids).logits[:, -1]
    engine.model.set_attn_implementation(adapter.NAME)
    found = adapter.forward(engine.model, PrefillCache(engine.layers), ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def without(folder, *names):
    """Leave tensors out of a folder's weights."""
    from safetensors.torch import load_file, save_file

    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if k not in names}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def change(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def shards(folder):
    names = {"a": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def unreadable(folder):
    """Whoever reads weights fails with another sentence."""
    (folder / "model.safetensors").write_bytes(b"no weights")


BROKEN = {
    "encoder-decoder": (lambda f: [unreadable(f), change(f, is_encoder_decoder=True)], "is an encoder-decoder"),
    "latent": (lambda f: [unreadable(f), change(f, kv_lora_rank=8)], "caches latent vectors"),
    "layers": (lambda f: [unreadable(f), change(f, layer_types=[FULL, "linear_attention"])], "linear_attention"),
    "rope": (lambda f: [unreadable(f), change(f, rope_scaling={"type": "dynamic", "factor": 2.0})], "'dynamic' RoPE"),
    "unheard of": (lambda f: change(f, model_type="lama"), "transformers cannot read '.*config.json'"),
    "no decoder": (lambda f: change(f, model_type="vit"), "'vit' is no causal language model in transformers"),
    "cut off": (cut, "model.safetensors' is damaged: it holds .* bytes of weights, not"),
    "no weights": (unreadable, "model.safetensors' is no file of weights"),
    "a shard": (shards, "has no model-00001-of-00002.safetensors, which its model.safetensors.index.json names"),
    "tensors": (lambda f: without(f, "model.layers.1.mlp.up_proj.weight", "model.norm.weight"),
                "lack 'model.layers.1.mlp.up_proj.weight' and 1 more"),
}  # fmt: skip


@pytest.fixture
def model(world, tmp_path):
    return shutil.copytree(world / "model", tmp_path / "broken")


def check(folder, methods="full,int8"):
    """What a run does before it collects anything."""
    Local(options.check({"model": folder, "length": 256, "methods": methods})).check_model()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_refused(name, model):
    damage, sentence = BROKEN[name]
    check(model)
    damage(model)
    with pytest.raises(UsageError, match=sentence) as refusal:
        check(model)
    assert "\n" not in str(refusal.value)


RUNS = [("tensors", "samples", ()), ("tensors", "length", ("-n", "2")), ("latent", "throughput", ())]
MORE = [(name, marker, ("-n", "2")) for name in BROKEN for marker in ("samples", "throughput", "samples or length")]


@pytest.mark.parametrize(("name", "marker", "workers"), depth(RUNS, RUNS + MORE))
def test_a_run_ends_before_it_begins(name, marker, workers, run, model):
    damage, sentence = BROKEN[name]
    damage(model)
    result = run(marker, *workers, "--kv-model", str(model))
    told = [line for line in [*result.outlines, *result.errlines] if line.strip()]
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert re.fullmatch(f"ERROR: .*{sentence}.*", told[-1])
    assert not any("Traceback" in line or "passed" in line or "failed" in line for line in told)
    assert len(told) < 12


def test_a_twin_is_asked_before_weights_are_read(model):
    (model / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")  # a file without a tensor
    change(model, model_type="diffllama")
    with pytest.raises(UsageError, match="'diffllama' cannot be run on kvsuite's cache: ValueError: a layer attends"):
        check(model)


def test_a_gguf_file_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="is a file: only a server reads it, kvsuite itself a model folder"):
        check(tmp_path / "a.gguf")


def test_the_default_model_has_no_twin(monkeypatch):
    monkeypatch.setattr(twin, "check", lambda *_: pytest.fail("its hash is known"))
    Local(options.check({})).check_model()


@pytest.mark.parametrize("change", [{"kv_lora_rank": 8}, {"layer_types": ["chunked_attention"]}])
def test_the_text_part_of_a_configuration_decides(change):
    with pytest.raises(UsageError, match="model type 'seen'"):
        configs.refuse({"model_type": "seer", "text_config": {"model_type": "seen", **change}})


# every type


def refusal(kind):
    why = outcome(kind)
    assert "\n" not in why
    assert len(why) < 300
    return why


@pytest.mark.parametrize("kind", EXACT)
def test_a_type_is_exact(kind):
    assert refusal(kind) == ""


@pytest.mark.parametrize("kind", [kind for kind in REFUSED if kind in TYPES])  # older transformers know fewer
def test_a_type_is_refused_in_one_sentence(kind):
    assert re.search(REFUSED[kind], refusal(kind))


@pytest.mark.parametrize("kind", depth(["llama"], TYPES))
def test_any_type_is_exact_or_refused_in_one_sentence(kind):
    refusal(kind)


# quantized weights, where their libraries are installed


def int8():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def nf4():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)


@pytest.mark.parametrize(("library", "how"), [("torchao", int8), ("bitsandbytes", nf4)])
@torch.inference_mode()
def test_quantized_weights_answer_as_transformers(library, how, world):
    pytest.importorskip(library)
    model = AutoModelForCausalLM.from_pretrained(
        world / "model", quantization_config=how(), dtype=torch.float32, device_map="cpu"
    )
    ids = torch.randint(1, 90, (1, 60))
    model.set_attn_implementation("eager")
    expected = model(input_ids=ids).logits[:, -1]
    adapter.install(model)
    found = adapter.forward(model, PrefillCache(adapter.contexts(model)), ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
