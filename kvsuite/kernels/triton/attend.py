"""Decode attention over a paged, compressed cache, split over the sequence and merged (flash-decoding).

How a row is cut into programs depends on its own length and the batch's width, so what it gets never depends on its
mates, and time follows the tokens kept where heads are ragged. The query group is packed as rows: K and V are read once
per kv head. Pages are read by one body, to which a codec adds how a page becomes numbers; these never reach global
memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsuite.kernels.context import AttentionParams
from kvsuite.kernels.hadamard import hadamard
from kvsuite.kernels.paged import KVStore, PagedKV
from kvsuite.kernels.quantspec import PAGE, QuantSpec
from kvsuite.kernels.reference.attend import PageIndices
from kvsuite.kernels.triton.launch import interpreting, launch
from kvsuite.kernels.triton.pages import _all, _channels, _codes, _e4m3, _numbers, _recent, _where

LOG2E = math.log2(math.e)
ROWS = 16
"""Packed query rows (queries of a group) that a program takes: as many as a tensor instruction. More queries are more
launches, so that what lies between the two kernels does not grow with them."""
SPLITS = 128
"""Parts of a row at most."""


@triton.jit
def _dot(a, b, TYPE: tl.constexpr, WIDEN: tl.constexpr):
    """a @ b with operands rounded to TYPE and sums in float32."""
    a = a.to(TYPE)
    b = b.to(TYPE)
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _scores(
    q, total, codes_ptr, scale_ptr, zero_ptr, at, unit,
    D: tl.constexpr, LAYOUT: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, DP: tl.constexpr,
    WIDEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """q · K of a whole tile, float32 (M, T). A scale that a token has for itself is applied to its score, and zeros add
    up to one number: such keys are not dequantised."""
    inside = at >= 0
    if GROUP == D and LAYOUT != "channel" and LAYOUT != "e2m1":
        codes = _all(_codes(codes_ptr, at, inside, D, LAYOUT, BITS, DP, False), LAYOUT, BITS, WIDEN)
        s = _dot(q, tl.trans(codes), tl.float16, WIDEN) * tl.load(scale_ptr + at).to(tl.float32)[None, :]
        if LAYOUT == "token":
            s += total[:, None] * tl.load(zero_ptr + at).to(tl.float32)[None, :]
    elif LAYOUT == "fp8" and GROUP > 0:
        codes = _e4m3(_codes(codes_ptr, at, inside, D, LAYOUT, BITS, DP, False), WIDEN, NATIVE)
        s = _dot(q, tl.trans(codes), tl.float16, WIDEN) * tl.load(scale_ptr + at)[None, :]
    else:
        k = _numbers(codes_ptr, scale_ptr, zero_ptr, at, unit, inside, unit >= 0, D, LAYOUT, BITS, GROUP, DP, False,
                     WIDEN, NATIVE)  # fmt: skip
        s = _dot(q, tl.trans(k), k.dtype, WIDEN)
    return s


@triton.jit
def _softmax_step(s, m, den):
    """One block of an online softmax in base 2: weights, and the new maximum, sum and factor of what was before."""
    top = tl.maximum(m, tl.max(s, 1))
    safe = tl.where(top == float("-inf"), 0.0, top)
    p = tl.exp2(s - safe[:, None])
    before = tl.exp2(m - safe)
    return p, top, den * before + tl.sum(p, 1), before


@triton.jit
def _share(n, CHUNK: tl.constexpr, SPLITS: tl.constexpr, TILE: tl.constexpr):
    """Tokens that a program takes of a row's n, whole tiles: so many that there are no more than SPLITS parts."""
    return tl.maximum(CHUNK, ((n + SPLITS - 1) // SPLITS + TILE - 1) // TILE * TILE)


@triton.jit(do_not_specialize=["chunks", "pages", "queries", "behind", "window"])
def _attend(
    q_ptr, acc_ptr, m_ptr, den_ptr, weights_ptr, tops_ptr, rows_ptr, table_ptr, num_slots_ptr, num_seen_ptr,
    positions_ptr,
    k_codes_ptr, k_scale_ptr, k_zero_ptr, k_residual_ptr, v_codes_ptr, v_scale_ptr, v_zero_ptr, v_residual_ptr,
    q_batch, q_head, q_query, scale, softcap, window, chunks, pages, slots, queries, behind,
    D: tl.constexpr, H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    K_LAYOUT: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_R: tl.constexpr, K_ROLLING: tl.constexpr,
    K_DP: tl.constexpr,
    V_LAYOUT: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_R: tl.constexpr, V_ROLLING: tl.constexpr,
    V_DP: tl.constexpr,
    POSITIONS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASS: tl.constexpr,
    WIDEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    chunk, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows_ptr + item)
    if row < 0:
        return
    here = row.to(tl.int64) * H + head
    n = tl.load(num_slots_ptr + here)
    share = _share(n, CHUNK, SPLITS, TILE)
    if chunk * share >= n:
        return
    seen = tl.load(num_seen_ptr + here)
    k_done, v_done = n, n
    if K_R > 0:
        k_done = tl.maximum(n - K_R, 0) if K_ROLLING else n - n % K_R
    if V_R > 0:
        v_done = tl.maximum(n - V_R, 0) if V_ROLLING else n - n % V_R
    table_ptr += here * pages
    k_residual_ptr += here * (K_R * D)
    v_residual_ptr += here * (V_R * D)

    r = tl.arange(0, M)
    real_row = r < G * queries
    query = r % queries
    channel, real = _channels(D, K_BITS, K_DP)
    vectors = q_ptr + item * q_batch + (head * G + r // queries)[:, None] * q_head + query[:, None] * q_query
    q = tl.load(vectors + channel[None, :], mask=real_row[:, None] & real[None, :], other=0)
    total = tl.sum(q.to(tl.float32), 1)
    newest = seen - behind - queries + query

    m = tl.full((M,), float("-inf"), tl.float32)
    den = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, V_DP), tl.float32)
    token = tl.arange(0, TILE)
    GROUPED: tl.constexpr = K_GROUP if K_LAYOUT == "channel" else TILE  # tokens encoded together
    group = tl.arange(0, TILE // GROUPED) * GROUPED
    pair = (item * H + head).to(tl.int64) * G
    tiles = (slots + TILE - 1) // TILE
    whole = tl.minimum(k_done, v_done) // TILE
    start = chunk * (share // TILE)
    end = tl.minimum(start + share // TILE, (n + TILE - 1) // TILE)
    if WINDOW and not POSITIONS:
        start = tl.maximum(start, (seen - behind - queries - window + 1) // TILE)
    # tiles that are complete and encoded on both sides: nothing to mask but what the question asks
    for i in range(start, tl.minimum(end, whole)):
        slot = i * TILE + token
        at = _where(table_ptr, slot)
        unit = _where(table_ptr, i * TILE + group) // GROUPED
        s = _scores(
            q, total, k_codes_ptr, k_scale_ptr, k_zero_ptr, at, unit, D, K_LAYOUT, K_BITS, K_GROUP, K_DP, WIDEN, NATIVE
        )
        s = _masked(
            s, positions_ptr, at, slot, newest, scale, softcap, window, n, POSITIONS, CAUSAL, WINDOW, SOFTCAP, False
        )
        p, m, den, before = _softmax_step(s, m, den)
        if MASS:
            tl.store(weights_ptr + (pair + r)[:, None] * slots + slot[None, :], p.to(tl.float16),
                     mask=real_row[:, None])  # fmt: skip
            tl.store(tops_ptr + (pair + r) * tiles + i, m, mask=real_row)
        v = _numbers(v_codes_ptr, v_scale_ptr, v_zero_ptr, at, at, token >= 0, token >= 0, D, V_LAYOUT, V_BITS, V_GROUP,
                     V_DP, False, WIDEN, NATIVE)  # fmt: skip
        acc = acc * before[:, None] + _dot(p, v, v.dtype, WIDEN)
    # the last tile, and what is in full precision on either side
    for i in range(tl.maximum(start, whole), end):
        slot = i * TILE + token
        units = i * TILE + group
        at = _where(table_ptr, tl.minimum(slot, n - 1))
        unit = _where(table_ptr, tl.minimum(units, n - 1)) // GROUPED
        k = _numbers(k_codes_ptr, k_scale_ptr, k_zero_ptr, at, unit, slot < k_done, units < k_done, D, K_LAYOUT, K_BITS,
                     K_GROUP, K_DP, True, WIDEN, NATIVE)  # fmt: skip
        if K_R > 0:
            k = _recent(k, k_residual_ptr, slot, (slot >= k_done) & (slot < n), K_R, D, K_BITS, K_DP)
        s = _dot(q, tl.trans(k), k.dtype, WIDEN)
        s = _masked(
            s, positions_ptr, at, slot, newest, scale, softcap, window, n, POSITIONS, CAUSAL, WINDOW, SOFTCAP, True
        )
        p, m, den, before = _softmax_step(s, m, den)
        if MASS:
            tl.store(weights_ptr + (pair + r)[:, None] * slots + slot[None, :], p.to(tl.float16),
                     mask=real_row[:, None] & (slot < n)[None, :])  # fmt: skip
            tl.store(tops_ptr + (pair + r) * tiles + i, m, mask=real_row)
        v = _numbers(v_codes_ptr, v_scale_ptr, v_zero_ptr, at, at, slot < v_done, slot < v_done, D, V_LAYOUT, V_BITS,
                     V_GROUP, V_DP, True, WIDEN, NATIVE)  # fmt: skip
        if V_R > 0:
            v = _recent(v, v_residual_ptr, slot, (slot >= v_done) & (slot < n), V_R, D, V_BITS, V_DP)
        acc = acc * before[:, None] + _dot(p, v, v.dtype, WIDEN)

    part = ((item * H + head).to(tl.int64) * chunks + chunk) * (G * queries) + r
    tl.store(m_ptr + part, m, mask=real_row)
    tl.store(den_ptr + part, den, mask=real_row)
    channel, real = _channels(D, V_BITS, V_DP)
    tl.store(acc_ptr + part[:, None] * D + channel[None, :], acc, mask=real_row[:, None] & real[None, :])


@triton.jit
def _masked(
    s, positions_ptr, at, slot, newest, scale, softcap, window, n,
    POSITIONS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Raw scores (M, T) to base-2 logits, -inf where a key may not be read."""
    if SOFTCAP:
        s = s * scale
        s = (1.0 - 2.0 / (tl.exp2(s * (2.0 * 1.4426950408889634) / softcap) + 1.0)) * (softcap * 1.4426950408889634)
    else:
        s = s * scale
    position = slot
    if POSITIONS:
        position = tl.load(positions_ptr + at, mask=slot < n, other=-1)
        s = tl.where((position >= 0)[None, :], s, float("-inf"))
    elif LAST:
        s = tl.where((slot < n)[None, :], s, float("-inf"))
    if CAUSAL:
        s = tl.where(position[None, :] <= newest[:, None], s, float("-inf"))
    if WINDOW:
        s = tl.where(position[None, :] > newest[:, None] - window, s, float("-inf"))
    return s


@triton.jit(do_not_specialize=["chunks", "queries", "first", "all_queries"])
def _merge(
    acc_ptr, m_ptr, den_ptr, out_ptr, lse_ptr, rows_ptr, num_slots_ptr, sinks_ptr, v_scale, chunks, queries,
    first, all_queries,
    D: tl.constexpr, DP: tl.constexpr, H: tl.constexpr, G: tl.constexpr, CHUNK: tl.constexpr, SPLITS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, SINKS: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """The parts of one query row together: weights by their maxima, the sink's logit joining the sum only."""
    r, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows_ptr + item)
    channel = tl.arange(0, DP)
    vector = (item * H + head).to(tl.int64) * G + r // queries
    out = (vector * all_queries + first + r % queries) * D + channel
    if row < 0:
        tl.store(out_ptr + out, tl.zeros((DP,), out_ptr.dtype.element_ty), mask=channel < D)
        return
    n = tl.load(num_slots_ptr + row.to(tl.int64) * H + head)
    share = _share(n, CHUNK, SPLITS, TILE)
    count = (n + share - 1) // share
    parts = ((item * H + head).to(tl.int64) * chunks) * (G * queries) + r
    top = tl.full((), float("-inf"), tl.float32)
    den = tl.zeros((), tl.float32)
    if SINKS:
        top = tl.load(sinks_ptr + head * G + r // queries).to(tl.float32) * 1.4426950408889634
        den = den + 1.0
    acc = tl.zeros((DP,), tl.float32)
    for start in range(0, count, BLOCK):
        c = start + tl.arange(0, BLOCK)
        at = parts + c * (G * queries)
        m = tl.load(m_ptr + at, mask=c < count, other=float("-inf"))
        new = tl.maximum(top, tl.max(m, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(m - safe)
        before = tl.exp2(top - safe)
        # a part that may read nothing has a maximum of -inf
        some = m > float("-inf")
        sums = tl.load(den_ptr + at, mask=some, other=0)
        vectors = tl.load(acc_ptr + at[:, None] * D + channel[None, :], mask=some[:, None] & (channel < D)[None, :],
                        other=0)  # fmt: skip
        den = den * before + tl.sum(weight * sums, 0)
        acc = acc * before + tl.sum(weight[:, None] * vectors, 0)
        top = new
    tl.store(out_ptr + out, (acc / den * v_scale).to(out_ptr.dtype.element_ty), mask=channel < D)
    if MASS:
        tl.store(lse_ptr + (item * H + head) * G + r, top + tl.log2(den))


@triton.jit
def _add_mass(
    weights_ptr, tops_ptr, lse_ptr, accumulated_ptr, rows_ptr, table_ptr, num_slots_ptr, pages, slots,
    H: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each key's probability, mean over the group, out of the weights that the first pass left."""
    block, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows_ptr + item)
    if row < 0:
        return
    here = row.to(tl.int64) * H + head
    n = tl.load(num_slots_ptr + here)
    if block * BLOCK >= n:
        return
    page = block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
    token = tl.arange(0, 32)[None, :]
    slot = page[:, None] * 32 + token
    pair = (item * H + head).to(tl.int64) * G
    p = tl.zeros((BLOCK // 32, 32), tl.float32)
    for g in range(G):
        weight = tl.load(weights_ptr + (pair + g) * slots + slot, mask=slot < n, other=0).to(tl.float32)
        top = tl.load(
            tops_ptr + (pair + g) * ((slots + TILE - 1) // TILE) + slot // TILE, mask=slot < n, other=float("-inf")
        )
        p += weight * tl.exp2(top - tl.load(lse_ptr + pair + g))
    place = tl.load(table_ptr + here * pages + page, mask=page * 32 < n, other=0).to(tl.int64) * 32
    at = accumulated_ptr + place[:, None] + token
    tl.store(at, tl.load(at, mask=slot < n) + p / G, mask=slot < n)


def attend(
    kv: PagedKV, q: Tensor, rows: Sequence[int | None], params: AttentionParams, pages: PageIndices | None = None
) -> Tensor:
    """As the reference's, on a GPU: float16 or bfloat16, head_dim up to 256, all pages. Where K is rotated the query is
    turned, in float16, and codes stay as they are; where V is, the output is turned back."""
    if kv.accumulated_attention is not None and q.shape[2] > 1:
        raise ValueError("attention is accumulated query by query")
    if pages is not None:
        raise ValueError("these kernels read all pages")
    if kv.original_sinks is not None:
        _turn_sinks(kv)
    dtype = q.dtype
    if kv.k.spec.rotation:
        q = hadamard(q).half()
    q = q if q.stride(-1) == 1 else q.contiguous()
    out = torch.empty(q.shape, dtype=torch.float32 if kv.v.spec.rotation else dtype, device=q.device)
    each = max(1, ROWS // (q.shape[1] // kv.layer.kv_heads))
    for first in range(0, q.shape[2], each):
        _some(kv, q[:, :, first : first + each], out, first, kv.rows_on_device(rows), params)
    return hadamard(out).to(dtype) if kv.v.spec.rotation else out


def _turn_sinks(kv: PagedKV) -> None:
    """Let the first tokens' keys stand where the cache has them, in their pages. While nothing is missing behind them
    they are as stored, and put aside. Done for all rows, so that a graph replays it."""
    assert kv.original_sinks is not None
    if kv.layer.rope is None:
        return
    gap = (kv.num_seen - kv.num_tokens)[..., None, None]
    pages, count = kv.page_table[:, :, 0].long(), kv.original_sinks.shape[2]
    first = kv.k.pools[0][pages, :count]
    kv.original_sinks.copy_(torch.where(gap > 0, kv.original_sinks, first))
    turned = kv.layer.rope.rotate(kv.original_sinks, gap)
    kv.k.pools[0][pages, :count] = torch.where(gap > 0, turned, first)


def _some(kv: PagedKV, q: Tensor, out: Tensor, first: int, rows: Tensor, params: AttentionParams) -> None:
    """As many queries as one program takes, from ``first`` on, into their places in ``out``."""
    batch, heads, queries, dim = q.shape
    _, kv_heads, pages = kv.page_table.shape
    group, slots, chosen = heads // kv_heads, pages * PAGE, settings(kv, dim)
    chunk = chunk_tokens(batch * kv_heads)
    chunks = min(SPLITS, -(-slots // chunk))
    shape = (batch, kv_heads, chunks, group * queries)
    acc = q.new_empty((*shape, dim), dtype=torch.float32)
    m, den = q.new_empty((2, *shape), dtype=torch.float32)
    weights = tops = lse = m
    mass, window, softcap, sink_logits = kv.accumulated_attention, params.window, params.softcap, params.sink_logits
    if mass is not None:
        weights = q.new_empty((batch, heads, slots), dtype=torch.float16)
        tops = q.new_empty((batch, heads, -(-slots // chosen.tile)), dtype=torch.float32)
        lse = q.new_empty((batch, heads), dtype=torch.float32)
    scale, v_scale = params.scale * (kv.k.spec.scale or 1.0), kv.v.spec.scale or 1.0
    split = {"CHUNK": chunk, "SPLITS": SPLITS, "TILE": chosen.tile}
    launch(
        _attend,
        (chunks, kv_heads, batch),
        {
            "q_ptr": q, "acc_ptr": acc, "m_ptr": m, "den_ptr": den, "weights_ptr": weights, "tops_ptr": tops,
            "rows_ptr": rows, "table_ptr": kv.page_table, "num_slots_ptr": kv.num_slots, "num_seen_ptr": kv.num_seen,
            "positions_ptr": kv.page_table if kv.positions is None else kv.positions,
            **_pointers("k", kv.k), **_pointers("v", kv.v),
            "q_batch": q.stride(0), "q_head": q.stride(1), "q_query": q.stride(2),
            "scale": scale * (LOG2E if softcap is None else 1.0), "softcap": float(softcap or 1.0),
            "window": window or 0, "chunks": chunks, "pages": pages, "slots": slots, "queries": queries,
            "behind": out.shape[2] - first - queries,
        },
        {
            "D": dim, "H": kv_heads, "G": group, "M": max(16, triton.next_power_of_2(group * queries)), **split,
            **_constants("K", kv.k, dim), **_constants("V", kv.v, dim),
            "POSITIONS": kv.positions is not None, "CAUSAL": out.shape[2] > 1, "WINDOW": window is not None,
            "SOFTCAP": softcap is not None, "MASS": mass is not None, "WIDEN": interpreting(),
            "NATIVE": native_fp8(q.device),
        },
        warps=chosen.warps,
        stages=chosen.stages,
    )  # fmt: skip
    launch(
        _merge,
        (group * queries, kv_heads, batch),
        {
            "acc_ptr": acc, "m_ptr": m, "den_ptr": den, "out_ptr": out, "lse_ptr": lse, "rows_ptr": rows,
            "num_slots_ptr": kv.num_slots, "sinks_ptr": m if sink_logits is None else sink_logits, "v_scale": v_scale,
            "chunks": chunks, "queries": queries, "first": first, "all_queries": out.shape[2],
        },
        {
            "D": dim, "DP": triton.next_power_of_2(dim), "H": kv_heads, "G": group, **split, "BLOCK": 16,
            "SINKS": sink_logits is not None, "MASS": mass is not None,
        },
    )  # fmt: skip
    if mass is not None:
        launch(
            _add_mass,
            (-(-slots // 1024), kv_heads, batch),
            {
                "weights_ptr": weights, "tops_ptr": tops, "lse_ptr": lse, "accumulated_ptr": mass, "rows_ptr": rows,
                "table_ptr": kv.page_table, "num_slots_ptr": kv.num_slots, "pages": pages, "slots": slots,
            },
            {"H": kv_heads, "G": group, "BLOCK": 1024, "TILE": chosen.tile},
        )  # fmt: skip


def readable(spec: QuantSpec, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels read this layout: 8, 4 or 2 bits, groups that divide a page or a token; 16 levels."""
    if dtype not in (torch.float16, torch.bfloat16) or head_dim > 256 or head_dim % 16:
        return False
    if spec.layout == "token":
        return spec.bits in (8, 4, 2) and head_dim % spec.group == 0
    if spec.layout == "channel":
        return spec.bits in (8, 4, 2) and PAGE % spec.group == 0
    if spec.layout in ("symmetric", "e2m1"):
        return head_dim % 32 == 0
    if spec.layout == "levels":
        return spec.bits == 4
    return spec.layout in ("plain", "fp8")


@dataclass(frozen=True)
class Settings:
    """How the kernel is started: tokens it reads at a time (whole pages), warps, and stages of its pipeline."""

    tile: int
    warps: int
    stages: int


TUNED = {
    "full": Settings(128, 4, 2),
    "8": Settings(64, 4, 3),
    "4": Settings(128, 4, 2),
    "kivi": Settings(64, 4, 2),
}
"""By what `kind_of` says, for head dimensions up to 128; for larger ones half a tile at a time. Chosen for the fewest
instructions per token without spilling (`kernels/test_compiled.py`)."""


def settings(kv: PagedKV, head_dim: int) -> Settings:
    """What a cache is started with."""
    chosen = TUNED[kind_of(kv)]
    if head_dim & (head_dim - 1):  # padded vectors take registers that a pipeline would need
        return Settings(PAGE, 4, 1)
    return chosen if head_dim <= 128 else dataclasses.replace(chosen, tile=max(PAGE, chosen.tile // 2))


def kind_of(kv: PagedKV) -> str:
    """Which of the settings a cache takes."""
    if kv.k.spec.layout == "channel":
        return "kivi"
    bits = max(kv.k.spec.bits, kv.v.spec.bits)
    return "full" if bits == 16 else "8" if bits == 8 else "4"


def chunk_tokens(pairs: int) -> int:
    """Tokens per program for so many (row, kv head): enough programs for a GPU when the batch is small, few parts to
    merge when it is large. Lengths do not count: a row's parts must not depend on what else is decoded."""
    tokens: int = 2 * triton.next_power_of_2(pairs)
    return min(1024, max(128, tokens))


def native_fp8(device: torch.device) -> bool:
    """Whether the GPU converts e4m3 by itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _pointers(name: str, store: KVStore) -> dict[str, Tensor]:
    """A store's tensors; the first stands in for those a layout has not."""
    first, *rest = store.pools
    first = first if store.spec.layout == "plain" else first.view(torch.int32)  # four codes at once
    fields = [first, *rest, first, first]
    names = (f"{name}_{part}_ptr" for part in ("codes", "scale", "zero"))
    return {**dict(zip(names, fields, strict=False)), f"{name}_residual_ptr": store.residual}


def _constants(name: str, store: KVStore, dim: int) -> dict[str, object]:
    spec = store.spec
    parts = 8 // spec.bits if spec.bits < 8 else 1
    return {
        f"{name}_LAYOUT": spec.layout,
        f"{name}_BITS": spec.bits,
        f"{name}_GROUP": {"fp8": int(spec.scale is None), "levels": dim}.get(spec.layout, spec.group),
        f"{name}_R": spec.residual,
        f"{name}_ROLLING": spec.rolling,
        f"{name}_DP": parts * triton.next_power_of_2(dim // parts),
    }
