"""Writing into a paged, compressed cache in PyTorch. A codec's own ``encode`` says what is stored."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvsuite.kernels.paged import KVStore, PagedKV
from kvsuite.kernels.quantspec import PAGE, QuantSpec

KeepIndices = Sequence[Tensor]
"""Which tokens or slots each kv head keeps: int64 (n,), in order of position; heads may be ragged."""


def fill(
    kv: PagedKV, row: int, k: Tensor, v: Tensor, keep: KeepIndices | None = None, accumulated: Tensor | None = None
) -> None:
    """Put a prefilled prompt, or what is kept of it, into an empty row: a head's j-th token goes to its slot j.

    Args:
        k, v: (kv_heads, T, head_dim), the compute dtype.
        keep: which tokens of each head stay; None for all.
        accumulated: float32 (kv_heads, T), the attention each token got so far.
    Raises ValueError where there is no room.
    """
    heads, length = k.shape[:2]
    counts = np.full(heads, length) if keep is None else np.array([len(index) for index in keep])
    kv.admit(row, counts, length)
    for span, n in kv.spans(row):
        index = None if keep is None else torch.stack(list(keep[span]))
        for store, x in ((kv.k, k[span]), (kv.v, v[span])):
            _extend(kv, store, row, span, 0, x if index is None else _gather(x, index))
        if kv.positions is not None:
            here = _places(kv, row, span, np.arange(n))
            of = torch.arange(length, device=k.device).expand(*here.shape) if index is None else index
            kv.positions.view(-1)[here] = of.int()
            if kv.accumulated_attention is not None:  # a page may have been another sequence's
                so_far = 0.0 if accumulated is None else accumulated[span].gather(1, of)
                kv.accumulated_attention.view(-1)[here] = so_far
    keep_sinks(kv, row, np.arange(heads))


def advance(kv: PagedKV, rows: Sequence[int | None], n: int = 1) -> None:
    """Count n tokens more in every row and allocate their pages, before a step writes them; None: an idle item."""
    kv.advance([row for row in rows if row is not None], n)


def append(kv: PagedKV, k: Tensor, v: Tensor, rows: Sequence[int | None]) -> None:
    """Write the tokens that `PagedKV.advance` counted: k, v (len(rows), kv_heads, n, head_dim); None: an idle item."""
    items = [b for b, row in enumerate(rows) if row is not None]
    if not items:
        return
    n, mapping = k.shape[2], kv.mapping
    if n == 1:
        every = len(items) == len(rows)
        _step(kv, k[:, :, 0] if every else k[items, :, 0], v[:, :, 0] if every else v[items, :, 0])
        return
    for b, row, first in zip(items, mapping.rows, mapping.slots, strict=True):
        for span, used in kv.spans(row):
            start = int(first[span.start])
            for store, x in ((kv.k, k), (kv.v, v)):
                _extend(kv, store, row, span, start, x[b, span])
            if kv.positions is not None:
                seen, here = int(kv.host.seen[row]), _places(kv, row, span, np.arange(start, used))
                newest = torch.arange(seen - n, seen, dtype=torch.int32, device=here.device)
                _mark(kv, here, newest.expand(here.shape))


def compact(kv: PagedKV, row: int, keep: KeepIndices) -> None:
    """Leave only the slots ``keep`` of each kv head. Where tokens are stored singly they move to the front, as they are
    stored, and pages behind them go back; elsewhere the others' slots stay empty, and pages without a token go back."""
    counts = np.array([len(slots) for slots in keep])
    keep_sinks(kv, row, np.flatnonzero(kv.host.tokens[row] == kv.host.seen[row]))
    for head, slots in enumerate(keep):
        kept = slots.cpu().numpy()
        if kv.by_token:
            source, target = kv.places(row, head, kept), kv.places(row, head, np.arange(len(kept)))
            for pool in kv.token_fields:
                flat = pool.flatten(0, 1)
                flat[target] = flat[source]
            dropped = np.arange(len(kept), int(kv.host.slots[row, head]))
        else:
            dropped = np.setdiff1d(np.arange(int(kv.host.slots[row, head])), kept)
        assert kv.positions is not None
        kv.positions.view(-1)[kv.places(row, head, dropped)] = -1
    if kv.by_token:
        kv.shrink(row, counts)
    else:
        kv.host.tokens[row], kv.layout = counts, None
        release_empty(kv, [row])
    kv.upload(row)


def evict(kv: PagedKV, rows: Sequence[int | None], slots: Tensor) -> None:
    """Empty one slot of every (row, kv head) that holds more tokens than its budget: slots int64 (len(rows), kv_heads).
    Where tokens are stored singly the next token takes it. The host's tokens are counted by the caller."""
    assert kv.positions is not None
    at, own = [row for row in rows if row is not None], slots.cpu().numpy()
    own = own[[row is not None for row in rows]]
    due = kv.host.tokens[at] > kv.host.budget[at]
    i, head = np.nonzero(due)
    if not i.size:
        return
    row = np.array(at)[i]
    complete = kv.host.tokens[row, head] == kv.host.seen[row]
    for one in set(row[complete].tolist()):
        keep_sinks(kv, one, head[complete & (row == one)])
    kv.positions.view(-1)[kv.places(row, head, own[i, head])] = -1
    if kv.by_token:
        kv.host.free_slot[row, head] = own[i, head]


def release_empty(kv: PagedKV, rows: Sequence[int]) -> None:
    """Give back the pages that are encoded and hold no token any more; asks the device once."""
    assert kv.positions is not None
    if not (kv.host.tokens[rows] < kv.host.slots[rows]).any():
        return
    empty = (kv.positions < 0).all(1)[kv.pages(list(rows), slice(None), slice(None))].cpu().numpy()
    slots = kv.host.slots[rows]
    whole = np.minimum(kv.k.spec.num_encoded(slots), kv.v.spec.num_encoded(slots)) // PAGE
    empty &= np.arange(empty.shape[2]) < whole[..., None]
    for i, row in enumerate(rows):
        for head in range(empty.shape[1]):
            if empty[i, head].any():
                kv.give_back(row, head, np.flatnonzero(empty[i, head]))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x (heads, T, D) at index (heads, n)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def _places(kv: PagedKV, row: int, heads: slice, slots: np.ndarray) -> Tensor:
    """Where slots (n,) of some heads lie in pools of single tokens, int64 (heads, n)."""
    return kv.places(row, np.arange(heads.start, heads.stop)[:, None], slots[None])


def _mark(kv: PagedKV, here: Tensor, positions: Tensor) -> None:
    """New tokens with these positions are in these places of pools of single tokens, both of one shape."""
    assert kv.positions is not None
    kv.positions.view(-1).index_put_((here,), positions)
    for field in (kv.accumulated_attention, kv.newest_attention):
        if field is not None:
            field.view(-1).index_put_((here,), field.new_zeros(()))


def _extend(kv: PagedKV, store: KVStore, row: int, heads: slice, start: int, x: Tensor) -> None:
    """Store x (heads, n, head_dim) in slots start … start + n - 1, which are the next ones."""
    spec, x = store.spec, x.to(store.residual.dtype)
    end = start + x.shape[1]
    done, target = spec.num_encoded(start), spec.num_encoded(end)
    if target > done:
        ring = torch.arange(done, min(start, target), device=x.device) % max(1, spec.residual)
        old = store.residual[row, heads].index_select(1, ring)
        block = torch.cat([old, x[:, : max(0, target - start)]], dim=1) if len(ring) else x[:, : target - start]
        of = np.arange(heads.start, heads.stop)
        _encode(kv, store, np.full(len(of), row), of, np.full(len(of), done), block)
    stay = max(start, target)
    if stay < end:
        ring = torch.arange(stay, end, device=x.device) % spec.residual
        store.residual[row, heads].index_copy_(1, ring, x[:, stay - start :])


def _step(kv: PagedKV, k: Tensor, v: Tensor) -> None:
    """One token more in each row of the slot mapping: k, v (rows, kv_heads, head_dim). What becomes of a row does not
    depend on the others."""
    rows, slots = kv.mapping.rows, kv.mapping.slots
    row, head, slot = np.repeat(rows, slots.shape[1]), np.tile(np.arange(slots.shape[1]), len(rows)), slots.ravel()
    on_device = torch.from_numpy(np.stack([row, head, slot])).to(k.device)
    for store, new in ((kv.k, k), (kv.v, v)):
        spec, x = store.spec, new.flatten(0, 1).to(store.residual.dtype)
        r = spec.residual
        if r == 0:
            _encode(kv, store, row, head, slot, x[:, None])
            continue
        ring = on_device[0], on_device[1], on_device[2] % r
        if spec.rolling:  # the oldest of the residual moves into its page, the new token takes its place
            leaves = np.flatnonzero(slot >= r)
            if leaves.size:
                who = slice(None) if leaves.size == slot.size else torch.from_numpy(leaves).to(k.device)
                old = store.residual[ring[0][who], ring[1][who], ring[2][who]]
                _encode(kv, store, row[leaves], head[leaves], slot[leaves] - r, old[:, None])
        elif spec.late:
            _encode_residual(kv, store, row, head, slot, on_device)
        store.residual.index_put_(ring, x)
        if not spec.rolling and not spec.late:
            _encode_residual(kv, store, row, head, slot + 1, on_device)
    if kv.positions is not None:
        newest = torch.from_numpy(np.repeat(kv.host.seen[rows] - 1, slots.shape[1])).to(k.device, torch.int32)
        _mark(kv, kv.places(row, head, slot), newest)


def _encode_residual(
    kv: PagedKV, store: KVStore, row: np.ndarray, head: np.ndarray, end: np.ndarray, on_device: Tensor
) -> None:
    """Encode the residual of each (row, kv head) where it holds as much as it can before slot ``end`` (N,); on_device
    (3, N): row and head on the device."""
    r = store.spec.residual
    full = np.flatnonzero((end % r == 0) & (end > 0))
    if full.size:
        at = torch.from_numpy(full).to(on_device.device)
        block = store.residual[on_device[0][at], on_device[1][at]]
        _encode(kv, store, row[full], head[full], end[full] - r, block)


def _encode(kv: PagedKV, store: KVStore, rows: np.ndarray, heads: np.ndarray, first: np.ndarray, x: Tensor) -> None:
    """Write x (N, n, head_dim), whole blocks, into slots first … of N (row, kv head)s; the first three are (N,)."""
    block = store.spec.block
    slots = first[:, None] + np.arange(0, x.shape[1], block)
    units = (kv.places(rows[:, None], heads[:, None], slots) // block).flatten()
    fitted: tuple[Tensor, ...] = ()
    if store.fitted:
        at = torch.from_numpy(rows).to(x.device), torch.from_numpy(heads).to(x.device)
        fitted = tuple([field[at] for field in store.fitted])
    blocks = x.view(len(x), -1, block, x.shape[2])
    for pool, encoded in zip(store.pools, store.spec.encode(blocks, fitted), strict=True):
        pool.flatten(0, 1).index_copy_(0, units, encoded.flatten(0, 1))


def moved(spec: QuantSpec, x: Tensor) -> Tensor:
    """What a plain codec does to the numbers themselves (jitter's noise): x (..., head_dim), in the dtype of pages.
    For backends that write numbers as they are."""
    if spec.layout != "plain" or spec.verbatim:
        return x
    return spec.encode(x.reshape(1, -1, 1, x.shape[-1]), ())[0].view(x.shape)


def keep_sinks(kv: PagedKV, row: int, heads: np.ndarray) -> None:
    """Put the first keys of these heads, int64 (n,), aside where pages are to hold them rotated: while they still are
    as they came, since nothing was evicted behind them."""
    if kv.original_sinks is None:
        return
    for head in heads.tolist():
        sinks = np.arange(min(kv.original_sinks.shape[2], int(kv.host.slots[row, head])))
        here = _places(kv, row, slice(head, head + 1), sinks)[0]
        kv.original_sinks[row, head, : len(sinks)] = kv.k.pools[0].flatten(0, 1)[here]
