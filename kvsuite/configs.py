"""What a model's ``config.json`` alone decides: read without importing torch or transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kvsuite.errors import UsageError

KNOWN_LAYERS = {"attention", "full_attention", "sliding_attention"}
RECURRENT = ("mamba_", "ssm_", "rwkv_")
"""What the sizes of layers with a state begin with."""
MOVING = {"dynamic", "longrope"}
"""RoPE whose frequencies follow the longest sequence of the batch, so that a row would depend on its mates."""


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of a model's text decoder: all of it, unless the model reads images or sound, too."""
    own = config.get("text_config")
    return own if isinstance(own, Mapping) else config


def refuse(config: Mapping[str, Any]) -> None:
    """UsageError, one sentence, for a model whose cache would be misread."""
    own = text_part(config)
    kind = f"model type {own.get('model_type') or config.get('model_type')!r}"
    if config.get("is_encoder_decoder") or own.get("is_encoder_decoder"):
        raise UsageError(f"{kind} is an encoder-decoder; kvsuite compresses decoder-only models")
    if own.get("kv_lora_rank"):
        raise UsageError(f"{kind} caches latent vectors (latent attention), not K and V per head")
    if own.get("num_kv_shared_layers"):
        raise UsageError(f"{kind} has layers that read another layer's K and V, which no method can compress by itself")
    if own.get("cross_attention_layers"):
        raise UsageError(f"{kind} has layers that attend to images, which kvsuite does not give it")
    types = own.get("layer_types")
    if not types and any(str(name).startswith(RECURRENT) for name in own):
        raise UsageError(f"{kind} has recurrent layers, whose state is no K and V")
    strange = sorted({str(x) for x in types} - KNOWN_LAYERS) if isinstance(types, list) else []
    if strange:
        raise UsageError(f"{kind} has layers kvsuite does not understand: {', '.join(strange)}")
    for moving in sorted(MOVING.intersection(_rope_types(own))):
        raise UsageError(f"{kind} uses {moving!r} RoPE, whose keys change with the length of the batch")


def _rope_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Of the whole model or of its kinds of layers; older files have them under ``rope_scaling``."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = config.get(name)
        if isinstance(rope, Mapping):
            for part in (rope, *rope.values()):
                if isinstance(part, Mapping):
                    yield str(part.get("rope_type") or part.get("type") or "")
