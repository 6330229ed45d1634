"""Attention mass of a prompt in two passes of Triton kernels: every query's log-sum-exp, then what each key receives.

Scores are kept in float32 and in base 2 (log2(e) is folded into their scale), because exp2 is what the hardware has.
Both kernels hold one block of rows (queries in the first, keys in the second) and stream the blocks of the other kind
that causality and the window let them meet.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvsuite.kernels.triton.launch import interpreting, launch


def column_mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    last: int | None = None,
) -> Tensor:
    """Column sums of the causal attention matrix, mean over the query group; the same value at every run.

    Args: q (heads, T, head_dim), k (kv_heads, T, head_dim), of one dtype (float16, bfloat16 or float32), last dimension
        contiguous; sink_logits (heads,); last: how many of the prompt's last queries are summed over, None for all T.
    Returns: float32 (kv_heads, T); without sinks each row sums to the number of queries.
    Source: `kvsuite.kernels.reference.mass.column_mass`, whose fused form this is.
    """
    kv_heads, length, _ = k.shape
    lse = log_sum_exp(q, k, scale, window, softcap, sink_logits, last)
    mass = torch.empty(kv_heads, length, dtype=torch.float32, device=q.device)
    arguments, constants, warps, stages = _common(q, k, scale, window, softcap, lse.shape[1])
    arguments |= {"lse_ptr": lse, "mass_ptr": mass}
    grid = (triton.cdiv(length, constants["HELD"]), kv_heads)
    launch(_column_mass, grid, arguments, constants, warps, stages)
    return mass


def log_sum_exp(
    q: Tensor,
    k: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    last: int | None = None,
) -> Tensor:
    """The logarithm of each query's softmax denominator, to base 2, the sink's logit included.

    Args: as `column_mass`. Returns: float32 (heads, queries), queries = T, or ``last`` if that is fewer.
    Source: online softmax (Milakov and Gimelshein 2018), blockwise as in FlashAttention-2 (Dao 2023).
    """
    heads, length, _ = q.shape
    queries = length if last is None else min(last, length)
    lse = torch.empty(heads, queries, dtype=torch.float32, device=q.device)
    arguments, constants, warps, stages = _common(q, k, scale, window, softcap, queries)
    arguments |= {
        "sinks_ptr": lse if sink_logits is None else sink_logits.contiguous(),
        "lse_ptr": lse,
    }
    constants |= {"SINKS": sink_logits is not None}
    grid = (triton.cdiv(queries, constants["HELD"]), heads)
    launch(_log_sum_exp, grid, arguments, constants, warps, stages)
    return lse


def _tiles(dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """Rows held, rows streamed, warps and stages, for a head_dim padded to a power of two: as many as leave sm_80 and
    sm_90 without spilled registers, and within the 99 KiB of shared memory of the smaller GPUs of their kind."""
    if itemsize == 4:  # exact float32 products have no tensor cores
        return (32, 32, 4, 2) if dim <= 64 else (16, 16, 4, 2)
    return (128, 64, 4, 2) if dim <= 128 else (64, 64, 4, 2)


def _common(
    q: Tensor, k: Tensor, scale: float, window: int | None, softcap: float | None, queries: int
) -> tuple[dict[str, Any], dict[str, Any], int, int]:
    """What both kernels are given: arguments, constants, warps, stages."""
    if q.stride(-1) != 1 or k.stride(-1) != 1:
        raise ValueError("q and k must be contiguous in their last dimension")
    dim = q.shape[-1]
    padded = max(16, triton.next_power_of_2(dim))  # 16 is the least tl.dot takes
    held, streamed, warps, stages = _tiles(padded, q.element_size())
    base = math.log2(math.e)
    arguments = {
        "q_ptr": q,
        "k_ptr": k,
        "q_head_stride": q.stride(0),
        "q_row_stride": q.stride(1),
        "k_head_stride": k.stride(0),
        "k_row_stride": k.stride(1),
        "group": q.shape[0] // k.shape[0],
        "length": q.shape[1],
        "queries": queries,
        "window": window or 0,
        # with a softcap the scores come out as the exponent of tanh(x) = (1 - 2^-y) / (1 + 2^-y), y = 2 log2(e) x
        "scale": scale * base if softcap is None else 2 * base * scale / softcap,
        "cap": 0.0 if softcap is None else softcap * base,
    }
    constants = {
        "HEAD_DIM": dim,
        "PADDED": padded,
        "HELD": held,
        "STREAMED": streamed,
        "WINDOWED": window is not None,
        "SOFTCAP": softcap is not None,
        "WIDEN": interpreting(),
    }
    return arguments, constants, warps, stages


@triton.jit
def _rows(ptr, rows, stride, length, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED: tl.constexpr):
    dims = tl.arange(0, PADDED)
    at = ptr + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    if MASKED:
        return tl.load(at, mask=(rows < length)[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM < PADDED:
        return tl.load(at, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _scores(held, streamed, scale, cap, SOFTCAP: tl.constexpr, WIDEN: tl.constexpr):
    if WIDEN:
        held, streamed = held.to(tl.float32), streamed.to(tl.float32)
    scores = tl.dot(held, tl.trans(streamed), input_precision="ieee") * scale
    if SOFTCAP:
        rest = tl.exp2(-tl.abs(scores))  # of the absolute value, so that it cannot overflow
        tanh = (1.0 - rest) / (1.0 + rest)
        scores = tl.where(scores < 0, -tanh, tanh) * cap
    return scores


@triton.jit
def _readable(query, key, window, WINDOWED: tl.constexpr):
    if WINDOWED:
        return (key <= query) & (query - key < window)
    return key <= query


@triton.jit
def _edge(i, before, low, high, STREAMED: tl.constexpr):
    # the i-th block that needs a mask: ``before`` of them start at ``low``, the others at ``high``
    return tl.where(i < before, low + i * STREAMED, high + (i - before) * STREAMED)


@triton.jit
def _add_keys(
    peak,
    total,
    q,
    k_ptr,
    k_row_stride,
    query,
    first,
    length,
    window,
    scale,
    cap,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    STREAMED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    key = first + tl.arange(0, STREAMED)
    k = _rows(k_ptr, key, k_row_stride, length, MASKED, HEAD_DIM, PADDED)
    scores = _scores(q, k, scale, cap, SOFTCAP, WIDEN)
    if MASKED:
        scores = tl.where(_readable(query[:, None], key[None, :], window, WINDOWED), scores, float("-inf"))
    higher = tl.maximum(peak, tl.max(scores, 1))
    total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
    return higher, total


@triton.jit(do_not_specialize=["length", "queries", "window"])
def _log_sum_exp(
    q_ptr,
    k_ptr,
    q_head_stride,
    q_row_stride,
    k_head_stride,
    k_row_stride,
    group,
    length,
    queries,
    window,
    scale,
    cap,
    sinks_ptr,
    lse_ptr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HELD: tl.constexpr,
    STREAMED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
    SINKS: tl.constexpr,
):
    head = tl.program_id(1)
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # the last queries read the most keys: they start first
    row = block * HELD + tl.arange(0, HELD)
    first = length - queries + block * HELD
    end = tl.minimum(first + HELD, length)
    # a row past the prompt is masked like the last query: a sum of nothing has no logarithm
    query = tl.minimum(length - queries + row, length - 1)
    q_ptr += head.to(tl.int64) * q_head_stride
    k_ptr += (head // group).to(tl.int64) * k_head_stride
    q = _rows(q_ptr, length - queries + row, q_row_stride, length, True, HEAD_DIM, PADDED)

    peak = tl.full([HELD], -1e30, tl.float32)  # finite, so that blocks a query may not read leave no nan
    total = tl.zeros([HELD], tl.float32)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        peak = tl.maximum(peak, sink)
        total = tl.exp2(sink - peak)

    # keys [low, end): some queries' windows start within [low, inner), all queries read [inner, high)
    low = 0
    before = 0
    if WINDOWED:
        low = tl.maximum(first - window + 1, 0)
        before = tl.cdiv(tl.maximum(end - window - low, 0), STREAMED)
    inner = low + before * STREAMED
    high = inner + tl.maximum(first + 1 - inner, 0) // STREAMED * STREAMED
    before = tl.minimum(before, tl.cdiv(end - low, STREAMED))
    for at in range(inner, high, STREAMED):
        peak, total = _add_keys(
            peak, total, q, k_ptr, k_row_stride, query, at, length, window, scale, cap,
            False, HEAD_DIM, PADDED, STREAMED, WINDOWED, SOFTCAP, WIDEN,
        )  # fmt: skip
    for i in range(before + tl.cdiv(tl.maximum(end - high, 0), STREAMED)):
        at = _edge(i, before, low, high, STREAMED)
        peak, total = _add_keys(
            peak, total, q, k_ptr, k_row_stride, query, at, length, window, scale, cap,
            True, HEAD_DIM, PADDED, STREAMED, WINDOWED, SOFTCAP, WIDEN,
        )  # fmt: skip
    tl.store(lse_ptr + head.to(tl.int64) * queries + row, peak + tl.log2(total), mask=row < queries)


@triton.jit
def _add_queries(
    mass,
    k,
    q_ptr,
    q_head_stride,
    q_row_stride,
    lse_ptr,
    head,
    key,
    first,
    length,
    queries,
    window,
    scale,
    cap,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    STREAMED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    head = tl.cast(head, tl.int64)
    query = first + tl.arange(0, STREAMED)
    q = _rows(q_ptr + head * q_head_stride, query, q_row_stride, length, MASKED, HEAD_DIM, PADDED)
    scores = _scores(k, q, scale, cap, SOFTCAP, WIDEN)
    lse_ptr += head * queries + (query - (length - queries))
    if MASKED:
        lse = tl.load(lse_ptr, mask=query < length, other=float("inf"))
        scores = tl.where(_readable(query[None, :], key[:, None], window, WINDOWED), scores, float("-inf"))
    else:
        lse = tl.load(lse_ptr)
    return mass + tl.sum(tl.exp2(scores - lse[None, :]), 1)


@triton.jit(do_not_specialize=["length", "queries", "window"])
def _column_mass(
    q_ptr,
    k_ptr,
    q_head_stride,
    q_row_stride,
    k_head_stride,
    k_row_stride,
    group,
    length,
    queries,
    window,
    scale,
    cap,
    lse_ptr,
    mass_ptr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
    HELD: tl.constexpr,
    STREAMED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    kv_head = tl.program_id(1)
    first = tl.program_id(0) * HELD
    key = first + tl.arange(0, HELD)
    k_ptr += kv_head.to(tl.int64) * k_head_stride
    k = _rows(k_ptr, key, k_row_stride, length, True, HEAD_DIM, PADDED)

    # queries [low, end): some come before the last key within [low, inner), all read every key in [inner, high)
    low = tl.maximum(first, length - queries)
    end = length
    reach = length
    if WINDOWED:
        end = tl.minimum(first + HELD - 1 + window, length)
        reach = tl.minimum(first + window, length)
    before = tl.cdiv(tl.maximum(first + HELD - 1 - low, 0), STREAMED)
    inner = low + before * STREAMED
    whole = tl.maximum(reach - inner, 0) // STREAMED
    high = inner + whole * STREAMED
    before = tl.minimum(before, tl.cdiv(tl.maximum(end - low, 0), STREAMED))
    edges = before + tl.cdiv(tl.maximum(end - high, 0), STREAMED)

    # one loop over heads and blocks: a few last queries are one block a head, and nested loops would not overlap them
    mass = tl.zeros([HELD], tl.float32)
    for i in range(group * whole):
        head = kv_head * group + i // whole
        at = inner + i % whole * STREAMED
        mass = _add_queries(
            mass, k, q_ptr, q_head_stride, q_row_stride, lse_ptr, head, key, at, length, queries, window, scale, cap,
            False, HEAD_DIM, PADDED, STREAMED, WINDOWED, SOFTCAP, WIDEN,
        )  # fmt: skip
    for i in range(group * edges):
        head = kv_head * group + i // edges
        at = _edge(i % edges, before, low, high, STREAMED)
        mass = _add_queries(
            mass, k, q_ptr, q_head_stride, q_row_stride, lse_ptr, head, key, at, length, queries, window, scale, cap,
            True, HEAD_DIM, PADDED, STREAMED, WINDOWED, SOFTCAP, WIDEN,
        )  # fmt: skip
    tl.store(mass_ptr + kv_head.to(tl.int64) * length + key, mass / group, mask=key < length)
