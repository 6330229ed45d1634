"""Which dtype this machine computes a model fastest in. K and V keep the checkpoint's dtype either way."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch

from kvsuite.engines import ranks

PROMPT, WIDTH, STEPS = 128, 8, 1.5
"""What is weighed: the product of a layer with ``PROMPT`` prompt tokens, and ``STEPS`` decoding steps of ``WIDTH`` rows
for each such product. That is a prompt of 1,024 tokens and an answer of 96 in a batch of 8."""
REPEATS = 5


def compute_dtype(model: Any, asked: str) -> tuple[torch.dtype, str]:
    """The dtype to compute a model in, and why. ``asked``: auto, bfloat16 or float32.

    On a CPU, auto measures the checkpoint's dtype against float32 on the model's widest linear layer: a CPU without
    bfloat16 instructions computes in float32 several times faster. The fastest of 5 alternating repeats counts.
    """
    own: torch.dtype = model.dtype
    if asked != "auto":
        return getattr(torch, asked), f"--kv-dtype {asked}"
    if model.device.type != "cpu" or own == torch.float32:
        return own, "the checkpoint's"
    layer = max((m for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear)), key=_size, default=None)
    if layer is None:
        return own, "the checkpoint's"
    seconds = _measure(layer, (own, torch.float32))
    ratio = seconds[own] / seconds[torch.float32]
    best = own if ratio <= 1 else torch.float32
    how = "faster" if ratio <= 1 else "slower"
    return best, f"measured here: {dtype_name(own)} is {max(ratio, 1 / ratio):.1f} times {how} than float32"


def _measure(layer: torch.nn.Linear, dtypes: tuple[torch.dtype, ...]) -> dict[torch.dtype, float]:
    """Seconds of the weighed products, by dtype, on one thread: several wait for each other where other work runs,
    which takes longer than a product."""
    best: dict[tuple[torch.dtype, int], float] = {}
    threads = torch.get_num_threads()
    with torch.inference_mode(), contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        weight = ranks.local(layer.weight)
        sides = {dtype: (weight.to(dtype), torch.randn(PROMPT, weight.shape[1]).to(dtype)) for dtype in dtypes}
        for _ in range(REPEATS):
            for dtype, (weight, x) in sides.items():
                for rows in (PROMPT, WIDTH):
                    start = time.perf_counter()
                    torch.nn.functional.linear(x[:rows], weight)
                    seconds = time.perf_counter() - start
                    best[dtype, rows] = min(seconds, best.get((dtype, rows), seconds))
    return {dtype: best[dtype, PROMPT] + STEPS * best[dtype, WIDTH] for dtype in dtypes}


def _size(layer: torch.nn.Linear) -> int:
    return layer.weight.numel()


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16``, ``float32`` …, as options and records spell it."""
    return str(dtype).removeprefix("torch.")
