"""Decode attention over a paged, compressed cache in PyTorch: what every other backend must agree with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvsuite.kernels.context import AttentionParams, HeadView
from kvsuite.kernels.paged import NULL_PAGE, KVStore, PagedKV
from kvsuite.kernels.quantspec import PAGE
from kvsuite.kernels.reference.attention import attention, causal_mask, pack_sinks, probabilities

PageIndices = Sequence[Sequence[np.ndarray] | None]
"""The columns of the page table to be read, ascending: for each item of a batch, for each kv head, (n,); or None for an
idle item."""


def attend(
    kv: PagedKV, q: Tensor, rows: Sequence[int | None], params: AttentionParams, pages: PageIndices | None = None
) -> Tensor:
    """Attention of the newest Q tokens of every row over what it holds, causal among the Q.

    Args: q (len(rows), heads, Q, head_dim), rotated. ``pages``: a reader's choice; None for all.
    Returns: q's shape and dtype; idle rows are zero. Where the cache keeps attention, Q must be 1, and the mean over
        the query group of each token's probability is added to it.
    """
    queries, heads = q.shape[2], kv.layer.kv_heads
    if queries > 1 and (kv.accumulated_attention is not None or kv.newest_attention is not None):
        raise ValueError("attention is accumulated query by query")
    packed = q.reshape(q.shape[0], heads, -1, q.shape[3])  # the query group as rows
    out = torch.zeros_like(packed) if None in rows else torch.empty_like(packed)
    sinks = None if params.sink_logits is None else pack_sinks(params.sink_logits, heads, queries)
    for b, row in enumerate(rows):
        if row is None:
            continue
        rotate_sinks(kv, row)
        for span, used in kv.spans(row):
            logits = None if sinks is None else sinks[span]
            if pages is None:
                out[b, span] = _attend(kv, row, span, used, packed[b, span], queries, params, logits)
                continue
            for head in range(span.start, span.stop):
                own, chosen = slice(head, head + 1), pages[b][head]  # type: ignore[index]
                aux = None if sinks is None else sinks[own]
                out[b, own] = _attend(kv, row, own, used, packed[b, own], queries, params, aux, chosen)
    return out.view(q.shape)


def read(kv: PagedKV, row: int) -> list[HeadView]:
    """What each kv head of a row holds, as `attend` sees it, in order of position: the checker's oracle."""
    views = []
    rotate_sinks(kv, row)
    for span, used in kv.spans(row):
        held = load(kv, row, span, used, None)
        slots = torch.arange(used, device=held.k.device) if held.slots is None else held.slots
        positions = slots.int()[None] if held.positions is None else held.positions
        for h, own in enumerate(positions.expand(held.k.shape[0], -1)):
            order = own.argsort()
            order = order[own[order] >= 0]
            views.append(HeadView(held.k[h, order], held.v[h, order], own[order].clone(), slots[order]))
    return views


def page_keys(kv: PagedKV, row: int, head: int, columns: np.ndarray) -> tuple[Tensor, Tensor]:
    """The keys of some pages, (columns, PAGE, head_dim) in the compute dtype, and which of their slots hold a token."""
    k, slots = _gathered(kv, kv.k, row, slice(head, head + 1), int(kv.host.slots[row, head]), columns)
    positions = _positions(kv, row, slice(head, head + 1), columns, slots)
    return k[0].view(-1, PAGE, k.shape[2]), (positions[0] >= 0).view(-1, PAGE)


@dataclass(frozen=True)
class Loaded:
    """k, v (heads, n, head_dim); positions int32 (heads or 1, n), -1 for an empty slot, None where slots are positions;
    slots (n,). ``places``: where they lie in a pool of single tokens, (heads, n), None where heads are
    `PagedKV.consecutive`."""

    k: Tensor
    v: Tensor
    positions: Tensor | None
    slots: Tensor | None
    places: Tensor | None


def _attend(
    kv: PagedKV,
    row: int,
    heads: slice,
    used: int,
    q: Tensor,
    queries: int,
    params: AttentionParams,
    sink_logits: Tensor | None,
    columns: np.ndarray | None = None,
) -> Tensor:
    """q (heads, group * queries, head_dim) of one row -> the same shape."""
    held = load(kv, row, heads, used, columns)
    mask = readable(kv, row, heads, held, queries, params.window)
    if mask is not None:
        mask = mask.repeat(1, q.shape[1] // queries, 1)
    if kv.accumulated_attention is None and kv.newest_attention is None:
        return attention(q, held.k, held.v, params.scale, mask, params.softcap, sink_logits)
    p = probabilities(q, held.k, params.scale, mask, params.softcap, sink_logits)
    note(kv, row, heads, used, held, p.mean(dim=1))
    return torch.matmul(p, held.v.float()).to(q.dtype)


def note(kv: PagedKV, row: int, heads: slice, used: int, held: Loaded, mean: Tensor) -> None:
    """Keep the attention that some heads' tokens got from the newest query, (heads, n), in the fields that want it."""
    for name, adds in (("accumulated_attention", True), ("newest_attention", False)):
        field: Tensor | None = getattr(kv, name)
        if field is None:
            continue
        if held.places is None:
            own = getattr(kv.views(row, heads), name)[:, :used]
            own.add_(mean) if adds else own.copy_(mean)
        else:
            if not adds:  # what was not read got nothing
                field[kv.pages(row, heads, slice(None))] = 0
            field.view(-1).index_put_((held.places,), mean, accumulate=adds)


def load(kv: PagedKV, row: int, heads: slice, used: int, columns: np.ndarray | None) -> Loaded:
    """What attention sees of some heads: all their slots, or those of some pages."""
    if columns is None and kv.consecutive(row, heads):
        views = kv.views(row, heads)
        k = _in_place(kv, kv.k, views.k, row, heads, used)
        v = _in_place(kv, kv.v, views.v, row, heads, used)
        _turn_sinks(kv, row, heads, k)
        positions = None if views.positions is None else views.positions[:, :used]
        return Loaded(k, v, positions, None, None)
    if columns is None:
        columns = np.arange(-(-used // PAGE))
        if kv.needs.positions:
            columns = columns[kv.table[row, heads.start, columns] != NULL_PAGE]
    k, slots = _gathered(kv, kv.k, row, heads, used, columns)
    v, _ = _gathered(kv, kv.v, row, heads, used, columns)
    positions = _positions(kv, row, heads, columns, slots)
    of = np.arange(heads.start, heads.stop)[:, None]
    places = kv.places(row, of, _slots(columns)[None])
    if len(columns) and columns[0] == 0:
        _turn_sinks(kv, row, heads, k)
    return Loaded(k, v, positions, slots, places)


def _in_place(kv: PagedKV, store: KVStore, pools: tuple[Tensor, ...], row: int, heads: slice, used: int) -> Tensor:
    """(heads, used, head_dim) of consecutive pages, in the compute dtype: a view where that is what is stored."""
    spec, done = store.spec, store.spec.num_encoded(used)
    fields = tuple([pool[:, : done // spec.block] for pool in pools])
    fitted = tuple([x[row, heads] for x in store.fitted])
    pages = spec.decode(fields, kv.layer.dtype, fitted).flatten(1, 2)
    if done == used:
        return pages
    ring = torch.arange(done, used, device=pages.device) % spec.residual
    recent = store.residual[row, heads].index_select(1, ring)
    return torch.cat([pages, recent.to(kv.layer.dtype)], dim=1)


def _gathered(
    kv: PagedKV, store: KVStore, row: int, heads: slice, used: int, columns: np.ndarray
) -> tuple[Tensor, Tensor]:
    """(heads, columns * PAGE, head_dim) of some pages, in the compute dtype, and their slots (columns * PAGE,). Slots
    that are not in use are 0."""
    spec, device = store.spec, store.residual.device
    slots, done = _slots(columns), spec.num_encoded(used)
    at = torch.from_numpy(slots).to(device)
    encoded = columns[columns * PAGE < done]  # ascending, so these come first
    pages = kv.pages(row, heads, encoded)
    units = int((slots < done).sum()) // spec.block  # what was never written may be no code at all
    fields = tuple([pool[pages].flatten(1, 2)[:, :units] for pool in store.pools])
    fitted = tuple([x[row, heads] for x in store.fitted])
    x = spec.decode(fields, kv.layer.dtype, fitted).flatten(1, 2)
    x = torch.nn.functional.pad(x, (0, 0, 0, len(slots) - x.shape[1]))
    recent = (at >= done) & (at < used)
    if spec.residual:
        ring = store.residual[row, heads].index_select(1, at % spec.residual).to(kv.layer.dtype)
        x = torch.where(recent[:, None], ring, x)
    return torch.where((at < used)[:, None], x, torch.zeros((), dtype=x.dtype, device=device)), at


def _slots(columns: np.ndarray) -> np.ndarray:
    """The slots of some pages, int64 (columns * PAGE,)."""
    return (columns[:, None] * PAGE + np.arange(PAGE)).ravel()


def _positions(kv: PagedKV, row: int, heads: slice, columns: np.ndarray, slots: Tensor) -> Tensor:
    """int32 (heads or 1, slots) of some pages; -1 where a slot holds no token."""
    if kv.positions is None:
        return torch.where(slots < int(kv.host.slots[row, heads.start]), slots, -1).int()[None]
    return kv.positions[kv.pages(row, heads, columns)].flatten(1, 2)


def readable(kv: PagedKV, row: int, heads: slice, held: Loaded, queries: int, window: int | None) -> Tensor | None:
    """bool (heads or 1, queries, n), or None where everything may be read."""
    seen, tokens = int(kv.host.seen[row]), int(kv.host.tokens[row, heads.start])
    if queries == 1 and held.places is None and tokens == held.k.shape[1] and (window is None or seen <= window):
        return None
    newest = torch.arange(seen - queries, seen, dtype=torch.int32, device=held.k.device)
    slots = torch.arange(held.k.shape[1], device=newest.device) if held.slots is None else held.slots
    return causal_mask(newest, slots[None] if held.positions is None else held.positions, window)


def rotate_sinks(kv: PagedKV, row: int) -> None:
    """Let the first tokens' keys stand where the cache has them, in their pages: turned on from the originals by as
    many positions as were evicted behind them, never from an already turned copy."""
    if kv.original_sinks is None or kv.layer.rope is None:
        return
    gap = kv.host.seen[row] - kv.host.tokens[row]
    heads = np.flatnonzero(gap)
    if heads.size:
        sinks = np.arange(kv.original_sinks.shape[2])[None]
        here = kv.places(row, heads[:, None], sinks)
        by = torch.from_numpy(gap[heads]).to(here.device)[:, None, None]
        originals = kv.original_sinks[row][torch.from_numpy(heads).to(here.device)]
        kv.k.pools[0].flatten(0, 1)[here] = kv.layer.rope.rotate(originals, by)


def _turn_sinks(kv: PagedKV, row: int, heads: slice, k: Tensor) -> None:
    """The same where pages hold the sinks encoded, so that k (heads, n, head_dim) is a copy of its own."""
    sinks, gap = kv.needs.rerotated_sinks, int(kv.host.seen[row] - kv.host.tokens[row, heads.start])
    if sinks and gap > 0 and kv.original_sinks is None and kv.layer.rope is not None:
        k[:, :sinks] = kv.layer.rope.rotate(k[:, :sinks], gap)
