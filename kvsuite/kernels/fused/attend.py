"""Decode attention over a paged, compressed cache, split over the sequence and merged (flash-decoding).

A program takes a fixed number of tokens of one (row, kv head), so what a row gets never depends on its mates, and time
follows the tokens kept where heads are ragged. The query group is packed as rows: K and V are read once per kv head.
Pages are read by one body, to which a codec adds how a page becomes numbers; those stay in registers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsuite.kernels.fused.launch import interpreting, launch
from kvsuite.kernels.paged import PAGE, Format, Paged, Side

LOG2E = math.log2(math.e)
ROWS = 64
"""Packed query rows (group * queries) a program takes at most."""


@triton.jit
def _magic(codes):
    """Small integers to float32 without an integer conversion, of which a GPU does few: 2^23 + code, minus 2^23."""
    return (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _join(codes, BITS: tl.constexpr):
    """Packed codes (T, W) to float32 (T, W * 8 / BITS): the parts one behind the other."""
    if BITS == 8:
        x = _magic(codes)
    elif BITS == 4:
        both = tl.join(codes & 15, codes >> 4)
        x = _magic(tl.reshape(tl.permute(both, (0, 2, 1)), (codes.shape[0], 2 * codes.shape[1])))
    else:
        four = tl.join(tl.join(codes & 3, (codes >> 2) & 3), tl.join((codes >> 4) & 3, codes >> 6))
        x = _magic(tl.reshape(tl.permute(four, (0, 3, 2, 1)), (codes.shape[0], 4 * codes.shape[1])))
    return x


@triton.jit
def _e4m3(codes):
    """e4m3 bytes to float32 by moving the bits into a float16, whose exponent bias is 8 larger."""
    wide = codes.to(tl.uint16)
    half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def _channels(D: tl.constexpr, BITS: tl.constexpr, DP: tl.constexpr):
    """The channel of each column of a tile and whether there is one: parts are padded one by one."""
    PARTS: tl.constexpr = 8 // BITS if BITS < 8 else 1
    W: tl.constexpr = D // PARTS
    WP: tl.constexpr = DP // PARTS
    column = tl.arange(0, DP)
    return (column // WP) * W + column % WP, (column % WP) < W


@triton.jit
def _load(ptr, mask, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(ptr, mask=mask, other=0)
    else:
        x = tl.load(ptr)
    return x


@triton.jit
def _codes(codes_ptr, page, token, inside, D: tl.constexpr, BITS: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):
    """What a page holds of its tokens (T,), as it lies there: plain numbers (T, DP) or codes (T, DP / parts)."""
    PARTS: tl.constexpr = 8 // BITS if BITS < 8 else 1
    W: tl.constexpr = D // PARTS
    WP: tl.constexpr = DP // PARTS
    byte = tl.arange(0, WP)
    at = codes_ptr + page * (32 * W) + token[:, None] * W + byte[None, :]
    PADDED: tl.constexpr = W != WP
    return _load(at, inside[:, None] & (byte < W)[None, :], MASKED or PADDED)


@triton.jit
def _numbers(
    codes_ptr, scale_ptr, zero_ptr, page, token, inside,
    D: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, DP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """A page's tokens as numbers (T, DP), not rounded; fp8 with a fixed scale without it."""
    PADDED: tl.constexpr = D != DP
    x = _codes(codes_ptr, page, token, inside, D, BITS, DP, MASKED)
    if KIND == "fp8":
        x = _e4m3(x)
        if GROUP > 0:
            x = x * _load(scale_ptr + page * 32 + token, inside, MASKED)[:, None]
    elif KIND == "token":
        x = _join(x, BITS)
        GROUPS: tl.constexpr = D // GROUP
        if GROUPS == 1:
            at = page * 32 + token
            scale = _load(scale_ptr + at, inside, MASKED).to(tl.float32)[:, None]
            zero = _load(zero_ptr + at, inside, MASKED).to(tl.float32)[:, None]
        else:
            channel, real = _channels(D, BITS, DP)
            at = page * (32 * GROUPS) + token[:, None] * GROUPS + (channel // GROUP)[None, :]
            both = inside[:, None] & real[None, :]
            scale = _load(scale_ptr + at, both, MASKED or PADDED).to(tl.float32)
            zero = _load(zero_ptr + at, both, MASKED or PADDED).to(tl.float32)
        x = x * scale + zero
    elif KIND == "channel":
        x = _join(x, BITS)
        channel, real = _channels(D, BITS, DP)
        at = page * (32 // GROUP * D) + (token // GROUP)[:, None] * D + channel[None, :]
        both = inside[:, None] & real[None, :]
        scale = _load(scale_ptr + at, both, MASKED or PADDED).to(tl.float32)
        zero = _load(zero_ptr + at, both, MASKED or PADDED).to(tl.float32)
        x = x * scale + zero
    return x


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
def _recent(x, residuaden_ptr, slot, wanted, R: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, DP: tl.constexpr):
    """x (T, DP) with the tokens that are ``wanted`` from the residual put in their places."""
    channel, real = _channels(D, BITS, DP)
    at = residuaden_ptr + (slot % R)[:, None] * D + channel[None, :]
    found = tl.load(at, mask=wanted[:, None] & real[None, :], other=0).to(tl.float32)
    return tl.where(wanted[:, None], found, x)


@triton.jit
def _scores(
    q, total, codes_ptr, scale_ptr, zero_ptr, page, token,
    D: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, DP: tl.constexpr,
    TYPE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """q · K of a whole page, float32 (M, 32). Where K need not be dequantised it is not: a token's scale is applied to
    its score, a channel's to the query (bfloat16 only: float16 has not the range), zeros add up to one number."""
    inside = token >= 0
    if KIND == "token" and GROUP == D:
        codes = _join(_codes(codes_ptr, page, token, inside, D, BITS, DP, False), BITS)
        scale = tl.load(scale_ptr + page * 32 + token).to(tl.float32)
        zero = tl.load(zero_ptr + page * 32 + token).to(tl.float32)
        s = _dot(q, tl.trans(codes), TYPE, WIDEN) * scale[None, :] + total[:, None] * zero[None, :]
    elif KIND == "channel" and GROUP == 32 and tl.bfloat16 == TYPE:
        # codes around 0: what rounding q * scale costs is a share of them
        HALF: tl.constexpr = 1 << (BITS - 1)
        codes = _join(_codes(codes_ptr, page, token, inside, D, BITS, DP, False), BITS) - HALF
        channel, real = _channels(D, BITS, DP)
        PADDED: tl.constexpr = D != DP
        scale = _load(scale_ptr + page * D + channel, real, PADDED).to(tl.float32)
        zero = _load(zero_ptr + page * D + channel, real, PADDED).to(tl.float32) + HALF * scale
        wide = q.to(tl.float32)
        s = _dot(wide * scale[None, :], tl.trans(codes), TYPE, WIDEN) + tl.sum(wide * zero[None, :], 1)[:, None]
    elif KIND == "fp8" and GROUP > 0:
        codes = _e4m3(_codes(codes_ptr, page, token, inside, D, BITS, DP, False))
        s = _dot(q, tl.trans(codes), TYPE, WIDEN) * tl.load(scale_ptr + page * 32 + token)[None, :]
    else:
        k = _numbers(codes_ptr, scale_ptr, zero_ptr, page, token, inside, D, KIND, BITS, GROUP, DP, False)
        s = _dot(q, tl.trans(k), TYPE, WIDEN)
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
def _attend(
    q_ptr, acc_ptr, m_ptr, den_ptr, weights_ptr, tops_ptr, rows_ptr, table_ptr, used_ptr, seen_ptr, positions_ptr,
    k_codes_ptr, k_scale_ptr, k_zero_ptr, k_residuaden_ptr, v_codes_ptr, v_scale_ptr, v_zero_ptr, v_residuaden_ptr,
    q_batch, q_head, q_query, scale, softcap, window, chunks, pages, slots, queries,
    D: tl.constexpr, H: tl.constexpr, G: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr,
    K_KIND: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_R: tl.constexpr, K_ROLLING: tl.constexpr,
    K_DP: tl.constexpr,
    V_KIND: tl.constexpr, V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_R: tl.constexpr, V_ROLLING: tl.constexpr,
    V_DP: tl.constexpr,
    POSITIONS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, MASS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    chunk, head, item = tl.program_id(0) % chunks, tl.program_id(1), tl.program_id(2)
    row = tl.load(rows_ptr + item)
    if row < 0:
        return
    TYPE: tl.constexpr = q_ptr.dtype.element_ty
    here = row.to(tl.int64) * H + head
    n = tl.load(used_ptr + here)
    if chunk * CHUNK * 32 >= n:
        return
    seen = tl.load(seen_ptr + here)
    k_done, v_done = n, n
    if K_R > 0:
        k_done = tl.maximum(n - K_R, 0) if K_ROLLING else n - n % K_R
    if V_R > 0:
        v_done = tl.maximum(n - V_R, 0) if V_ROLLING else n - n % V_R
    table_ptr += here * pages
    positions_ptr += here * slots
    k_residuaden_ptr += here * (K_R * D)
    v_residuaden_ptr += here * (V_R * D)

    r = (tl.program_id(0) // chunks) * M + tl.arange(0, M)
    real_row = r < G * queries
    query = r % queries
    channel, real = _channels(D, K_BITS, K_DP)
    at = q_ptr + item * q_batch + (head * G + r // queries)[:, None] * q_head + query[:, None] * q_query
    q = tl.load(at + channel[None, :], mask=real_row[:, None] & real[None, :], other=0)
    total = tl.sum(q.to(tl.float32), 1)
    newest = seen - queries + query

    m = tl.full((M,), float("-inf"), tl.float32)
    den = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, V_DP), tl.float32)
    token = tl.arange(0, 32)
    pair = (item * H + head).to(tl.int64) * G
    whole = tl.minimum(k_done, v_done) // 32
    start = chunk * CHUNK
    end = tl.minimum(start + CHUNK, (n + 31) // 32)
    if WINDOW and not POSITIONS:
        start = tl.maximum(start, (seen - queries - window + 1) // 32)
    # pages that are complete and encoded on both sides: nothing to mask but what the question asks
    for i in range(start, tl.minimum(end, whole)):
        page = tl.load(table_ptr + i).to(tl.int64)
        s = _scores(
            q, total, k_codes_ptr, k_scale_ptr, k_zero_ptr, page, token, D, K_KIND, K_BITS, K_GROUP, K_DP, TYPE, WIDEN
        )
        s = _masked(s, positions_ptr, i * 32 + token, newest, scale, softcap, window, n, POSITIONS, CAUSAL, WINDOW,
                    SOFTCAP, False)  # fmt: skip
        p, m, den, before = _softmax_step(s, m, den)
        if MASS:
            tl.store(weights_ptr + (pair + r)[:, None] * slots + (i * 32 + token)[None, :], p.to(tl.float16),
                     mask=real_row[:, None])  # fmt: skip
            tl.store(tops_ptr + (pair + r) * pages + i, m, mask=real_row)
        v = _numbers(v_codes_ptr, v_scale_ptr, v_zero_ptr, page, token, token >= 0, D, V_KIND, V_BITS, V_GROUP, V_DP,
                     False)  # fmt: skip
        acc = acc * before[:, None] + _dot(p, v, TYPE, WIDEN)
    # the last page, and what is in full precision on either side
    for i in range(tl.maximum(start, whole), end):
        page = tl.load(table_ptr + i).to(tl.int64)
        slot = i * 32 + token
        k = _numbers(k_codes_ptr, k_scale_ptr, k_zero_ptr, page, token, slot < k_done, D, K_KIND, K_BITS, K_GROUP,
                     K_DP, True)  # fmt: skip
        if K_R > 0:
            k = _recent(k, k_residuaden_ptr, slot, (slot >= k_done) & (slot < n), K_R, D, K_BITS, K_DP)
        s = _dot(q, tl.trans(k), TYPE, WIDEN)
        s = _masked(s, positions_ptr, slot, newest, scale, softcap, window, n, POSITIONS, CAUSAL, WINDOW, SOFTCAP, True)
        p, m, den, before = _softmax_step(s, m, den)
        if MASS:
            tl.store(weights_ptr + (pair + r)[:, None] * slots + slot[None, :], p.to(tl.float16),
                     mask=real_row[:, None] & (slot < n)[None, :])  # fmt: skip
            tl.store(tops_ptr + (pair + r) * pages + i, m, mask=real_row)
        v = _numbers(v_codes_ptr, v_scale_ptr, v_zero_ptr, page, token, slot < v_done, D, V_KIND, V_BITS, V_GROUP,
                     V_DP, True)  # fmt: skip
        if V_R > 0:
            v = _recent(v, v_residuaden_ptr, slot, (slot >= v_done) & (slot < n), V_R, D, V_BITS, V_DP)
        acc = acc * before[:, None] + _dot(p, v, TYPE, WIDEN)

    part = ((item * H + head).to(tl.int64) * chunks + chunk) * (G * queries) + r
    tl.store(m_ptr + part, m, mask=real_row)
    tl.store(den_ptr + part, den, mask=real_row)
    channel, real = _channels(D, V_BITS, V_DP)
    tl.store(acc_ptr + part[:, None] * D + channel[None, :], acc, mask=real_row[:, None] & real[None, :])


@triton.jit
def _masked(
    s, positions_ptr, slot, newest, scale, softcap, window, n,
    POSITIONS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Raw scores (M, 32) to base-2 logits, -inf where a key may not be read."""
    if SOFTCAP:
        s = s * scale
        s = (1.0 - 2.0 / (tl.exp2(s * (2.0 * 1.4426950408889634) / softcap) + 1.0)) * (softcap * 1.4426950408889634)
    else:
        s = s * scale
    position = slot
    if POSITIONS:
        position = tl.load(positions_ptr + slot, mask=slot < n, other=-1)
        s = tl.where((position >= 0)[None, :], s, float("-inf"))
    elif LAST:
        s = tl.where((slot < n)[None, :], s, float("-inf"))
    if CAUSAL:
        s = tl.where(position[None, :] <= newest[:, None], s, float("-inf"))
    if WINDOW:
        s = tl.where(position[None, :] > newest[:, None] - window, s, float("-inf"))
    return s


@triton.jit
def _merge(
    acc_ptr, m_ptr, den_ptr, out_ptr, lse_ptr, rows_ptr, used_ptr, sinks_ptr, v_scale, chunks, queries,
    D: tl.constexpr, DP: tl.constexpr, H: tl.constexpr, G: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    SINKS: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """The parts of one query row together: weights by their maxima, the sink's logit joining the sum only."""
    r, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows_ptr + item)
    channel = tl.arange(0, DP)
    out = (((item * H + head).to(tl.int64) * G * queries) + r) * D + channel
    if row < 0:
        tl.store(out_ptr + out, tl.zeros((DP,), out_ptr.dtype.element_ty), mask=channel < D)
        return
    n = tl.load(used_ptr + row.to(tl.int64) * H + head)
    count = (n + CHUNK * 32 - 1) // (CHUNK * 32)
    first = ((item * H + head).to(tl.int64) * chunks) * (G * queries) + r
    top = tl.full((), float("-inf"), tl.float32)
    den = tl.zeros((), tl.float32)
    if SINKS:
        top = tl.load(sinks_ptr + head * G + r // queries).to(tl.float32) * 1.4426950408889634
        den = den + 1.0
    acc = tl.zeros((DP,), tl.float32)
    for start in range(0, count, BLOCK):
        c = start + tl.arange(0, BLOCK)
        at = first + c * (G * queries)
        m = tl.load(m_ptr + at, mask=c < count, other=float("-inf"))
        new = tl.maximum(top, tl.max(m, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(m - safe)
        before = tl.exp2(top - safe)
        # a part that may read nothing has a maximum of -inf and was perhaps not written
        some = m > float("-inf")
        sums = tl.load(den_ptr + at, mask=some, other=0)
        parts = tl.load(acc_ptr + at[:, None] * D + channel[None, :], mask=some[:, None] & (channel < D)[None, :],
                        other=0)  # fmt: skip
        den = den * before + tl.sum(weight * sums, 0)
        acc = acc * before + tl.sum(weight[:, None] * parts, 0)
        top = new
    tl.store(out_ptr + out, (acc / den * v_scale).to(out_ptr.dtype.element_ty), mask=channel < D)
    if MASS:
        tl.store(lse_ptr + (item * H + head) * G + r, top + tl.log2(den))


@triton.jit
def _add_mass(
    weights_ptr, tops_ptr, lse_ptr, mass_ptr, rows_ptr, used_ptr, pages, slots,
    H: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Each key's probability, mean over the group, out of the weights that the first pass left."""
    block, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(rows_ptr + item)
    if row < 0:
        return
    here = row.to(tl.int64) * H + head
    n = tl.load(used_ptr + here)
    if block * BLOCK >= n:
        return
    slot = block * BLOCK + tl.arange(0, BLOCK)
    pair = (item * H + head).to(tl.int64) * G
    p = tl.zeros((BLOCK,), tl.float32)
    for g in range(G):
        weight = tl.load(weights_ptr + (pair + g) * slots + slot, mask=slot < n, other=0).to(tl.float32)
        top = tl.load(tops_ptr + (pair + g) * pages + slot // 32, mask=slot < n, other=float("-inf"))
        p += weight * tl.exp2(top - tl.load(lse_ptr + pair + g))
    at = mass_ptr + here * slots + slot
    tl.store(at, tl.load(at, mask=slot < n) + p / G, mask=slot < n)


def attend(
    q: Tensor,
    paged: Paged,
    rows: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """`kvsuite.kernels.attend.attend` on a GPU: float16 or bfloat16, head_dim up to 256."""
    batch, heads, queries, dim = q.shape
    _, kv_heads, pages = paged.table.shape
    group = heads // kv_heads
    if paged.mass is not None and queries > 1:
        raise ValueError("attention mass is counted query by query")
    chunk = chunk_pages(batch * kv_heads)
    chunks, slots = -(-pages // chunk), pages * PAGE
    rows_each = min(ROWS, max(16, triton.next_power_of_2(group * queries)))
    shape = (batch, kv_heads, chunks, group * queries)
    q = q if q.stride(-1) == 1 else q.contiguous()
    acc = q.new_empty((*shape, dim), dtype=torch.float32)
    m, den = q.new_empty((2, *shape), dtype=torch.float32)
    out = torch.empty((batch, heads, queries, dim), dtype=q.dtype, device=q.device)
    weights = tops = lse = m
    if paged.mass is not None:
        weights = q.new_empty((batch, heads, slots), dtype=torch.float16)
        tops = q.new_empty((batch, heads, pages), dtype=torch.float32)
        lse = q.new_empty((batch, heads), dtype=torch.float32)
    k_scale, v_scale = paged.k.format.scale or 1.0, paged.v.format.scale or 1.0
    base2 = scale * k_scale * (1.0 if softcap else LOG2E)
    launch(
        _attend,
        (chunks * -(-group * queries // rows_each), kv_heads, batch),
        {
            "q_ptr": q, "acc_ptr": acc, "m_ptr": m, "den_ptr": den, "weights_ptr": weights, "tops_ptr": tops,
            "rows_ptr": rows, "table_ptr": paged.table, "used_ptr": paged.used, "seen_ptr": paged.seen,
            "positions_ptr": paged.table if paged.positions is None else paged.positions,
            **_pointers("k", paged.k), **_pointers("v", paged.v),
            "q_batch": q.stride(0), "q_head": q.stride(1), "q_query": q.stride(2), "scale": base2,
            "softcap": float(softcap or 1.0), "window": window or 0,
            "chunks": chunks, "pages": pages, "slots": slots, "queries": queries,
        },
        {
            "D": dim, "H": kv_heads, "G": group, "M": rows_each, "CHUNK": chunk,
            **_constants("K", paged.k, dim), **_constants("V", paged.v, dim),
            "POSITIONS": paged.positions is not None, "CAUSAL": queries > 1, "WINDOW": window is not None,
            "SOFTCAP": softcap is not None, "MASS": paged.mass is not None, "WIDEN": interpreting(),
        },
        warps=4,
        stages=3,
    )  # fmt: skip
    launch(
        _merge,
        (group * queries, kv_heads, batch),
        {
            "acc_ptr": acc, "m_ptr": m, "den_ptr": den, "out_ptr": out, "lse_ptr": lse, "rows_ptr": rows,
            "used_ptr": paged.used, "sinks_ptr": m if sink_logits is None else sink_logits, "v_scale": v_scale,
            "chunks": chunks, "queries": queries,
        },
        {
            "D": dim, "DP": triton.next_power_of_2(dim), "H": kv_heads, "G": group, "CHUNK": chunk, "BLOCK": 16,
            "SINKS": sink_logits is not None, "MASS": paged.mass is not None,
        },
    )  # fmt: skip
    if paged.mass is not None:
        launch(
            _add_mass,
            (-(-slots // 1024), kv_heads, batch),
            {
                "weights_ptr": weights, "tops_ptr": tops, "lse_ptr": lse, "mass_ptr": paged.mass, "rows_ptr": rows,
                "used_ptr": paged.used, "pages": pages, "slots": slots,
            },
            {"H": kv_heads, "G": group, "BLOCK": 1024},
        )  # fmt: skip
    return out


def readable(form: Format, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernels read this format."""
    return dtype in (torch.float16, torch.bfloat16) and head_dim <= 256 and head_dim % 16 == 0


def chunk_pages(pairs: int) -> int:
    """Pages per program for so many (row, kv head): enough programs for a GPU when the batch is small, few parts to
    merge when it is large. Lengths do not count: a row's parts must not depend on what else is decoded."""
    pages: int = triton.next_power_of_2(pairs) // 16
    return min(32, max(4, pages))


def _pointers(name: str, side: Side) -> dict[str, Tensor]:
    """A side's tensors; the first stands in for those a format has not."""
    fields = [*side.fields, side.fields[0], side.fields[0]]
    names = (f"{name}_{part}_ptr" for part in ("codes", "scale", "zero"))
    return {**dict(zip(names, fields, strict=False)), f"{name}_residuaden_ptr": side.residual}


def _constants(name: str, side: Side, dim: int) -> dict[str, object]:
    form = side.format
    parts = 8 // form.bits if form.bits < 8 else 1
    return {
        f"{name}_KIND": form.kind,
        f"{name}_BITS": form.bits,
        f"{name}_GROUP": form.group if form.kind != "fp8" else int(form.scale is None),
        f"{name}_R": side.residual.shape[2],
        f"{name}_ROLLING": side.rolling,
        f"{name}_DP": parts * triton.next_power_of_2(dim // parts),
    }
