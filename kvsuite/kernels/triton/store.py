"""Writing into a paged, compressed cache in one launch: scales, codes, packing and pages, counters on the device.

Every kernel copies tokens from offsets ``at`` (of their first channels, in ``x_ptr``) to places ``to``. A place numbers
the tokens of a pool: page * PAGE + slot % PAGE; so token ``to`` of a field with n elements per token begins at to * n.
A channel's unit is contiguous and aligned, so this holds there too.

A number must come out as the reference makes it, to the last bit: divisions are IEEE, nowhere does an addition follow a
multiplication of floats that a compiler could contract, and rounding is done on the numbers' bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsuite.kernels.hadamard import hadamard
from kvsuite.kernels.paged import KVStore, PagedKV
from kvsuite.kernels.quantspec import PAGE, QuantSpec
from kvsuite.kernels.reference import store as reference
from kvsuite.kernels.reference.store import KeepIndices, moved
from kvsuite.kernels.triton.launch import launch
from kvsuite.kernels.triton.pages import E2M1, LEVELS, _looked_up, _of_e4m3

EDGES = tl.constexpr(tuple((a + b) / 2 for a, b in pairwise(LEVELS.value)))
E2M1_EDGES = tl.constexpr(tuple((a + b) / 2 for a, b in pairwise(E2M1.value[:8])))
"""Between the numbers of codes."""


def fill(
    kv: PagedKV, row: int, k: Tensor, v: Tensor, keep: KeepIndices | None = None, accumulated: Tensor | None = None
) -> None:
    """As the reference's: gathered, encoded and written in one launch, a program per page and head. The last dimensions
    of k, v and ``accumulated`` are contiguous."""
    heads, length, dim = k.shape
    counts = np.full(heads, length) if keep is None else np.array([len(index) for index in keep])
    kv.admit(row, counts, length)
    k, v = _before(kv.k.spec, k), _before(kv.v.spec, v)
    index = None if keep is None else torch.nn.utils.rnn.pad_sequence(list(keep), batch_first=True)
    n = length if index is None else index.shape[1]
    ragged = None if (counts == n).all() else torch.from_numpy(counts.astype(np.int32)).to(k.device)
    if accumulated is None and kv.accumulated_attention is not None:  # a page may have been another sequence's
        accumulated = torch.zeros((heads, length), device=k.device)
    arguments, constants = _cache(kv)
    arguments |= {"row": row, "length": length, "n": n, "k_ptr": k, "v_ptr": v}
    arguments |= {"k_stride_h": k.stride(0), "k_stride_t": k.stride(1)}
    arguments |= {"v_stride_h": v.stride(0), "v_stride_t": v.stride(1)}
    arguments |= {
        "index_ptr": kv.num_slots if index is None else index,
        "index_stride_h": 0 if index is None else index.stride(0),
        "counts_ptr": kv.num_slots if ragged is None else ragged,
        "from_ptr": kv.num_slots if accumulated is None else accumulated,
        "from_stride_h": 0 if accumulated is None else accumulated.stride(0),
    }
    constants |= {"INDEX": index is not None, "COUNTS": ragged is not None}
    constants["MASS"] = constants["MASS"] and accumulated is not None
    grid = (max(1, triton.cdiv(n, PAGE)), heads)  # an empty prompt's lengths are written too
    launch(_fill, grid, arguments, constants, warps=4 if dim <= 128 else 8)
    reference.keep_sinks(kv, row, np.arange(heads))


def append(kv: PagedKV, k: Tensor, v: Tensor, rows: Sequence[int | None]) -> None:
    """As the reference's. One token in one launch, which takes the evicted slot where there is one and counts on the
    device, and one more per store whose residuals become full; several tokens at once are stored by PyTorch."""
    if k.shape[2] > 1:
        reference.append(kv, k, v, rows)
        for row in kv.mapping.rows:
            kv.upload(row)
        return
    k, v = _before(kv.k.spec, k[:, :, 0]), _before(kv.v.spec, v[:, :, 0])
    arguments, constants = _cache(kv)
    arguments |= {"rows_ptr": kv.rows_on_device(rows), "k_ptr": k, "v_ptr": v}
    arguments |= {"k_stride_b": k.stride(0), "k_stride_h": k.stride(1)}
    arguments |= {"v_stride_b": v.stride(0), "v_stride_h": v.stride(1)}
    launch(_append, (k.shape[0], k.shape[1]), arguments, constants, warps=1)
    if kv.encodes:
        flush(kv, rows)


def flush(kv: PagedKV, rows: Sequence[int | None]) -> None:
    """Encode the residuals that are full, of the stores that are not ``rolling``; one launch each."""
    heads, pages = kv.page_table.shape[1:]
    for store in (kv.k, kv.v):
        r = store.spec.residual
        if store.spec.rolling or r == 0:
            continue
        tokens = PAGE // store.pools[0].shape[1]
        arguments = {"rows_ptr": kv.rows_on_device(rows), "table_ptr": kv.page_table, "num_slots_ptr": kv.num_slots}
        launch(
            _flush,
            (r // tokens, heads, len(rows)),
            {**arguments, "pages": pages, **_arguments("x", store)},
            {"HEADS": heads, "DIM": kv.layer.head_dim, "PAGE": PAGE, "TOKENS": tokens, **_constants("X", store)},
            warps=2,
        )


def evict(kv: PagedKV, rows: Sequence[int | None], slots: Tensor) -> None:
    """As the reference's, on the device alone: nothing is read back, and of all rows nothing depends on the host."""
    assert kv.positions is not None
    assert kv.budget is not None
    at: slice | Tensor = slice(None)
    if list(rows) != list(range(len(kv.host.seen))):
        items = [b for b, row in enumerate(rows) if row is not None]
        at = torch.tensor([rows[b] for b in items], device=slots.device)
        slots = slots if len(items) == len(rows) else slots[items]
    due = kv.num_tokens[at] > kv.budget[at]
    pages = kv.page_table[at].gather(2, (slots // PAGE)[..., None])[..., 0].long()
    places = pages * PAGE + slots % PAGE
    positions = kv.positions.view(-1)  # of empty rows all places are the null page's first: they stay -1
    positions[places] = torch.where(due, -1, positions[places])
    if kv.by_token:
        kv.free_slot[at] = torch.where(due, slots.int(), kv.free_slot[at])
    kv.num_tokens[at] -= due.int()


def _before(spec: QuantSpec, x: Tensor) -> Tensor:
    """What PyTorch does to the numbers before a kernel takes them: it turns them, or moves them as `moved` says."""
    return hadamard(x) if spec.rotation else moved(spec, x)


def _cache(kv: PagedKV) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `append` and `fill` hand over of a cache: arguments and constants."""
    arguments = {
        "table_ptr": kv.page_table,
        "num_slots_ptr": kv.num_slots,
        "num_tokens_ptr": kv.num_tokens,
        "num_seen_ptr": kv.num_seen,
        "free_slot_ptr": kv.free_slot,
        "positions_ptr": kv.num_slots if kv.positions is None else kv.positions,
        "accumulated_ptr": kv.num_slots if kv.accumulated_attention is None else kv.accumulated_attention,
        "pages": kv.page_table.shape[2],
        **_arguments("k", kv.k),
        **_arguments("v", kv.v),
    }
    constants = {
        "HEADS": kv.page_table.shape[1],
        "DIM": kv.layer.head_dim,
        "PAGE": PAGE,
        "POSITIONS": kv.positions is not None,
        "MASS": kv.accumulated_attention is not None,
        **_constants("K", kv.k),
        **_constants("V", kv.v),
    }
    return arguments, constants


def _arguments(name: str, store: KVStore) -> dict[str, Any]:
    """A store's tensors; its layout may have fewer than three fields, which its kernels then leave alone."""
    fields = (*store.pools, *store.pools[:1] * 2)
    return {
        f"{name}_codes_ptr": fields[0],
        f"{name}_scale_ptr": fields[1],
        f"{name}_zero_ptr": fields[2],
        f"{name}_residual_ptr": store.residual,
        f"{name}_fixed": 1.0 if store.spec.scale is None else float(store.spec.scale),
    }


def _constants(name: str, store: KVStore) -> dict[str, Any]:
    spec = store.spec
    return {
        f"{name}_LAYOUT": spec.layout
        + (" by token" if spec.layout == "fp8" and spec.scale is None else "")
        + (" chosen" if spec.chooses else ""),
        f"{name}_BITS": spec.bits,
        f"{name}_GROUP": spec.group,
        f"{name}_R": spec.residual,
        f"{name}_ROLLING": spec.rolling,
    }


@triton.jit(do_not_specialize=["pages"])
def _append(
    rows_ptr, k_ptr, k_stride_b, k_stride_h, v_ptr, v_stride_b, v_stride_h, table_ptr, num_slots_ptr, num_tokens_ptr,
    num_seen_ptr, free_slot_ptr, positions_ptr, accumulated_ptr, pages, k_codes_ptr, k_scale_ptr, k_zero_ptr,
    k_residual_ptr, k_fixed, v_codes_ptr, v_scale_ptr, v_zero_ptr, v_residual_ptr, v_fixed,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, POSITIONS: tl.constexpr, MASS: tl.constexpr,
    K_LAYOUT: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_R: tl.constexpr, K_ROLLING: tl.constexpr,
    V_LAYOUT: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_R: tl.constexpr, V_ROLLING: tl.constexpr,
):  # fmt: skip
    """One token of one head. Grid (B, kv_heads)."""
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + b).to(tl.int64)
    if row < 0:
        return
    own = row * HEADS + head
    used = tl.load(num_slots_ptr + own)
    live = tl.load(num_tokens_ptr + own)
    seen = tl.load(num_seen_ptr + own)
    freed = tl.load(free_slot_ptr + own)
    slot = tl.where(freed >= 0, freed, used)
    table_ptr += own * pages
    _one(
        k_ptr, b * k_stride_b + head * k_stride_h, own, slot, table_ptr, k_codes_ptr, k_scale_ptr, k_zero_ptr,
        k_residual_ptr, k_fixed, DIM, PAGE, K_LAYOUT, K_BITS, K_GROUP, K_R, K_ROLLING,
    )  # fmt: skip
    _one(
        v_ptr, b * v_stride_b + head * v_stride_h, own, slot, table_ptr, v_codes_ptr, v_scale_ptr, v_zero_ptr,
        v_residual_ptr, v_fixed, DIM, PAGE, V_LAYOUT, V_BITS, V_GROUP, V_R, V_ROLLING,
    )  # fmt: skip
    if POSITIONS:
        place = tl.load(table_ptr + slot // PAGE).to(tl.int64) * PAGE + slot % PAGE
        tl.store(positions_ptr + place, seen)
        if MASS:
            tl.store(accumulated_ptr + place, 0.0)
    tl.debug_barrier()  # a thread may be so late that it has yet to read the counters
    tl.store(num_slots_ptr + own, tl.where(freed >= 0, used, used + 1))
    tl.store(num_tokens_ptr + own, live + 1)
    tl.store(num_seen_ptr + own, seen + 1)
    tl.store(free_slot_ptr + own, -1)


@triton.jit
def _one(
    x_ptr, at, own, slot, table_ptr, codes_ptr, scale_ptr, zero_ptr, residual_ptr, fixed,
    DIM: tl.constexpr, PAGE: tl.constexpr, LAYOUT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    R: tl.constexpr, ROLLING: tl.constexpr,
):  # fmt: skip
    """Put the token at ``at`` into ``slot`` of its (row, head), number ``own``."""
    one = tl.arange(0, 1)
    keep = one == 0
    if R == 0:
        to = _place(table_ptr, slot + one, keep, PAGE)
        _put(x_ptr, at + one, keep, to, codes_ptr, scale_ptr, zero_ptr, fixed, 1, DIM, LAYOUT, BITS, GROUP)
    else:
        ring = own * R + slot % R + one
        if ROLLING:
            if slot >= R:
                to = _place(table_ptr, slot - R + one, keep, PAGE)
                _put(
                    residual_ptr, ring * DIM, keep, to, codes_ptr, scale_ptr, zero_ptr, fixed, 1, DIM, LAYOUT, BITS,
                    GROUP,
                )  # fmt: skip
            tl.debug_barrier()  # the old token is read in other layouts than the new one is written in
        _plain(x_ptr, at + one, keep, ring, residual_ptr, DIM)


@triton.jit(do_not_specialize=["pages"])
def _flush(
    rows_ptr, table_ptr, num_slots_ptr, pages, x_codes_ptr, x_scale_ptr, x_zero_ptr, x_residual_ptr, x_fixed,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr, X_LAYOUT: tl.constexpr,
    X_BITS: tl.constexpr, X_GROUP: tl.constexpr, X_R: tl.constexpr, X_ROLLING: tl.constexpr,
):  # fmt: skip
    """One unit of a full residual. Grid (R / TOKENS, kv_heads, B)."""
    row = tl.load(rows_ptr + tl.program_id(2)).to(tl.int64)
    if row < 0:
        return
    own = row * HEADS + tl.program_id(1)
    used = tl.load(num_slots_ptr + own)
    if (used == 0) | (used % X_R != 0):
        return
    i = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    keep = i < X_R
    to = _place(table_ptr + own * pages, used - X_R + i, keep, PAGE)
    at = (own * X_R + i) * DIM
    _put(
        x_residual_ptr, at, keep, to, x_codes_ptr, x_scale_ptr, x_zero_ptr, x_fixed, TOKENS, DIM, X_LAYOUT, X_BITS,
        X_GROUP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["row", "length", "n", "pages", "index_stride_h", "from_stride_h"])
def _fill(
    row, length, n, k_ptr, k_stride_h, k_stride_t, v_ptr, v_stride_h, v_stride_t, index_ptr, index_stride_h,
    counts_ptr, from_ptr, from_stride_h, table_ptr, num_slots_ptr, num_tokens_ptr, num_seen_ptr, free_slot_ptr,
    positions_ptr, accumulated_ptr, pages, k_codes_ptr, k_scale_ptr, k_zero_ptr, k_residual_ptr, k_fixed, v_codes_ptr,
    v_scale_ptr, v_zero_ptr, v_residual_ptr, v_fixed,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, INDEX: tl.constexpr, COUNTS: tl.constexpr,
    POSITIONS: tl.constexpr, MASS: tl.constexpr, K_LAYOUT: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr,
    K_R: tl.constexpr, K_ROLLING: tl.constexpr, V_LAYOUT: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr,
    V_R: tl.constexpr, V_ROLLING: tl.constexpr,
):  # fmt: skip
    """One page of one head. Grid (pages, kv_heads)."""
    head = tl.program_id(1).to(tl.int64)
    own = row.to(tl.int64) * HEADS + head
    count = n
    if COUNTS:
        count = tl.load(counts_ptr + head)
    if tl.program_id(0) == 0:
        tl.store(num_slots_ptr + own, count)
        tl.store(num_tokens_ptr + own, count)
        tl.store(num_seen_ptr + own, length)
        tl.store(free_slot_ptr + own, -1)
    first = tl.program_id(0) * PAGE
    if first >= count:
        return
    slots = first + tl.arange(0, PAGE)
    valid = slots < count
    tokens = slots.to(tl.int64)
    if INDEX:
        tokens = tl.load(index_ptr + head * index_stride_h + tokens, mask=valid, other=0)
    table_ptr += own * pages
    if POSITIONS:
        into = _place(table_ptr, slots, valid, PAGE)
        tl.store(positions_ptr + into, tokens.to(tl.int32), mask=valid)
        if MASS:
            tl.store(accumulated_ptr + into, tl.load(from_ptr + head * from_stride_h + tokens, mask=valid), mask=valid)
    _page(
        k_ptr, head * k_stride_h + tokens * k_stride_t, own, first, count, table_ptr, k_codes_ptr, k_scale_ptr,
        k_zero_ptr, k_residual_ptr, k_fixed, DIM, PAGE, K_LAYOUT, K_BITS, K_GROUP, K_R, K_ROLLING,
    )  # fmt: skip
    _page(
        v_ptr, head * v_stride_h + tokens * v_stride_t, own, first, count, table_ptr, v_codes_ptr, v_scale_ptr,
        v_zero_ptr, v_residual_ptr, v_fixed, DIM, PAGE, V_LAYOUT, V_BITS, V_GROUP, V_R, V_ROLLING,
    )  # fmt: skip


@triton.jit
def _page(
    x_ptr, at, own, first, count, table_ptr, codes_ptr, scale_ptr, zero_ptr, residual_ptr, fixed,
    DIM: tl.constexpr, PAGE: tl.constexpr, LAYOUT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    R: tl.constexpr, ROLLING: tl.constexpr,
):  # fmt: skip
    """Put the tokens at ``at`` into slots ``first`` … of ``count``, pages and residual."""
    slots = first + tl.arange(0, PAGE)
    settled = count
    if R > 0:
        if ROLLING:
            settled = tl.maximum(count - R, 0)
            recent = settled
        else:
            settled = count - count % R
            recent = (count - 1) // R * R
        if first + PAGE > recent:
            _plain(x_ptr, at, (slots >= recent) & (slots < count), own * R + slots % R, residual_ptr, DIM)
    if first < settled:
        keep = slots < settled
        to = _place(table_ptr, slots, keep, PAGE)
        _put(x_ptr, at, keep, to, codes_ptr, scale_ptr, zero_ptr, fixed, PAGE, DIM, LAYOUT, BITS, GROUP)


@triton.jit
def _place(table_ptr, slots, keep, PAGE: tl.constexpr):
    """Where slots (n,) lie in the pools: int64 (n,)."""
    return tl.load(table_ptr + slots // PAGE, mask=keep, other=0).to(tl.int64) * PAGE + slots % PAGE


@triton.jit
def _put(
    x_ptr, at, keep, to, codes_ptr, scale_ptr, zero_ptr, fixed,
    TOKENS: tl.constexpr, DIM: tl.constexpr, LAYOUT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Encode the TOKENS tokens at ``at`` into places ``to``, those that ``keep``; all are (TOKENS,)."""
    if LAYOUT == "plain":
        _plain(x_ptr, at, keep, to, codes_ptr, DIM)
    elif LAYOUT == "token":
        _token(x_ptr, at, keep, to, codes_ptr, scale_ptr, zero_ptr, DIM, BITS, GROUP)
    elif LAYOUT == "symmetric":
        _symmetric(x_ptr, at, keep, to, codes_ptr, scale_ptr, DIM, GROUP)
    elif LAYOUT == "e2m1" or LAYOUT == "e2m1 chosen":
        _e2m1(x_ptr, at, keep, to, codes_ptr, scale_ptr, fixed, DIM, GROUP, LAYOUT == "e2m1 chosen")
    elif LAYOUT == "levels":
        _levels(x_ptr, at, keep, to, codes_ptr, scale_ptr, DIM)
    elif LAYOUT == "channel":
        _channel(x_ptr, at, keep, to, codes_ptr, scale_ptr, zero_ptr, TOKENS, DIM, BITS, GROUP)
    else:
        _fp8(x_ptr, at, keep, to, codes_ptr, scale_ptr, fixed, DIM, LAYOUT == "fp8 by token")


@triton.jit
def _plain(x_ptr, at, keep, to, out_ptr, DIM: tl.constexpr):
    """As they are: pages of this layout, and the residual."""
    channel = tl.arange(0, triton.next_power_of_2(DIM))[None, :]
    mask = keep[:, None] & (channel < DIM)
    tl.store(out_ptr + to[:, None] * DIM + channel, tl.load(x_ptr + at[:, None] + channel, mask=mask), mask=mask)


@triton.constexpr_function
def _common(a, b):
    """Greatest common divisor."""
    while b:
        a, b = b, a % b
    return a


@triton.jit
def _token(
    x_ptr, at, keep, to, codes_ptr, scale_ptr, zero_ptr,
    DIM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Each token by itself. Read twice, in groups for the ranges and in parts for the codes: a group may span parts."""
    GROUPS: tl.constexpr = DIM // GROUP
    PARTS: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = DIM // PARTS
    group = tl.arange(0, triton.next_power_of_2(GROUPS))
    inner = tl.arange(0, triton.next_power_of_2(GROUP))[None, None, :]
    there = keep[:, None] & (group < GROUPS)[None, :]
    x = tl.load(
        x_ptr + at[:, None, None] + group[None, :, None] * GROUP + inner,
        mask=there[:, :, None] & (inner < GROUP),
        other=0.0,
    ).to(tl.float32)
    low, high = x, x
    if inner.shape[2] != GROUP:
        low, high = tl.where(inner < GROUP, x, float("inf")), tl.where(inner < GROUP, x, float("-inf"))
    scale, zero, step, base = _range(tl.min(low, 2), tl.max(high, 2), BITS)
    fields = to[:, None] * GROUPS + group[None, :]
    tl.store(scale_ptr + fields, scale, mask=there)
    tl.store(zero_ptr + fields, zero, mask=there)
    # pieces that lie in one part and one group: what is looked up per piece stays small
    PIECE: tl.constexpr = _common(WIDTH, GROUP)
    PIECES: tl.constexpr = WIDTH // PIECE
    piece = tl.arange(0, triton.next_power_of_2(PIECES))[None, :]
    inner = tl.arange(0, triton.next_power_of_2(PIECE))[None, None, :]
    byte = piece[:, :, None] * PIECE + inner
    mask = keep[:, None, None] & (piece < PIECES)[:, :, None] & (inner < PIECE)
    packed = tl.zeros(mask.shape, tl.int32)
    for part in tl.static_range(PARTS):
        x = tl.load(x_ptr + at[:, None, None] + byte + part * WIDTH, mask=mask, other=0.0).to(tl.float32)
        of_base, of_step = base, step
        if GROUPS > 1:
            which = tl.minimum((piece * PIECE + part * WIDTH) // GROUP, GROUPS - 1)
            which = tl.broadcast_to(which, mask.shape[:2])
            of_base, of_step = tl.gather(base, which, 1), tl.gather(step, which, 1)
        packed |= _codes(x, of_base[:, :, None], of_step[:, :, None], BITS) << (BITS * part)
    tl.store(codes_ptr + to[:, None, None] * WIDTH + byte, packed.to(tl.uint8), mask=mask)


@triton.jit
def _blocks(x_ptr, at, keep, DIM: tl.constexpr, GROUP: tl.constexpr):
    """Tokens' groups of channels, a power of two each: float32 (TOKENS, groups, GROUP), their places from a token's
    first channel on, and which of the groups there are, (TOKENS, groups)."""
    group = tl.arange(0, triton.next_power_of_2(DIM // GROUP))[None, :]
    there = keep[:, None] & (group < DIM // GROUP)
    channel = group[:, :, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    x = tl.load(x_ptr + at[:, None, None] + channel, mask=there[:, :, None], other=0.0).to(tl.float32)
    return x, channel, there


@triton.jit
def _symmetric(x_ptr, at, keep, to, codes_ptr, scale_ptr, DIM: tl.constexpr, GROUP: tl.constexpr):
    """Blocks of a token as int8, halves away from zero, and each one's scale."""
    x, channel, there = _blocks(x_ptr, at, keep, DIM, GROUP)
    largest = tl.max(tl.abs(x), 2)
    scale = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(scale == 0, 1.0, scale))
    inverse = tl.where((scale == 0) | (inverse == float("inf")), 0.0, inverse)
    scaled = x * inverse[:, :, None]
    size = tl.abs(scaled)
    whole = tl.floor(size)
    whole += tl.where(size >= whole + 0.5, 1.0, 0.0)
    codes = tl.where(size == size, tl.where(scaled < 0, -whole, whole), 0.0).to(tl.int8)
    tl.store(codes_ptr + to[:, None, None] * DIM + channel, codes, mask=there[:, :, None])
    group = tl.arange(0, there.shape[1])[None, :]
    tl.store(scale_ptr + to[:, None] * (DIM // GROUP) + group, scale.to(tl.float16), mask=there)


@triton.jit
def _e2m1(
    x_ptr, at, keep, to, codes_ptr, scale_ptr, fixed,
    DIM: tl.constexpr, GROUP: tl.constexpr, CHOOSES: tl.constexpr,
):  # fmt: skip
    """Blocks of a token as E2M1, those of its first half in the low bits, and each one's e4m3 scale."""
    low, channel, there = _blocks(x_ptr, at, keep, DIM // 2, GROUP)
    high, _, _ = _blocks(x_ptr + DIM // 2, at, keep, DIM // 2, GROUP)
    a, first = _floats(low, fixed, CHOOSES)
    b, second = _floats(high, fixed, CHOOSES)
    tl.store(codes_ptr + to[:, None, None] * (DIM // 2) + channel, (a | (b << 4)).to(tl.uint8), mask=there[:, :, None])
    scale_ptr += to[:, None] * (DIM // GROUP) + tl.arange(0, there.shape[1])[None, :]
    tl.store(scale_ptr, first, mask=there)
    tl.store(scale_ptr + DIM // GROUP // 2, second, mask=there)


@triton.jit
def _floats(x, fixed, CHOOSES: tl.constexpr):
    """int32 codes of blocks (T, groups, GROUP) and e4m3 scales (T, groups); which CHOOSES between 4 and 6."""
    codes, scale, error = _floats_to(x, 6.0, fixed)
    if CHOOSES:
        others, other, smaller = _floats_to(x, 4.0, fixed)
        better = smaller < error
        codes, scale = tl.where(better[:, :, None], others, codes), tl.where(better, other, scale)
    return codes, scale


@triton.jit
def _floats_to(x, FULL: tl.constexpr, fixed):
    """Codes, scales and squared errors, float64, of blocks whose largest number becomes FULL."""
    largest = tl.max(tl.abs(x), 2)
    fixed = tl.zeros(largest.shape, tl.float32) + fixed
    scale = _e4m3(tl.div_rn(largest, fixed * FULL))
    step = _of_e4m3(scale).to(tl.float32) * fixed
    y = tl.div_rn(x, tl.broadcast_to(tl.where(step == 0, float("inf"), step)[:, :, None], x.shape))
    size = tl.abs(y)
    codes = (y.to(tl.int32, bitcast=True) >> 28) & 8
    for i in tl.static_range(7):  # on the edges to the even code, so up at every other
        codes += (size > E2M1_EDGES[i]).to(tl.int32) if i % 2 == 0 else (size >= E2M1_EDGES[i]).to(tl.int32)
    # float32 products by way of float64, so that no subtraction is fused with them
    read = (_looked_up(codes, E2M1).to(tl.float64) * step.to(tl.float64)[:, :, None]).to(tl.float32)
    off = (read - x).to(tl.float64)
    return codes, scale, tl.sum(off * off, 2)


@triton.jit
def _levels(x_ptr, at, keep, to, codes_ptr, scale_ptr, DIM: tl.constexpr):
    """Each token by itself: the levels nearest to its numbers over their root mean square, and the scale that brings
    the levels to its norm. Squares are summed in float64."""
    HALF: tl.constexpr = DIM // 2
    byte = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
    mask = keep[:, None] & (byte < HALF)
    x_ptr += at[:, None] + byte
    low = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    size = _root_mean_square(low, high, DIM)
    unit = tl.where(size == 0, 1.0, size)[:, None]
    a, b = _nearest(low, unit), _nearest(high, unit)
    tl.store(codes_ptr + to[:, None] * HALF + byte, (a | (b << 4)).to(tl.uint8), mask=mask)
    a, b = tl.where(mask, _looked_up(a, LEVELS), 0.0), tl.where(mask, _looked_up(b, LEVELS), 0.0)
    scale = tl.div_rn(size, tl.where(keep, _root_mean_square(a, b, DIM), 1.0))
    tl.store(scale_ptr + to, scale.to(tl.float16), mask=keep)


@triton.jit
def _root_mean_square(low, high, DIM: tl.constexpr):
    """Of (TOKENS, DIM / 2) twice: float32 (TOKENS,)."""
    low, high = low.to(tl.float64), high.to(tl.float64)
    return tl.sqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / DIM).to(tl.float32)


@triton.jit
def _nearest(x, unit):
    """int32 codes of the levels nearest to x / unit; what is no number is beyond all."""
    spread = tl.div_rn(x, tl.broadcast_to(unit, x.shape))
    codes = tl.full(x.shape, 15, tl.int32)
    for i in tl.static_range(15):
        codes -= (spread < EDGES[i]).to(tl.int32)
    return codes


@triton.jit
def _channel(
    x_ptr, at, keep, to, codes_ptr, scale_ptr, zero_ptr,
    TOKENS: tl.constexpr, DIM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Units of GROUP tokens, whole or not at all, part by part."""
    UNITS: tl.constexpr = TOKENS // GROUP
    PARTS: tl.constexpr = 8 // BITS
    WIDTH: tl.constexpr = DIM // PARTS
    byte = tl.arange(0, triton.next_power_of_2(WIDTH))[None, :]
    at, to, keep = at.reshape(UNITS, GROUP), to.reshape(UNITS, GROUP), keep.reshape(UNITS, GROUP)
    # a unit's tokens all say the same of it
    fields = tl.max(to // GROUP, 1)[:, None] * DIM + byte
    whole = (tl.max(keep.to(tl.int32), 1) > 0)[:, None] & (byte < WIDTH)
    mask = keep[:, :, None] & (byte < WIDTH)[:, None, :]
    packed = tl.zeros(mask.shape, tl.int32)
    for part in tl.static_range(PARTS):
        x = tl.load(x_ptr + at[:, :, None] + (byte + part * WIDTH)[:, None, :], mask=mask, other=0.0).to(tl.float32)
        scale, zero, step, base = _range(tl.min(x, 1), tl.max(x, 1), BITS)
        tl.store(scale_ptr + fields + part * WIDTH, scale, mask=whole)
        tl.store(zero_ptr + fields + part * WIDTH, zero, mask=whole)
        packed |= _codes(x, base[:, None, :], step[:, None, :], BITS) << (BITS * part)
    tl.store(codes_ptr + to[:, :, None] * WIDTH + byte[:, None, :], packed.to(tl.uint8), mask=mask)


@triton.jit
def _fp8(x_ptr, at, keep, to, codes_ptr, scale_ptr, fixed, DIM: tl.constexpr, BY_TOKEN: tl.constexpr):
    """e4m3 bytes."""
    channel = tl.arange(0, triton.next_power_of_2(DIM))[None, :]
    mask = keep[:, None] & (channel < DIM)
    x = tl.load(x_ptr + at[:, None] + channel, mask=mask, other=0.0).to(tl.float32)
    if BY_TOKEN:
        largest = tl.max(tl.abs(x), 1)
        scale = tl.where(largest > 0, tl.div_rn(largest, tl.full(largest.shape, 448.0, tl.float32)), 1.0)
        tl.store(scale_ptr + to, scale, mask=keep)
        x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    else:
        x = tl.div_rn(x, tl.zeros(x.shape, tl.float32) + fixed)
    tl.store(codes_ptr + to[:, None] * DIM + channel, _e4m3(x), mask=mask)


@triton.jit
def _range(low, high, BITS: tl.constexpr):
    """float16 scale and zero of float32 ranges, and both as the codes are taken against them."""
    zero = _float16(low, False)
    base = zero.to(tl.float32)
    scale = _float16(tl.div_rn(high - base, tl.full(high.shape, (1 << BITS) - 1, tl.float32)), True)
    step = scale.to(tl.float32)
    return scale, zero, tl.where(step > 0, step, 1.0), base


@triton.jit
def _float16(x, UP: tl.constexpr):
    """float32 rounded towards +∞ or -∞: a step on the bits where rounding to nearest went the other way. It never
    crosses zero: what rounds to a zero has that zero's sign."""
    half = x.to(tl.float16)
    bits = half.to(tl.int16, bitcast=True).to(tl.int32)
    nearest = half.to(tl.float32)
    if UP:
        bits = tl.where(nearest < x, tl.where(bits < 0, bits - 1, bits + 1), bits)
    else:
        bits = tl.where(nearest > x, tl.where(bits < 0, bits + 1, bits - 1), bits)
    return bits.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def _codes(x, base, step, BITS: tl.constexpr):
    """int32 codes. Adding 2^23 rounds half to even and leaves the integer in the low bits."""
    exact = tl.div_rn(x - base, tl.broadcast_to(step, x.shape))
    inside = tl.minimum(tl.maximum(exact, 0.0), (1 << BITS) - 1.0)
    return (inside + 8388608.0).to(tl.int32, bitcast=True) & ((1 << BITS) - 1)


@triton.jit
def _e4m3(x):
    """float32 -> e4m3 bytes: to nearest even, saturating, NaN stays. No hardware before sm_89 has this conversion."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    clamped = tl.minimum(size, 0x43E00000)  # 448
    normal = ((clamped + 0x7FFFF + ((clamped >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 steps are 2^-9 wide, like those of the float32 numbers from 2^14 on
    small = (clamped.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(clamped < 0x3C800000, small, normal)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
