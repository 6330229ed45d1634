"""A `PagedKV` as the C++ library sees it: the structures of the C++ sources, and the calls."""

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
from kvsuite.kernels.cpu.structures import Advance, Append, Attend, Cache, Evict, Fill, Pointer, Store, Threads
from kvsuite.kernels.paged import KVStore, PagedKV, SlotMapping
from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.kernels.reference.store import KeepIndices, moved

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
LAYOUTS = {"plain": 0, "token": 1, "channel": 2, "fp8": 3, "levels": 4, "symmetric": 5, "e2m1": 6}
FULL, PAGES = -1, 1
"""count.h: Advanced."""


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
        group = spec.group or 1
        own = {
            "LAYOUT": LAYOUTS[spec.layout],
            "BITS": spec.bits,
            "GROUP": group,
            "RESIDUAL": spec.residual,
            "ROLLING": int(spec.rolling),
            "DTYPE": DTYPES[spec.stored_dtype(layer.head_dim, layer.kv_dtype)],
            "TOKEN_SCALE": int(spec.layout == "fp8" and spec.scale is None),
            "ROTATED": int(bool(spec.rotation)),
            "CHOOSES": int(spec.chooses),
        }
        made |= {f"{name}_{key}": value for key, value in own.items()}
    return made


class Native:
    """A cache's places and the library for it. Its tensors and the host's counts never move, so the library is told of
    them once, and of a batch's rows when they change."""

    def __init__(self, kv: PagedKV) -> None:
        layer, host = kv.layer, kv.host
        self.library = compiled(layer, kv.k.spec, kv.v.spec)
        rope = layer.rope if kv.needs.rerotated_sinks else None
        self.frequency = None if rope is None else rope.inverse_frequency.float().contiguous().numpy()
        counts = (host.slots, host.tokens, host.seen, host.free_slot, host.limit, host.columns, host.budget)
        self.cache = Cache(
            *kv.page_table.shape, kv.page_table.data_ptr(), *[x.ctypes.data for x in counts],
            _pointer(kv.positions), _pointer(kv.accumulated_attention), _pointer(kv.newest_attention),
            _store(kv.k), _store(kv.v),
            *((None, 0) if self.frequency is None else (self.frequency.ctypes.data, len(self.frequency))),
            0 if rope is None else kv.needs.rerotated_sinks, _pointer(kv.original_sinks),
        )  # fmt: skip
        self.threads = running()
        self.advances, self.appends, self.attends, self.evicts = Advance(), Append(), Attend(), Evict()
        self.moves = any(store.spec.layout == "plain" and not store.spec.verbatim for store in (kv.k, kv.v))
        self.batch: tuple[int | None, ...] = (None,)
        self._bind(())

    def fill(
        self, kv: PagedKV, row: int, k: Tensor, v: Tensor, keep: KeepIndices | None, accumulated: Tensor | None
    ) -> None:
        """Write a prompt into a row that was admitted."""
        k, v = self._written(kv, k, v)
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

    def advance(self, kv: PagedKV, rows: Sequence[int | None], n: int) -> None:
        """Count n tokens more in each row, and allocate their pages."""
        self._bind(rows)
        call = self.advances
        call.tokens, call.evicts = n, kv.needs.evicts
        outcome = self.library.kv_advance(ctypes.byref(self.cache), ctypes.byref(call))
        if outcome == FULL:
            kv.advance(self.mapping.rows, n)  # which raises the same
        kv.mapping, kv.layout = self.mapping, None
        if outcome == PAGES:
            kv.allocate(self.mapping.rows)

    def append(self, kv: PagedKV, k: Tensor, v: Tensor, rows: Sequence[int | None]) -> None:
        """Write the tokens that were counted."""
        self._bind(rows)
        k, v = self._written(kv, k, v)
        call = self.appends
        call.k, call.v, call.dtype, call.tokens = k.data_ptr(), v.data_ptr(), DTYPES[k.dtype], k.shape[2]
        call.k_stride, call.v_stride, call.slots = k.stride()[:3], v.stride()[:3], kv.mapping.slots.ctypes.data
        self._run(self.library.kv_append, call)

    def attend(self, kv: PagedKV, q: Tensor, rows: Sequence[int | None], params: AttentionParams) -> Tensor:
        """Attention of the newest tokens; q and the result (len(rows), heads, Q, head_dim)."""
        self._bind(rows)
        items, heads, queries, dim = q.shape
        out = q.new_zeros(items, queries, heads, dim).transpose(1, 2)  # as the model goes on with it
        sinks = None if params.sink_logits is None else params.sink_logits.float().contiguous()
        q = q if q.stride(3) == 1 else q.contiguous()
        call = self.attends
        call.q, call.out, call.dtype, call.queries = q.data_ptr(), out.data_ptr(), DTYPES[q.dtype], queries
        call.q_stride, call.out_stride, call.sink_logits = q.stride()[:3], out.stride()[:3], _pointer(sinks)
        call.scale, call.softcap, call.window = params.scale, params.softcap or 0.0, params.window or 0
        self._run(self.library.kv_attend, call)
        return out

    def evict_lowest(self, kv: PagedKV, rows: Sequence[int | None], values: Tensor, first: int) -> None:
        """Evict a token of each head beyond its budget, and count it as gone."""
        self._bind(rows)
        call = self.evicts
        call.values, call.first = None if values is kv.positions else values.data_ptr(), first
        call.recent = _pointer(kv.parameters)
        self._run(self.library.kv_evict, call)
        kv.layout = None

    def _bind(self, rows: Sequence[int | None]) -> None:
        """Have a batch's rows in memory: of all its items, -1 for an idle one, and of the others alone."""
        batch = tuple(rows)
        if batch == self.batch:
            return
        self.batch = batch
        self.all_rows = np.array([-1 if row is None else row for row in batch], dtype=np.int64)
        self.items = np.flatnonzero(self.all_rows >= 0)
        self.rows = self.all_rows[self.items]
        self.mapping = SlotMapping(self.rows.tolist(), np.empty((len(self.rows), self.cache.kv_heads), dtype=np.int64))
        for call in (self.advances, self.appends, self.evicts):
            call.rows, call.items = self.rows.ctypes.data, len(self.rows)
        self.advances.slots, self.appends.item_of_row = self.mapping.slots.ctypes.data, self.items.ctypes.data
        self.attends.rows, self.attends.items = self.all_rows.ctypes.data, len(batch)

    def _written(self, kv: PagedKV, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V as they are to be written, each token's numbers side by side, both of one dtype."""
        if self.moves:
            pairs = ((kv.k, k), (kv.v, v))
            moves = [moved(store.spec, x.to(store.residual.dtype)) for store, x in pairs]
            k, v = moves if moves[0].dtype == moves[1].dtype else [x.float() for x in moves]
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        return k, v

    def _run(self, function: Any, call: ctypes.Structure) -> None:
        self.threads.count = torch.get_num_threads()
        function(ctypes.byref(self.cache), ctypes.byref(call), ctypes.byref(self.threads))


def native(kv: PagedKV) -> Native:
    """The library's side of a cache, made at its first use."""
    if kv.native is None:
        kv.native = Native(kv)
    made: Native = kv.native
    return made


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _store(store: KVStore) -> Store:
    pools = [pool.data_ptr() for pool in store.pools] + [None, None]
    scale = store.spec.scale
    return Store(*pools[:3], store.residual.data_ptr(), 1.0 if scale is None else scale)
