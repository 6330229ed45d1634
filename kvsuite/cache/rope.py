"""Finding out whether a model's keys can be moved by `Rope.rotate`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from kvsuite.kernels.rope import Rope


def find_rope(model: Any, attention: Any, layer_type: str | None) -> Rope | None:
    """The rotary embedding of one attention module, or None where its keys cannot be moved by `Rope.rotate`.

    Nothing is believed from names: a random key is rotated by the model's own code to two positions, and ours must
    carry the one to the other (so GLM's, Cohere's and GPT-OSS's interleaved layouts are told apart).
    """
    own = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    embedding = getattr(model.get_decoder(), "rotary_emb", None)
    if own is None or embedding is None:
        return None
    prefixed = f"{layer_type}_inv_freq"
    typed = hasattr(embedding, prefixed)
    frequency = getattr(embedding, prefixed if typed else "inv_freq", None)
    if frequency is None:
        return None
    scaling = getattr(embedding, f"{layer_type}_attention_scaling" if typed else "attention_scaling", 1.0)
    rope = Rope(frequency.detach().float(), float(scaling))
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, 1, 1, attention.head_dim, generator=generator).to(frequency.device)

    def at(position: int) -> Tensor:
        ids = torch.tensor([[position]], device=frequency.device)
        cos, sin = embedding(key, ids, layer_type) if typed else embedding(key, ids)
        turned: Tensor = own(key, key, cos, sin)[1]
        return turned

    try:
        moved, wanted = rope.rotate(at(3), 500), at(503)
    except (TypeError, ValueError, RuntimeError):  # another model's signature: not a layout we know
        return None
    return rope if torch.allclose(moved, wanted, atol=1e-3 * float(wanted.abs().max())) else None
