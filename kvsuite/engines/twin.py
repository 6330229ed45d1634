"""A model's twin: its configuration shrunk, with random weights. On it our attention is held against transformers' own
before the model is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvsuite.cache import adapter
from kvsuite.cache.adapter import KVCache, Member
from kvsuite.cache.prefill import PrefillCache
from kvsuite.engines.pretrained import auto_class, quiet
from kvsuite.errors import UsageError, first_line
from kvsuite.kernels.context import LayerContext
from kvsuite.methods import parse

PROMPT, TOKENS = 25, 40
"""Tokens that are prefilled, and after the last one that is decoded: several windows."""
WINDOW, VOCABULARY, SMALL, HEADS, EXPERTS = 8, 128, 64, 4, 4
"""Sizes of a twin. Its heads have as many channels as the model's, since rotations depend on that."""
OF_A_KIND, MOST = 2, 8
"""Layers of each kind, and in all."""
FAR = 1e-3
"""Logits further from eager's than this much of their spread come of another computation, not of another rounding."""


def check(config: Any) -> list[LayerContext]:
    """UsageError, one sentence, where a model of this configuration does not compute on our caches what it computes by
    itself. Takes a fraction of a second. Returns the twin's layers, which have its windows and rotations."""
    kind = f"model type {config.model_type!r}"
    made = auto_class(config)
    with torch.random.fork_rng(devices=[]), torch.inference_mode(), quiet():
        torch.manual_seed(0)
        try:
            model = made.from_config(shrunken(config), dtype=torch.float32).eval()
            for parameter in model.get_decoder().parameters():
                if parameter.is_floating_point():  # norms and sinks begin as constants, which would hide a difference
                    parameter.normal_(std=0.5 if parameter.dim() < 2 else 1.5 / math.sqrt(parameter.shape[-1]))
            ids = torch.randint(SMALL, VOCABULARY, (1, TOKENS))
            model.set_attn_implementation("eager")
            expected = model(input_ids=ids, use_cache=False).logits
        except Exception as error:  # whatever a model does with sizes that nobody has tried
            raise UsageError(f"{kind} cannot be checked on a small copy: {first_line(error)}") from error
        adapter.install(model)
        layers = adapter.contexts(model)
        try:
            found = _logits(model, layers, ids)
        except Exception as error:
            raise UsageError(f"{kind} cannot be run on kvsuite's cache: {first_line(error)}") from error
        off = float((found - expected).abs().max() / expected.std())
        if not off < FAR:
            raise UsageError(
                f"{kind} computes something else on kvsuite's cache than by itself: the logits of a small copy are off "
                f"by {off:.2g} of their spread"
            )
    return layers


def _logits(model: Any, layers: list[LayerContext], ids: Tensor) -> Tensor:
    """Of a prefilled prompt and of tokens that are decoded one by one, (1, TOKENS, vocabulary)."""
    name, method = adapter.cache_argument(type(model).forward), parse("full")
    prefilled = PrefillCache(layers)
    found = [model(input_ids=ids[:, :PROMPT], use_cache=True, **{name: prefilled}).logits]
    caches = [method.cache(layer, 1, TOKENS, backend="reference") for layer in layers]
    method.compress(0, prefilled.prefilled, caches)
    cache = KVCache(Member(caches))
    for at in range(PROMPT, TOKENS):
        where = torch.tensor([[at]])
        found.append(model(input_ids=ids[:, at : at + 1], position_ids=where, use_cache=True, **{name: cache}).logits)
    return torch.cat(found, dim=1)


def shrunken(config: Any) -> Any:
    """A small configuration of the same kind: few layers of each kind, few heads, a short window, the same head_dim."""
    own = config.get_text_config()
    values = config.to_dict()
    text = next((key for key in config.sub_configs if getattr(config, key, None) is own), None)
    for key, value in values.items():
        if isinstance(value, dict) and key in config.sub_configs and key != text:
            values[key] = {k: 1 if k in DEPTHS and isinstance(v, int) else v for k, v in value.items()}
    small = _small(own, values if text is None else values[text])
    values = small if text is None else _without_ids(values) | {text: small}
    return type(config).from_dict(values)


DEPTHS = {"num_hidden_layers", "depth", "num_layers", "n_layers", "encoder_layers", "num_blocks"}
"""Names of how many layers a part has that reads images or sound. It is built, and never run."""


def _without_ids(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _id(v) if k.endswith(("token_id", "token_index")) else v for k, v in values.items()}


def _id(value: Any) -> Any:
    """A special token that a small vocabulary has."""
    return min(value, 1) if isinstance(value, int) else value and 1


def _small(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    names = getattr(config, "attribute_map", {})
    main = [names.get(name, name) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")]
    if not all(isinstance(values.get(name), int) for name in main):
        raise ValueError(f"its configuration has no {', '.join(main)}")
    count, hidden, heads = (values[name] for name in main)
    per_layer, kept = _per_layer(values, count), _kept(values, count)
    each, few = values.get("head_dim") or hidden // heads, min(HEADS, heads)
    acting = values.get(names.get("max_position_embeddings", "max_position_embeddings")) or math.inf

    def size(key: str, value: Any) -> Any:
        if isinstance(value, list) and key in per_layer:
            return [size(key, value[i]) for i in kept]
        if key == "per_layer_config" and isinstance(value, dict):
            own = {int(i): {k: size(k, v) for k, v in part.items()} for i, part in value.items()}
            return {new: own[old] for new, old in enumerate(kept) if old in own}
        if key.endswith(("token_id", "token_index")):
            return _id(value)
        if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
            return value
        if key == names.get("num_hidden_layers", "num_hidden_layers"):
            return len(kept)
        if key.startswith("vocab_size"):
            return VOCABULARY
        if key.endswith(("heads", "n_head")):
            return few if value == heads else min(value, max(1, few // 2))
        if "window" in key or key == "attention_chunk_size":
            return min(value, WINDOW) if value < acting and "layers" not in key else value
        if "n_group" in key or "topk_group" in key:
            return 1
        if "per_tok" in key or "top_k" in key or "topk" in key or key == "moe_k":
            return min(value, EXPERTS // 2)
        if "intermediate" in key or "ffn" in key or key == "n_inner":
            return SMALL
        if "expert" in key and "size" not in key:
            return min(value, EXPERTS)
        if key in ("first_k_dense_replace", "num_dense_layers"):
            return min(value, 1)
        if "nextn" in key or "mtp" in key:
            return 0
        return few * each if value == hidden else value

    small = {key: size(key, value) for key, value in values.items() if key != "quantization_config"}
    return small | {"dtype": "float32"}


def _per_layer(values: Mapping[str, Any], count: int) -> list[str]:
    """Names of what a configuration says layer by layer."""
    return [key for key, value in values.items() if isinstance(value, list) and len(value) == count]


def _kept(values: Mapping[str, Any], count: int) -> list[int]:
    """Indices of the first layers of each kind; of the first layers, where all are said to be alike."""
    if count <= HEADS:
        return list(range(count))
    kinds = list(zip(*([str(x) for x in values[key]] for key in _per_layer(values, count)), strict=True))
    kinds = kinds or [()] * count
    kept = [i for i, kind in enumerate(kinds) if kinds[:i].count(kind) < OF_A_KIND]
    return kept[:MOST]
