"""Reference attention of a few queries over one sequence's cache, and over itself while it is prefilled."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kvsuite.kernels.context import AttentionParams


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Softmax attention with the query group packed as rows, so that K and V are read once per kv head.

    Args:
        q: (kv_heads, group * queries, head_dim); k, v: (kv_heads, T, head_dim), the dtype of q.
        mask: bool, broadcastable to (kv_heads, group * queries, T); True may be read.
        softcap: Gemma 2's cap * tanh(score / cap), before the mask.
        sink_logits: (kv_heads, group * queries), GPT-OSS's extra logit in the denominator (``s_aux``).

    Returns: (kv_heads, group * queries, head_dim) in q's dtype; scores and sums are kept in float32.
    """
    if softcap is None and sink_logits is None:
        return scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, scale=scale)[0]
    p = probabilities(q, k, scale, mask, softcap, sink_logits)
    return (p @ v.float()).to(q.dtype)


def probabilities(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    buffer: Tensor | None = None,
) -> Tensor:
    """The weights `attention` applies to V, float32 (kv_heads, group * queries, T). Arguments as there, but the mask
    may cover the last keys only; those before it may all be read. ``buffer``: float32 memory for the result, at least
    as large, which saves a large allocation and its page faults at every call."""
    q, k = q.float() * scale, k.float().transpose(-1, -2)
    shape = (*q.shape[:-1], k.shape[-1])
    scores = q.new_empty(shape) if buffer is None else buffer[: math.prod(shape)].view(shape)
    torch.bmm(q, k, out=scores)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores[..., scores.shape[-1] - mask.shape[-1] :].masked_fill_(~mask, float("-inf"))
    if sink_logits is None:
        return torch.softmax(scores, dim=-1, out=scores)
    with_sink = torch.cat([scores, sink_logits.float().unsqueeze(-1)], dim=-1)
    return torch.softmax(with_sink, dim=-1)[..., :-1]


def causal_mask(queries: Tensor, keys: Tensor, window: int | None = None) -> Tensor:
    """Which keys a query may read: not later than itself, not empty (position -1), and inside a sliding window.

    Args: queries (Q,) and keys (..., T) are token positions. Returns bool (..., Q, T).
    """
    delta = queries.unsqueeze(-1) - keys.unsqueeze(-2)
    allowed = (delta >= 0) & (keys >= 0).unsqueeze(-2)
    return allowed if window is None else allowed & (delta < window)


def causal_self_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    block: int = 512,
) -> Tensor:
    """A prompt's attention over itself, full precision.

    The plain case is the very call transformers' ``sdpa`` makes, so that what later layers store is bit for bit what
    its own cache would hold. The others go in blocks of queries, so that no (T, T) score matrix is ever held.

    Args: q (heads, T, head_dim); k, v (kv_heads, T, head_dim); sink_logits (heads,). Returns (heads, T, head_dim).
    """
    heads, length, dim = q.shape
    kv_heads = k.shape[0]
    if softcap is None and sink_logits is None and (window is None or length <= window):
        grouped = heads != kv_heads
        return scaled_dot_product_attention(
            q[None], k[None], v[None], is_causal=length > 1, scale=scale, enable_gqa=grouped
        )[0]
    group = heads // kv_heads
    out = torch.empty_like(q)
    for first, last, lowest, mask in causal_blocks(length, window, block, q.device):
        rows = q[:, first:last].reshape(kv_heads, group * (last - first), dim)
        aux = None if sink_logits is None else pack_sinks(sink_logits, kv_heads, last - first)
        part = attention(rows, k[:, lowest:last], v[:, lowest:last], scale, mask.repeat(group, 1), softcap, aux)
        out[:, first:last] = part.view(heads, last - first, dim)
    return out


def causal_blocks(
    length: int, window: int | None, block: int, device: torch.device
) -> Iterator[tuple[int, int, int, Tensor]]:
    """Blocks of queries over a prompt: first query, after the last, lowest key, and the mask, bool (queries, keys), of
    the last keys: the block's own without a window, else all from the lowest."""
    for first in range(0, length, block):
        last = min(first + block, length)
        lowest = 0 if window is None else max(0, first - window + 1)
        queries = torch.arange(first, last, device=device)
        keys = queries if window is None else torch.arange(lowest, last, device=device)
        yield first, last, lowest, causal_mask(queries, keys, window)


def pack_sinks(sink_logits: Tensor, kv_heads: int, queries: int) -> Tensor:
    """(heads,) -> (kv_heads, group * queries), the row order of a packed query group."""
    return sink_logits.view(kv_heads, -1, 1).expand(-1, -1, queries).reshape(kv_heads, -1)


def last_query_weights(q: Tensor, k: Tensor, params: AttentionParams) -> Iterator[Tensor]:
    """The attention of a prompt's last queries, one kv head at a time: q (heads, W, head_dim) and k (kv_heads, T,
    head_dim) to kv_heads times float32 (group, W, T)."""
    kv_heads, length = k.shape[:2]
    heads, queries = q.shape[:2]
    keys = torch.arange(length, device=k.device)
    mask = causal_mask(keys[-queries:], keys, params.window).repeat(heads // kv_heads, 1)
    sinks = None if params.sink_logits is None else pack_sinks(params.sink_logits, kv_heads, queries)
    for head, rows in enumerate(q.reshape(kv_heads, -1, q.shape[2])):
        aux = None if sinks is None else sinks[head][None]
        p = probabilities(rows[None], k[head][None], params.scale, mask, params.softcap, aux)
        yield p[0].view(-1, queries, length)
