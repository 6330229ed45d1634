"""The OpenMP runtime of torch, whose threads the C++ kernels share."""

from __future__ import annotations

import ctypes
import functools


@functools.cache
def parallel() -> int:
    """The address of ``GOMP_parallel`` in the runtime that torch uses in this process; 0 if there is none.

    It is looked up as the loader does for torch: in the global scope, where a preloaded runtime comes first, then among
    what torch's extension is linked against. Runtimes that other packages brought are in neither.
    """
    import torch

    if not torch.backends.openmp.is_available():  # type: ignore[no-untyped-call]
        return 0
    for path in (None, torch._C.__file__):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value or 0
        except (OSError, AttributeError):
            continue
    return 0
