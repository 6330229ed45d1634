"""Attention mass of a prompt in C++."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kvsuite.kernels.cpu.build import BuildError, library
from kvsuite.kernels.cpu.native import DTYPES, running
from kvsuite.kernels.cpu.structures import Mass
from kvsuite.kernels.reference import column_mass as in_pytorch

PARTS = 8
"""A kv head's queries are summed in so many parts, whoever computes them, so that threads do not change a sum."""


def column_mass(
    q: Tensor,
    k: Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    last: int | None = None,
) -> Tensor:
    """As the reference's, which does it where there is no compiler."""
    try:
        native = library("mass.cpp", {})
    except BuildError:
        return in_pytorch(q, k, scale, window, softcap, sink_logits, last)
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    (heads, length, dim), kv_heads = q.shape, k.shape[0]
    size = native.panel_size()
    padded = -(-length // size) * size
    panels, sums = torch.empty(kv_heads, padded, dim), torch.empty(kv_heads, PARTS, padded)
    out, sinks = torch.empty(kv_heads, length), None if sink_logits is None else sink_logits.float().contiguous()
    call = Mass(
        q.data_ptr(), k.data_ptr(), q.stride()[:2], k.stride()[:2], DTYPES[q.dtype], kv_heads, heads // kv_heads,
        length, dim, 0 if last is None else max(0, length - last), scale, softcap or 0.0, window or 0, PARTS,
        None if sinks is None else sinks.data_ptr(), panels.data_ptr(), sums.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    native.column_mass(ctypes.byref(call), ctypes.byref(running()))
    return out
