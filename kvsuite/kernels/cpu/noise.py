"""The control's noise in C++: in PyTorch it took a quarter of a decoding step."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kvsuite.kernels import noise
from kvsuite.kernels.cpu.build import BuildError, library


def half_ulp(x: Tensor, seed: int) -> Tensor:
    """As `noise.half_ulp`, with the same bits; that one does it on a GPU, where there is no compiler, and where a mode
    records torch's operations, which would not see a call into C++."""
    if x.device.type != "cpu" or _get_current_dispatch_mode() is not None:
        return noise.half_ulp(x, seed)
    try:
        native = library("noise.cpp", {})
    except BuildError:
        return noise.half_ulp(x, seed)
    x = x.contiguous()
    out, dim = torch.empty_like(x), x.shape[-1]
    weights = torch.empty(dim, dtype=torch.int64)
    call, number = (
        (native.half_ulp32, ctypes.c_int32) if x.dtype == torch.float32 else (native.half_ulp16, ctypes.c_int16)
    )
    call(
        *map(ctypes.c_void_p, (x.data_ptr(), out.data_ptr())), ctypes.c_int64(x.numel() // dim if dim else 0),
        ctypes.c_int64(dim), ctypes.c_uint64(seed % 2**64), *map(number, (noise.ulp(x.dtype), noise.top(x.dtype))),
        ctypes.c_void_p(weights.data_ptr()),
    )  # fmt: skip
    return out
