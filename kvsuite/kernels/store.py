"""Writing into a paged, compressed cache: the reference of `kvsuite.kernels.fused.store`."""

from __future__ import annotations

import torch
from torch import Tensor

from kvsuite.kernels.paged import PAGE, Format, Paged, Side
from kvsuite.kernels.quantize import e4m3_scale, pack, quantize, to_e4m3


def append(paged: Paged, k: Tensor, v: Tensor, rows: Tensor) -> None:
    """Add one token to every row: it takes the freed slot where there is one, else the next.

    A side that is not ``rolling`` has its token in the residual only: call `flush` with the same rows afterwards when
    one of them may have filled its residual. The caller has seen to it that there is room.

    Args:
        k, v: (B, kv_heads, head_dim), the model's dtype, last dimension contiguous.
        rows: int32 (B,), each item's row of the cache, -1 for an idle item; no row twice.
    """
    for b, row in enumerate(rows.tolist()):
        for head in range(paged.table.shape[1]) if row >= 0 else ():
            used, freed = int(paged.used[row, head]), int(paged.freed[row, head])
            slot = freed if freed >= 0 else used
            for side, x in ((paged.k, k[b, head]), (paged.v, v[b, head])):
                r = side.residual.shape[2]
                if r == 0:
                    _write(side, paged.table[row, head], slot, x[None])
                    continue
                if side.rolling and slot >= r:
                    _write(side, paged.table[row, head], slot - r, side.residual[row, head, slot % r][None])
                side.residual[row, head, slot % r] = x
            if paged.positions is not None:
                paged.positions[row, head, slot] = paged.seen[row, head]
            if paged.mass is not None:
                paged.mass[row, head, slot] = 0
            if freed < 0:
                paged.used[row, head] += 1
            paged.live[row, head] += 1
            paged.seen[row, head] += 1
            paged.freed[row, head] = -1


def flush(paged: Paged, rows: Tensor) -> None:
    """Encode the residuals that are full, of the sides that are not ``rolling``: those of every (row, head) whose slots
    in use are a multiple of it. Doing it twice changes nothing.

    Args: rows: int32 (B,), as for `append`.
    """
    for row in rows.tolist():
        for head in range(paged.table.shape[1]) if row >= 0 else ():
            used = int(paged.used[row, head])
            for side in (paged.k, paged.v):
                r = side.residual.shape[2]
                if r and not side.rolling and used and used % r == 0:
                    _write(side, paged.table[row, head], used - r, side.residual[row, head])


def fill(
    paged: Paged,
    row: int,
    k: Tensor,
    v: Tensor,
    index: Tensor | None = None,
    counts: Tensor | None = None,
    mass: Tensor | None = None,
) -> None:
    """Put a prefilled prompt, or what is kept of it, into an empty row: a head's j-th token goes to its slot j.

    A full residual that is not ``rolling`` stays where it is although its tokens are in pages too, as after a `flush`.

    Args:
        k, v: (kv_heads, T, head_dim), the model's dtype, last dimension contiguous.
        index: int64 (kv_heads, n), which tokens are kept, ascending in each head; None for all T.
        counts: int32 (kv_heads,), how many of a head's n are valid; None for all of them.
        mass: float32 (kv_heads, T), attention mass so far; None leaves the cache's as it is.
    """
    length = k.shape[1]
    for head in range(k.shape[0]):
        kept = torch.arange(length, device=k.device) if index is None else index[head]
        kept = kept if counts is None else kept[: int(counts[head])]
        count = len(kept)
        for side, x in ((paged.k, k[head, kept]), (paged.v, v[head, kept])):
            done = side.settled(count)
            _write(side, paged.table[row, head], 0, x[:done])
            for slot in range(_recent(side, count), count):
                side.residual[row, head, slot % side.residual.shape[2]] = x[slot]
        if paged.positions is not None:
            paged.positions[row, head, :count] = kept.int()
        if paged.mass is not None and mass is not None:
            paged.mass[row, head, :count] = mass[head, kept]
        paged.used[row, head] = paged.live[row, head] = count
        paged.seen[row, head] = length
        paged.freed[row, head] = -1


def encode(form: Format, x: Tensor) -> tuple[Tensor, ...]:
    """What a unit stores: x (units, tokens in a unit, head_dim) -> the format's fields, each (units, …)."""
    if form.kind == "channel":
        codes, scale, zero = quantize(x, form.bits, dim=-2)
        return pack(codes, form.bits), scale, zero
    x = x[:, 0]
    if form.kind == "token":
        codes, scale, zero = quantize(x.reshape(len(x), -1, form.group), form.bits, dim=-1)
        return pack(codes.flatten(-2), form.bits), scale, zero
    if form.kind == "plain":
        return (x,)
    if form.scale is not None:
        return (to_e4m3(x, form.scale),)
    scale = e4m3_scale(x)
    return to_e4m3(x, scale), scale


def _recent(side: Side, count: int) -> int:
    """The first of ``count`` slots that the residual holds."""
    r = side.residual.shape[2]
    if r == 0 or side.rolling or count == 0:
        return side.settled(count)
    return (count - 1) // r * r


def _write(side: Side, table: Tensor, first: int, x: Tensor) -> None:
    """Encode x (n, head_dim) into the n slots from ``first`` on, whole units; ``table``: the (row, head)'s pages."""
    per_page = side.fields[0].shape[1]
    tokens = PAGE // per_page
    for i in range(len(x) // tokens):
        page, unit = divmod(first // tokens + i, per_page)
        for field, stored in zip(side.fields, encode(side.format, x[None, i * tokens : (i + 1) * tokens]), strict=True):
            field[table[page], unit] = stored[0]
