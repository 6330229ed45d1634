"""Attention mass of a prompt: how much probability each key has received from all queries, as H2O counts it."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsuite.kernels.attention import causal_blocks, pack_sinks, probabilities


def column_mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    block: int = 64,
) -> Tensor:
    """Column sums of the causal attention matrix, mean over the query group, without holding the matrix.

    Args: q (heads, T, head_dim); k (kv_heads, T, head_dim); sink_logits (heads,).
    Returns: float32 (kv_heads, T); without sinks each row sums to T.
    Source: H2O (Zhang et al. 2023), section 4; the sum over queries, not their mean.
    """
    heads, length, dim = q.shape
    kv_heads, group = k.shape[0], heads // k.shape[0]
    mass = torch.zeros(kv_heads, length, device=q.device)
    k = k.float()
    for first, last, lowest, mask in causal_blocks(length, window, block, q.device):
        rows = q[:, first:last].reshape(kv_heads, group * (last - first), dim)
        aux = None if sink_logits is None else pack_sinks(sink_logits, kv_heads, last - first)
        p = probabilities(rows, k[:, lowest:last], scale, mask.repeat(group, 1), softcap, aux)
        mass[:, lowest:last] += p.sum(dim=1)
    return mass / group
