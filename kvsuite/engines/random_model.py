"""A model of a well-known shape with random weights: as fast as the real one, and of no other use."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from kvsuite.engines import ranks
from kvsuite.engines.pretrained import quiet
from kvsuite.shapes import ShapedModel

SPREAD = 0.02
"""Of transformers' own random weights."""
LONGEST = 1 << 17
"""Positions that it takes; no weight depends on them."""


def configured(shaped: ShapedModel) -> Any:
    """Its configuration. Qwen3 normalizes queries and keys, which takes time; all others are built as Llama."""
    s = shaped.shape
    kind = transformers.Qwen3Config if shaped.name.startswith("qwen3") else transformers.LlamaConfig
    return kind(
        vocab_size=s.vocab, hidden_size=s.hidden, intermediate_size=s.intermediate, num_hidden_layers=shaped.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, head_dim=s.head_dim,
        max_position_embeddings=LONGEST, tie_word_embeddings=False, eos_token_id=None,
    )  # fmt: skip


def random_model(shaped: ShapedModel, device: str) -> Any:
    """In bfloat16, with the layers that were asked for; under torchrun a rank's part of it."""
    torch.manual_seed(0)
    config, made = configured(shaped), transformers.AutoModelForCausalLM
    if ranks.size() == 1:
        with torch.device(device):
            return made.from_config(config, dtype=torch.bfloat16)
    with torch.device("meta"):
        whole = made.from_config(config)
    weights = {name: _random(*weight.shape) for name, weight in whole.state_dict().items()}
    with quiet():
        return type(whole).from_pretrained(
            None, config=config, state_dict=weights, dtype=torch.bfloat16, **ranks.split()
        )


def _random(rows: int, columns: int = 0) -> Tensor:
    """A matrix whose rows are those before it, moved on by one: no rank has memory for a whole model. Or the ones of a
    norm."""
    if not columns:
        return torch.ones(rows)
    return torch.randn(rows + columns - 1).mul(SPREAD).unfold(0, columns, 1)
