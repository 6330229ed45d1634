"""The backend in Triton kernels. Pages lie anywhere in a pool; lengths are counted on the device, too, and nothing is
ever read back in a step, so that a CUDA graph replays it at other lengths."""

from __future__ import annotations

import dataclasses

from kvsuite.kernels.context import HeadView, LayerContext, Needs
from kvsuite.kernels.paged import PagedKV
from kvsuite.kernels.quantspec import PAGE, TURNED, QuantSpec
from kvsuite.kernels.reference import advance, compact, release_empty
from kvsuite.kernels.reference.attend import read as stored
from kvsuite.kernels.triton.attend import attend, readable
from kvsuite.kernels.triton.launch import interpreting
from kvsuite.kernels.triton.mass import column_mass
from kvsuite.kernels.triton.store import append, evict, fill

__all__ = [
    "NAME",
    "advance",
    "append",
    "attend",
    "column_mass",
    "compact",
    "evict",
    "fill",
    "read",
    "release_empty",
    "supports",
]

NAME = "triton"
ARENA = False
"""Pages come from a free list."""


def supports(layer: LayerContext, k: QuantSpec, v: QuantSpec, needs: Needs) -> str:
    """Why kernels cannot do this layer, in a few words; empty if they can."""
    specs = (k, v)
    if layer.device.type != "cuda" and not interpreting():
        return "no GPU"
    if not all(spec.layout for spec in specs):
        return "no kernel for this codec"
    if any(spec.rotation and (spec.layout not in TURNED or spec.residual) for spec in specs):
        return "no kernel for rotated K and V"
    if any(spec.late for spec in specs):
        return "no kernel for keys that are encoded after they have attended"
    if any(spec.fitted(layer.head_dim, layer.kv_dtype) for spec in specs):
        return "no kernel for a codec that is fitted to each prompt"
    if any(spec.stored_dtype(layer.head_dim, layer.kv_dtype) != layer.dtype for spec in specs):
        return f"what is stored is not {layer.dtype}, in which the model computes"
    if not all(readable(spec, layer.dtype, layer.head_dim) for spec in specs):
        return f"no kernel for {layer.dtype} with head dimension {layer.head_dim}"
    if needs.reads_some:
        return "no kernel that reads some pages only"
    if needs.newest_attention:
        return "no kernel for the newest query's attention"
    if needs.noted:
        return "no kernel for what an eviction notes of hidden states"
    if needs.rerotated_sinks:
        if k.layout != "plain":
            return "re-rotated sinks of encoded keys"
        if needs.rerotated_sinks > PAGE:
            return "more sinks than a page holds"
    return ""


def read(kv: PagedKV, row: int) -> list[HeadView]:
    """As the reference's. Where something is encoded kernels read it with other roundings than these."""
    exact = kv.k.spec.layout == kv.v.spec.layout == "plain"
    turned = bool(kv.k.spec.rotation), bool(kv.v.spec.rotation)
    return [dataclasses.replace(view, exact=exact, rotated=turned) for view in stored(kv, row)]
