"""A model of a well-known shape with random weights: as fast as the real one, and of no other use."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from kvsuite.shapes import ShapedModel

LONGEST = 1 << 17
"""Positions that it takes; no weight depends on them."""


def random_model(shaped: ShapedModel, device: str) -> Any:
    """In bfloat16, with the layers that were asked for. Qwen3 normalizes queries and keys, which takes time; all others
    are built as Llama."""
    s = shaped.shape
    kind = transformers.Qwen3Config if shaped.name.startswith("qwen3") else transformers.LlamaConfig
    config = kind(
        vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.intermediate, num_hidden_layers=shaped.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim,
        max_position_embeddings=LONGEST, tie_word_embeddings=False, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
