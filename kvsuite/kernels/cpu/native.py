"""A `PagedKV` as the C++ library sees it: the structures of kv.h, attend.h and store.h, and the calls."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvsuite.kernels.context import AttentionParams, LayerContext
from kvsuite.kernels.cpu import threads
from kvsuite.kernels.cpu.build import library
from kvsuite.kernels.cpu.structures import Append, Attend, Cache, Fill, Pointer, Store, Threads
from kvsuite.kernels.paged import KVStore, PagedKV
from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.kernels.reference.store import KeepIndices, moved

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
LAYOUTS = {"plain": 0, "token": 1, "channel": 2, "fp8": 3}


def running() -> Threads:
    """Torch's threads, as many as it uses now."""
    return Threads(threads.parallel(), torch.get_num_threads())


def compiled(layer: LayerContext, k: QuantSpec, v: QuantSpec) -> ctypes.CDLL:
    """The library for a layer and its formats. Raises BuildError."""
    return library("layer.cpp", macros(layer, k, v))


def macros(layer: LayerContext, k: QuantSpec, v: QuantSpec) -> dict[str, int]:
    """What layer.cpp is told of them."""
    made = {"HEAD_DIM": layer.head_dim, "GROUP": layer.heads // layer.kv_heads}
    for name, spec in (("K", k), ("V", v)):
        group = spec.group if spec.layout in ("token", "channel") else 1
        own = {
            "LAYOUT": LAYOUTS[spec.layout],
            "BITS": spec.bits,
            "GROUP": group,
            "RESIDUAL": spec.residual,
            "ROLLING": int(spec.rolling),
            "DTYPE": DTYPES[spec.stored_dtype(layer.head_dim, layer.kv_dtype)],
            "TOKEN_SCALE": int(spec.layout == "fp8" and spec.scale is None),
        }
        made |= {f"{name}_{key}": value for key, value in own.items()}
    return made


class Native:
    """A cache's places and the library for it. Its tensors and the host's counts never move."""

    def __init__(self, kv: PagedKV) -> None:
        layer, host = kv.layer, kv.host
        self.library = compiled(layer, kv.k.spec, kv.v.spec)
        rope = layer.rope if kv.needs.rerotated_sinks else None
        self.frequency = None if rope is None else rope.inverse_frequency.float().contiguous().numpy()
        self.cache = Cache(
            *kv.page_table.shape, kv.page_table.data_ptr(), host.slots.ctypes.data, host.tokens.ctypes.data,
            host.seen.ctypes.data, _pointer(kv.positions), _pointer(kv.accumulated_attention),
            _pointer(kv.newest_attention), _store(kv.k), _store(kv.v),
            *((None, 0) if self.frequency is None else (self.frequency.ctypes.data, len(self.frequency))),
            0 if rope is None else kv.needs.rerotated_sinks, _pointer(kv.original_sinks),
        )  # fmt: skip
        self.batch: tuple[int | None, ...] = ()
        self.items, self.rows, self.all_rows = (np.zeros(0, dtype=np.int64) for _ in range(3))

    def fill(
        self, kv: PagedKV, row: int, k: Tensor, v: Tensor, keep: KeepIndices | None, accumulated: Tensor | None
    ) -> None:
        """Write a prompt into a row that was admitted."""
        k, v = _written(kv, k, v)
        kept, counts = None, None
        if keep is not None:
            keep = [index.contiguous() for index in keep]
            kept = (Pointer * len(keep))(*[index.data_ptr() for index in keep])
            counts = np.array([len(index) for index in keep], dtype=np.int64)
        mass = None if accumulated is None else accumulated.contiguous()
        call = Fill(
            k.data_ptr(), v.data_ptr(), k.stride()[:2], v.stride()[:2], DTYPES[k.dtype], row, k.shape[1],
            None if kept is None else ctypes.addressof(kept), None if counts is None else counts.ctypes.data,
            _pointer(mass),
        )  # fmt: skip
        self._run(self.library.kv_fill, call)

    def append(self, kv: PagedKV, k: Tensor, v: Tensor, rows: Sequence[int | None]) -> None:
        """Write the tokens that were counted."""
        self._bind(rows)
        k, v = _written(kv, k, v)
        call = Append(
            k.data_ptr(), v.data_ptr(), k.stride()[:3], v.stride()[:3], DTYPES[k.dtype], len(self.items), k.shape[2],
            self.items.ctypes.data, self.rows.ctypes.data, kv.mapping.slots.ctypes.data,
        )  # fmt: skip
        self._run(self.library.kv_append, call)

    def attend(self, kv: PagedKV, q: Tensor, rows: Sequence[int | None], params: AttentionParams) -> Tensor:
        """Attention of the newest tokens; q and the result (len(rows), heads, Q, head_dim)."""
        self._bind(rows)
        items, heads, queries, dim = q.shape
        out = q.new_empty(items, queries, heads, dim).transpose(1, 2)  # as the model goes on with it
        if len(self.items) < items or not kv.host.slots[self.rows].all():
            out.zero_()
        sinks = None if params.sink_logits is None else params.sink_logits.float().contiguous()
        q = q if q.stride(3) == 1 else q.contiguous()
        call = Attend(
            q.data_ptr(), out.data_ptr(), q.stride()[:3], out.stride()[:3], DTYPES[q.dtype], items, queries,
            self.all_rows.ctypes.data, params.scale, params.softcap or 0.0, params.window or 0, _pointer(sinks),
        )  # fmt: skip
        self._run(self.library.kv_attend, call)
        return out

    def _bind(self, rows: Sequence[int | None]) -> None:
        """Have a batch's rows in memory: of all its items, -1 for an idle one, and of the others alone."""
        if self.batch != (batch := tuple(rows)):
            self.batch = batch
            self.all_rows = np.array([-1 if row is None else row for row in batch], dtype=np.int64)
            self.items = np.flatnonzero(self.all_rows >= 0)
            self.rows = self.all_rows[self.items]

    def _run(self, function: Any, call: ctypes.Structure) -> None:
        function(ctypes.byref(self.cache), ctypes.byref(call), ctypes.byref(running()))


def native(kv: PagedKV) -> Native:
    """The library's side of a cache, made at its first use."""
    if kv.native is None:
        kv.native = Native(kv)
    made: Native = kv.native
    return made


def _written(kv: PagedKV, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V as they are to be written, each token's numbers side by side, both of one dtype."""
    stores = kv.k, kv.v
    if any(store.spec.layout == "plain" for store in stores):
        pairs = zip(stores, (k, v), strict=True)
        moves = [moved(store.spec, x.to(store.residual.dtype)) for store, x in pairs]
        k, v = moves if moves[0].dtype == moves[1].dtype else [x.float() for x in moves]
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    return k, v


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _store(store: KVStore) -> Store:
    pools = [pool.data_ptr() for pool in store.pools] + [None, None]
    scale = store.spec.scale if store.spec.layout == "fp8" else None
    return Store(*pools[:3], store.residual.data_ptr(), 1.0 if scale is None else scale)
