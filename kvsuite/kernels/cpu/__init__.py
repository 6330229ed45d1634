"""The backend in C++ for CPUs: attention over codes as they are stored, compiled at first use for this very CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvsuite.kernels.context import AttentionParams, HeadView, LayerContext, Needs
from kvsuite.kernels.cpu.build import BuildError
from kvsuite.kernels.cpu.mass import column_mass
from kvsuite.kernels.cpu.native import DTYPES, LAYOUTS, compiled, native
from kvsuite.kernels.paged import PagedKV
from kvsuite.kernels.quantspec import PAGE, TURNED, QuantSpec
from kvsuite.kernels.reference import compact, evict, release_empty
from kvsuite.kernels.reference.attend import PageIndices
from kvsuite.kernels.reference.attend import read as stored
from kvsuite.kernels.reference.store import KeepIndices, keep_sinks

__all__ = [
    "NAME",
    "advance",
    "append",
    "attend",
    "column_mass",
    "compact",
    "evict",
    "evict_lowest",
    "fill",
    "read",
    "release_empty",
    "supports",
]

NAME = "cpu"
ARENA = True
"""Consecutive pages are what a CPU reads fastest."""


def supports(layer: LayerContext, k: QuantSpec, v: QuantSpec, needs: Needs) -> str:
    """Why it cannot do this layer, in a few words; empty if it can."""
    if layer.device.type != "cpu":
        return "the cache is not in the CPU's memory"
    for spec in (k, v):
        if reason := _unreadable(layer, spec):
            return reason
    if k.layout == "token" and k.group != layer.head_dim:
        return "keys with more than one scale per token"
    if k.residual and k.rolling:
        return "keys that leave the residual one by one"
    if v.layout == "levels":
        return "values as levels"
    if v.layout == "channel":
        return "values with a scale per channel"
    if needs.reads_some:
        return "a reader"
    if needs.noted:
        return "what an eviction notes of hidden states"
    if needs.rerotated_sinks and k.rotation:
        return "re-rotated sinks of rotated keys"
    if needs.rerotated_sinks > PAGE:
        return "more sinks than a page holds"
    try:
        compiled(layer, k, v)
    except BuildError as error:
        return str(error)
    return ""


def _unreadable(layer: LayerContext, spec: QuantSpec) -> str:
    dim = layer.head_dim
    if spec.layout not in LAYOUTS:
        return "no kernel for this codec"
    if spec.rotation and (spec.layout not in TURNED or spec.residual):
        return "no kernel for rotated K and V"
    if spec.late:
        return "no kernel for keys that are encoded after they have attended"
    if spec.fitted(dim, layer.kv_dtype):
        return "no kernel for a codec that is fitted to each prompt"
    if not {layer.dtype, spec.stored_dtype(dim, layer.kv_dtype)} <= DTYPES.keys():
        return f"no kernel for {layer.dtype} over {layer.kv_dtype}"
    if spec.bits not in {"token": (2, 4, 8), "channel": (2, 4, 8), "levels": (4,)}.get(spec.layout, (spec.bits,)):
        return f"no kernel for {spec.bits}-bit codes"
    if spec.layout in ("token", "channel", "symmetric") and (spec.group % PAGE or spec.block not in (1, PAGE)):
        return f"groups of {spec.group}, which is no multiple of {PAGE}"
    if spec.residual % PAGE:
        return f"a residual of {spec.residual}, which is no multiple of {PAGE}"
    bits = spec.stored_dtype(dim, layer.kv_dtype).itemsize * 8 if spec.layout == "plain" else spec.bits
    if dim * bits % 128 or dim > 512:
        return f"head dimension {dim} with {bits} bits"
    return ""


def fill(
    kv: PagedKV, row: int, k: Tensor, v: Tensor, keep: KeepIndices | None = None, accumulated: Tensor | None = None
) -> None:
    """As the reference's, with the same bits."""
    heads, length = k.shape[:2]
    kv.admit(row, np.full(heads, length) if keep is None else np.array([len(index) for index in keep]), length)
    native(kv).fill(kv, row, k, v, keep, accumulated)
    keep_sinks(kv, row, np.arange(heads))


def advance(kv: PagedKV, rows: Sequence[int | None], n: int = 1) -> None:
    """As the reference's."""
    native(kv).advance(kv, rows, n)


def append(kv: PagedKV, k: Tensor, v: Tensor, rows: Sequence[int | None]) -> None:
    """As the reference's, with the same bits."""
    native(kv).append(kv, k, v, rows)


def attend(
    kv: PagedKV, q: Tensor, rows: Sequence[int | None], params: AttentionParams, pages: PageIndices | None = None
) -> Tensor:
    """As the reference's. Codes are multiplied as they are: queries and weights are rounded to 16-bit integers, sums
    are exact."""
    assert pages is None
    if q.shape[2] > 1 and (kv.accumulated_attention is not None or kv.newest_attention is not None):
        raise ValueError("attention is accumulated query by query")
    return native(kv).attend(kv, q, rows, params)


def evict_lowest(kv: PagedKV, rows: Sequence[int | None], values: Tensor, first: int) -> None:
    """Of every (row, kv head) that holds more tokens than its budget evict the one with the lowest of ``values``,
    `PagedKV.positions` or attention, as `LowestEviction` scores them; the host counts it as gone.

    Tokens at positions below ``first`` stay, and as many recent ones as the sequence's parameter says."""
    native(kv).evict_lowest(kv, rows, values, first)


def read(kv: PagedKV, row: int) -> list[HeadView]:
    """As the reference's, which rounds what it decodes to the compute dtype; these kernels do not."""
    dtype, specs = kv.layer.dtype, (kv.k.spec, kv.v.spec)
    same = all(torch.promote_types(dtype, store.residual.dtype) == dtype for store in (kv.k, kv.v))
    exact = same and all(spec.layout == "plain" for spec in specs)
    integers = any(spec.layout in ("token", "channel", "symmetric") for spec in specs)
    turned = bool(kv.k.spec.rotation), bool(kv.v.spec.rotation)
    views = stored(kv, row)
    return [dataclasses.replace(view, exact=exact, integers=integers, rotated=turned) for view in views]
