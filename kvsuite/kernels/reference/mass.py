"""Attention mass of a prompt: how much probability each key has received from all queries, as H2O counts it, or from
the last ones, as SnapKV does."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsuite.kernels.reference.attention import causal_blocks, pack_sinks, probabilities


def column_mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    last: int | None = None,
    block: int = 64,
) -> Tensor:
    """Column sums of the causal attention matrix, mean over the query group, without holding the matrix.

    Args: q (heads, T, head_dim); k (kv_heads, T, head_dim); sink_logits (heads,); last: how many of the prompt's last
        queries are summed over, None for all T.
    Returns: float32 (kv_heads, T); without sinks each row sums to the number of queries.
    Source: H2O (Zhang et al. 2023), section 4; the sum over queries, not their mean. Over the last queries: SnapKV (Li
        et al. 2024), section 4.
    """
    heads, length, dim = q.shape
    kv_heads, group = k.shape[0], heads // k.shape[0]
    start = 0 if last is None else max(0, length - last)
    mass = torch.zeros(kv_heads, length, device=q.device)
    k = k.float()
    buffer = torch.empty(heads * block * length, device=q.device)
    for first, end, lowest, mask in causal_blocks(length, window, block, q.device):
        if end <= start:
            continue
        counted = max(first, start)
        rows = q[:, counted:end].reshape(kv_heads, group * (end - counted), dim)
        aux = None if sink_logits is None else pack_sinks(sink_logits, kv_heads, end - counted)
        mask = mask[counted - first :].repeat(group, 1)
        p = probabilities(rows, k[:, lowest:end], scale, mask, softcap, aux, buffer)
        mass[:, lowest:end] += p.sum(dim=1)
    return mass / group
