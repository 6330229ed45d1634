"""What codecs lose of K, of V and of attention, and their bytes: ``python suites/findings/codecs.py``.

One layer: 1,024 tokens, 8 query heads over 2 kv heads, head dimension 128, bfloat16, no model. *normal*: independent
normal numbers. *channels*: three key channels are 10 to 20 times as large, as models' keys have. *tokens*: one key in
fifty is 5 times as long. *offset*: all key channels have 4 in common. K and V: the relative error of what is held, in
the Frobenius norm. Attention: the same of the output of 64 queries, to the float64 output over uncompressed K and V.
Bytes: of 4,096 tokens, as allocated, over bfloat16's.
"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvsuite.cache.prefill import PrefilledLayer
from kvsuite.kernels.context import AttentionParams, LayerContext
from kvsuite.methods import parse

METHODS = (
    "int8", "int8:rotate=hadamard", "fp8", "q8_0", "int4", "int4:rotate=hadamard", "q4_0", "nvfp4",
    "nvfp4:scale=4over6", "mxfp4", "kivi:bits=4", "kivi:bits=2", "turboquant:bits=k8v4", "turboquant:bits=k4v4",
    "turboquant:bits=k4v4,seed=1", "turboquant:bits=k3v4", "turboquant:bits=k3v3", "turboquant:bits=k4v2",
    "kvarn:bits=k4v4", "kvarn:bits=k4v2", "gear:bits=4", "gear-l:bits=4", "gear:bits=2", "gear-l:bits=2",
)  # fmt: skip
KINDS = ("normal", "channels", "tokens", "offset")
HEADS, KV_HEADS, DIM = 8, 2, 128
LAYER = LayerContext(0, HEADS, KV_HEADS, DIM, torch.bfloat16, torch.bfloat16, torch.device("cpu"))


def numbers(kind: str, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """q (HEADS, 64, DIM), k and v (KV_HEADS, tokens, DIM), bfloat16."""
    noise = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(h, n, DIM, generator=noise) for h, n in ((HEADS, 64), (KV_HEADS, tokens), (KV_HEADS, tokens))
    )
    if kind == "channels":
        k[..., [5, 40, 90]] *= torch.tensor([10.0, 15.0, 20.0])
    elif kind == "tokens":
        k[:, ::50] *= 5
    elif kind == "offset":
        k += 4
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v in float64, (HEADS, 64, DIM)."""
    group = HEADS // KV_HEADS
    k, v = (x.double().repeat_interleave(group, 0) for x in (k, v))
    return (q.double() @ k.transpose(1, 2) * DIM**-0.5).softmax(-1) @ v


def held(text: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """K and V as a cache of the method holds them, and its bytes."""
    cache = parse(text).cache(LAYER, 1, k.shape[1], backend="reference")
    cache.load(0, PrefilledLayer(0, k, v, {}, AttentionParams(DIM**-0.5)))
    views = cache.read()
    return torch.stack([x.k for x in views]), torch.stack([x.v for x in views]), cache.row_nbytes(0)


def lost(given: Tensor, found: Tensor) -> str:
    """The relative error in per cent."""
    return f"{100 * float((found.double() - given.double()).norm() / given.double().norm()):.2g} %"


def main() -> None:
    """Print the table."""
    table = Table(
        "codec", "bytes", "V", *[f"{what}, {kind}" for kind in KINDS for what in ("K", "attention")], box=None
    )
    given = {kind: numbers(kind, 1024) for kind in KINDS}
    expected = {kind: attended(*x) for kind, x in given.items()}
    _, k, v = numbers("normal", 4096)
    for text in METHODS:
        cells = [f"{held(text, k, v)[2] / (4096 * LAYER.token_bytes):.3f}"]
        for kind, (q, own_k, own_v) in given.items():
            found_k, found_v, _ = held(text, own_k, own_v)
            cells += [lost(own_v, found_v)] if kind == "normal" else []
            cells += [lost(own_k, found_k), lost(expected[kind], attended(q, found_k, found_v))]
        table.add_row(text, *cells)
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
