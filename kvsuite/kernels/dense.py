"""Attention as transformers does it, over the same caches: what a method gains where no kernel reads its codes.

At every step all that a cache holds is unpacked into one dense tensor, which replaces the copy that transformers' own
caches make when they append a token; then transformers' function of that name attends. Storage is the reference's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from kvsuite.kernels import reference
from kvsuite.kernels.context import AttentionParams, HeadView, LayerContext, Needs
from kvsuite.kernels.paged import PagedKV
from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.kernels.reference.attend import Loaded, PageIndices, load, note, readable, rotate_sinks
from kvsuite.kernels.reference.attention import causal_mask, probabilities

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor | None]]
"""q (n, heads, Q, head_dim), k, v (n, kv_heads, T, head_dim), an additive mask or None, scale -> (n, Q, heads,
head_dim), and the weights (n, heads, Q, T) where they are known."""


def backend(name: str) -> Any:
    """The backend of one of `kvsuite.modes.MODES`: the reference's functions, but for attention."""
    own = {"NAME": name, "supports": supports, "attend": partial(attend, name)}
    if name == "eager":
        own["read"] = read
    shared = {key: getattr(reference, key) for key in (*reference.__all__, "ARENA")}
    return SimpleNamespace(**(shared | own))


def supports(layer: LayerContext, k: QuantSpec, v: QuantSpec, needs: Needs) -> str:
    """Why no mode can do a layer, in a few words; empty if it can."""
    return "transformers' attention reads all tokens, not pages that are chosen" if needs.reads_some else ""


def read(kv: PagedKV, row: int) -> list[HeadView]:
    """As the reference's; eager attention rounds its scores."""
    return [dataclasses.replace(view, rounded=True) for view in reference.read(kv, row)]


def attend(
    name: str,
    kv: PagedKV,
    q: Tensor,
    rows: Sequence[int | None],
    params: AttentionParams,
    pages: PageIndices | None = None,
) -> Tensor:
    """As the reference's `attend`. Raises ValueError for soft caps and sink logits, which these do not take."""
    _refuse(name, params)
    out, at = torch.zeros_like(q), [(b, row) for b, row in enumerate(rows) if row is not None]
    if not at:
        return out
    held = [(row, _spans(kv, row)) for _, row in at]
    items = slice(None) if len(at) == len(rows) else torch.tensor([b for b, _ in at], device=q.device)
    k, v = (_dense(kv, held, field, q.dtype) for field in ("k", "v"))
    allowed = _allowed(kv, held, q.shape[2], params.window, k.shape[2])
    found, weights = FUNCTIONS[name](q[items], k, v, allowed, params.scale)
    out[items] = found.transpose(1, 2)
    if kv.accumulated_attention is not None or kv.newest_attention is not None:
        _note(kv, held, q[items], k, allowed, weights, params.scale)
    return out


def self_attention(name: str, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> tuple[Tensor, Tensor | None]:
    """A prompt's attention over itself: q (heads, T, head_dim), k, v (kv_heads, T, head_dim) to q's shape, and the
    weights (heads, T, T) where they are known. Raises ValueError as `attend` does."""
    _refuse(name, params)
    places = torch.arange(q.shape[1], device=q.device)
    allowed = None  # each of these two masks by itself what lies behind a query
    if name == "eager" or (name == "sdpa" and params.window is not None):
        allowed = causal_mask(places, places, params.window)[None, None]
    if name == "flash-attn" and params.window is not None:
        raise ValueError("flash-attn prefills no windows here")
    out, weights = FUNCTIONS[name](q[None], k[None], v[None], allowed, params.scale)
    return out[0].transpose(0, 1), None if weights is None else weights[0]


def _refuse(name: str, params: AttentionParams) -> None:
    if params.softcap is not None or params.sink_logits is not None:
        raise ValueError(f"{name} attention is not there for models with soft caps or sink logits")


HeldRows = list[tuple[int, list[tuple[slice, int, Loaded]]]]
"""Row by row: heads that lie alike, their slots in use, and what they hold."""


def _spans(kv: PagedKV, row: int) -> list[tuple[slice, int, Loaded]]:
    rotate_sinks(kv, row)
    return [(span, used, load(kv, row, span, used, None)) for span, used in kv.spans(row)]


def _dense(kv: PagedKV, held: HeldRows, field: str, dtype: torch.dtype) -> Tensor:
    """(n, kv_heads, T, head_dim) of all rows, 0 behind the shorter ones."""
    parts = [[getattr(one, field) for _, _, one in spans] for _, spans in held]
    lengths = {part.shape[1] for own in parts for part in own}
    longest, layer = max(lengths), kv.layer
    shape = (len(held), layer.kv_heads, longest, layer.head_dim)
    dense = torch.empty(shape, dtype=dtype, device=layer.device)
    for i, (own, (_, spans)) in enumerate(zip(parts, held, strict=True)):
        for part, (span, _, _) in zip(own, spans, strict=True):
            dense[i, span, : part.shape[1]] = part
            dense[i, span, part.shape[1] :] = 0
    return dense


def _allowed(kv: PagedKV, held: HeldRows, queries: int, window: int | None, longest: int) -> Tensor | None:
    """bool (n, kv_heads, Q, T): what may be read; None where everything may."""
    masks = [[readable(kv, row, span, one, queries, window) for span, _, one in spans] for row, spans in held]
    full = all(one.k.shape[1] == longest for _, spans in held for _, _, one in spans)
    if full and all(mask is None for own in masks for mask in own):
        return None
    allowed = torch.zeros((len(held), kv.layer.kv_heads, queries, longest), dtype=torch.bool, device=kv.layer.device)
    for i, (own, (_, spans)) in enumerate(zip(masks, held, strict=True)):
        for mask, (span, _, one) in zip(own, spans, strict=True):
            allowed[i, span, :, : one.k.shape[1]] = True if mask is None else mask
    return allowed


def _note(
    kv: PagedKV, held: HeldRows, q: Tensor, k: Tensor, allowed: Tensor | None, weights: Tensor | None, scale: float
) -> None:
    """Keep the attention that tokens got. Only eager attention tells its weights; beside the others they are computed
    once more, which is what a method pays there that selects by attention."""
    if q.shape[2] > 1:
        raise ValueError("attention is accumulated query by query")
    n, heads = len(q), kv.layer.kv_heads
    if weights is None:
        grouped = q.reshape(n * heads, -1, q.shape[3])
        mask = None if allowed is None else allowed.flatten(0, 1)
        weights = probabilities(grouped, k.flatten(0, 1), scale, mask)
    mean = weights.float().view(n, heads, -1, k.shape[2]).mean(2)
    for own, (row, spans) in zip(mean, held, strict=True):
        for span, used, one in spans:
            note(kv, row, span, used, one, own[span, : one.k.shape[1]])


def _additive(q: Tensor, allowed: Tensor | None, group: int) -> Tensor | None:
    """As transformers' masks: 0, and the lowest number where nothing may be read; for each query head, or one for
    all."""
    if allowed is None:
        return None
    zero = torch.zeros((), dtype=q.dtype, device=q.device)
    mask = torch.where(allowed, zero, torch.finfo(q.dtype).min)
    return mask if mask.shape[1] == 1 else mask.repeat_interleave(group, dim=1)


def _module(q: Tensor, k: Tensor) -> Any:
    """What these functions ask of the attention module."""
    return SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False, is_causal=False)


def _eager(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    from transformers.models.llama.modeling_llama import eager_attention_forward

    module = _module(q, k)
    mask = _additive(q, allowed, module.num_key_value_groups)
    return cast("tuple[Tensor, Tensor]", eager_attention_forward(module, q, k, v, mask, scaling=scale))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = _module(q, k)
    mask = _additive(q, allowed, module.num_key_value_groups)
    causal = mask is None and q.shape[2] > 1
    return sdpa_attention_forward(module, q, k, v, mask, scaling=scale, is_causal=causal)[0], None


def _flash(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float) -> tuple[Tensor, Tensor | None]:
    """Rows and kv heads of any length, since each is a sequence of its own there."""
    from flash_attn import flash_attn_with_kvcache

    n, heads, queries, dim = q.shape
    kv_heads, longest = k.shape[1:3]
    lengths = torch.full((n * kv_heads,), longest, dtype=torch.int32, device=q.device)
    if allowed is not None:
        if queries > 1:
            raise ValueError("flash-attn takes one query at a time where sequences differ in length")
        newest = allowed[:, :, -1].flatten(0, 1)
        lengths = newest.sum(1, dtype=torch.int32)
        if bool((newest.int().argmin(1) != lengths % longest).any()):
            raise ValueError("flash-attn takes no mask, and this cache has holes or a window")
    grouped = q.reshape(n * kv_heads, heads // kv_heads, queries, dim).transpose(1, 2)
    k, v = (x.reshape(n * kv_heads, longest, 1, dim) for x in (k, v))
    out = flash_attn_with_kvcache(grouped, k, v, cache_seqlens=lengths, softmax_scale=scale, causal=queries > 1)
    return out.view(n, kv_heads, queries, -1, dim).transpose(1, 2).reshape(n, queries, heads, dim), None


FUNCTIONS: dict[str, Attend] = {"eager": _eager, "sdpa": _sdpa, "flash-attn": _flash}
