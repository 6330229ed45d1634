"""Decode attention over a paged, compressed cache: the reference of `kvsuite.kernels.fused.attend`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsuite.kernels.attention import causal_mask, probabilities
from kvsuite.kernels.paged import PAGE, Format, Paged, Side
from kvsuite.kernels.quantize import from_e4m3, unpack


def attend(
    q: Tensor,
    paged: Paged,
    rows: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attention of the newest Q tokens of every row over what it holds, causal among the Q.

    Args:
        q: (B, heads, Q, head_dim), rotated. rows: int32 (B,), each item's row of the cache, -1 for an idle item.
        window, softcap, sink_logits (heads,): as the model asks, see `attention`.
    Returns: q's shape and dtype; idle items are zero. Where the cache has ``mass``, Q must be 1 and the mean over the
        query group of each key's probability is added to it.
    """
    batch, heads, queries, dim = q.shape
    kv_heads = paged.table.shape[1]
    group = heads // kv_heads
    packed = q.reshape(batch, kv_heads, group * queries, dim)
    out = torch.zeros_like(packed)
    for b, row in enumerate(rows.tolist()):
        for head in range(kv_heads) if row >= 0 else ():
            n, seen = int(paged.used[row, head]), int(paged.seen[row, head])
            k = stored(paged.k, paged.table[row, head], row, head, n)
            v = stored(paged.v, paged.table[row, head], row, head, n)
            slots = torch.arange(n, dtype=torch.int32, device=q.device)
            positions = slots if paged.positions is None else paged.positions[row, head, :n]
            newest = torch.arange(seen - queries, seen, dtype=torch.int32, device=q.device)
            mask = causal_mask(newest, positions, window).repeat(group, 1)[None]
            sinks = None
            if sink_logits is not None:
                sinks = sink_logits.view(kv_heads, group, 1)[head].expand(-1, queries).reshape(1, -1)
            p = probabilities(packed[b, head][None], k[None], scale, mask, softcap, sinks)[0]
            out[b, head] = (p @ v).to(q.dtype)
            if paged.mass is not None:
                if queries > 1:
                    raise ValueError("attention mass is counted query by query")
                paged.mass[row, head, :n] += p.mean(0)
    return out.view(q.shape)


def stored(side: Side, table: Tensor, row: int, head: int, n: int) -> Tensor:
    """Slots 0 … n - 1 of one (row, head) as they read, not rounded: float32 (n, head_dim). ``table``: its pages."""
    done, r = side.settled(n), side.residual.shape[2]
    pages = table[: -(-done // PAGE)].long()
    x = read(side.format, tuple(field[pages] for field in side.fields), side.residual.shape[3])[:done]
    recent = torch.arange(done, n, device=table.device) % max(r, 1)
    return torch.cat([x, side.residual[row, head, recent].float()])


def read(form: Format, fields: tuple[Tensor, ...], head_dim: int) -> Tensor:
    """The fields of some pages as numbers, float32 (pages * PAGE, head_dim)."""
    first = fields[0]
    if form.kind == "plain":
        return first.float().reshape(-1, head_dim)
    if form.kind == "fp8":
        scale = fields[1].reshape(-1, 1) if form.scale is None else form.scale
        return from_e4m3(first.reshape(-1, head_dim), scale, torch.float32)
    codes = unpack(first, form.bits).float()
    scale, zero = (x.float() for x in fields[1:])
    if form.kind == "token":
        codes = codes.reshape(*codes.shape[:-1], head_dim // form.group, form.group)
    return (codes * scale + zero).reshape(-1, head_dim)
