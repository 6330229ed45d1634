"""The structures that the C++ sources say, field by field."""

from __future__ import annotations

import ctypes

Pointer, Whole, Real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Store(ctypes.Structure):
    """kv.h: Store."""

    _fields_ = [
        ("codes", Pointer), ("scale", Pointer), ("zero", Pointer), ("residual", Pointer), ("tensor_scale", Real)
    ]  # fmt: skip


class Cache(ctypes.Structure):
    """kv.h: Cache."""

    _fields_ = [
        ("rows", Whole), ("kv_heads", Whole), ("columns", Whole), ("page_table", Pointer), ("slots", Pointer),
        ("tokens", Pointer), ("seen", Pointer), ("free_slot", Pointer), ("limit", Pointer), ("used_columns", Pointer),
        ("budget", Pointer), ("positions", Pointer), ("accumulated", Pointer), ("newest", Pointer),
        ("k", Store), ("v", Store), ("inverse_frequency", Pointer), ("rotary_half", Whole), ("sinks", Whole),
        ("original_sinks", Pointer),
    ]  # fmt: skip


class Attend(ctypes.Structure):
    """attend.h: Attend."""

    _fields_ = [
        ("q", Pointer), ("out", Pointer), ("q_stride", Whole * 3), ("out_stride", Whole * 3), ("dtype", Whole),
        ("items", Whole), ("queries", Whole), ("rows", Pointer), ("scale", Real), ("softcap", Real), ("window", Whole),
        ("sink_logits", Pointer),
    ]  # fmt: skip


class Advance(ctypes.Structure):
    """count.h: Advance."""

    _fields_ = [
        ("rows", Pointer), ("items", Whole), ("tokens", Whole), ("evicts", Whole), ("slots", Pointer)
    ]  # fmt: skip


class Evict(ctypes.Structure):
    """count.h: Evict."""

    _fields_ = [
        ("rows", Pointer), ("items", Whole), ("values", Pointer), ("first", Whole), ("recent", Pointer)
    ]  # fmt: skip


class Append(ctypes.Structure):
    """store.h: Append."""

    _fields_ = [
        ("k", Pointer), ("v", Pointer), ("k_stride", Whole * 3), ("v_stride", Whole * 3), ("dtype", ctypes.c_int),
        ("items", Whole), ("tokens", Whole), ("item_of_row", Pointer), ("rows", Pointer), ("slots", Pointer),
    ]  # fmt: skip


class Fill(ctypes.Structure):
    """store.h: Fill."""

    _fields_ = [
        ("k", Pointer), ("v", Pointer), ("k_stride", Whole * 2), ("v_stride", Whole * 2), ("dtype", ctypes.c_int),
        ("row", Whole), ("length", Whole), ("keep", Pointer), ("counts", Pointer), ("accumulated", Pointer),
    ]  # fmt: skip


class Threads(ctypes.Structure):
    """kv.h: Threads."""

    _fields_ = [("parallel", Pointer), ("count", Whole)]


class Mass(ctypes.Structure):
    """mass.cpp: Mass."""

    _fields_ = [
        ("q", Pointer), ("k", Pointer), ("q_stride", Whole * 2), ("k_stride", Whole * 2), ("dtype", Whole),
        ("kv_heads", Whole), ("group", Whole), ("length", Whole), ("dim", Whole), ("first", Whole), ("scale", Real),
        ("softcap", Real), ("window", Whole), ("parts", Whole), ("sink_logits", Pointer), ("panels", Pointer),
        ("sums", Pointer), ("out", Pointer),
    ]  # fmt: skip
