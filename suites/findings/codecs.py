"""What codecs lose of K, of V and of attention, and their bytes: ``python suites/findings/codecs.py``.

One layer: 1,024 tokens, 8 query heads over 2 kv heads, head dimension 128, bfloat16, no model. *normal*: independent
normal numbers. *channels*: three key channels are 10 to 20 times as large, as models' keys have. *tokens*: one key in
fifty is 5 times as long. *offset*: all key channels have 4 in common. K and V: the relative error of what is held, in
the Frobenius norm. Attention: the same of the output of 64 queries, to the float64 output over uncompressed K and V.
Layer, model: bytes of 4,096 tokens, as allocated, over bfloat16's, of a layer that is compressed and of a model of 32
layers, some of which a method may leave whole.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvsuite.cache.layer import LayerCache
from kvsuite.cache.observations import AttentionMass
from kvsuite.cache.prefill import PrefilledLayer
from kvsuite.kernels.context import AttentionParams, LayerContext
from kvsuite.methods import parse

METHODS = (
    "int8", "int8:rotate=hadamard", "fp8", "q8_0", "q8_0:rotate=hadamard", "int4", "int4:rotate=hadamard", "q4_0",
    "q4_0:rotate=hadamard", "nvfp4", "nvfp4:rotate=hadamard", "nvfp4:scale=4over6", "mxfp4", "mxfp4:rotate=hadamard",
    "kivi:bits=4", "kivi:bits=2", "turboquant:bits=k8v4", "turboquant:bits=k4v4",
    "turboquant:bits=k4v4,seed=1", "turboquant:bits=k3v4", "turboquant:bits=k3v3", "turboquant:bits=k4v2",
    "kvarn:bits=k4v4", "kvarn:bits=k4v2", "gear:bits=4", "gear-l:bits=4", "gear:bits=2", "gear-l:bits=2",
)  # fmt: skip
BYTES = (
    "vllm:turboquant_4bit_nc", "vllm:turboquant_k3v4_nc", "vllm:turboquant_3bit_nc", "vllm:turboquant_k8v4",
    "h2o:budget=0.5 + ada",
)  # fmt: skip
"""Methods of which the bytes alone are shown: what they lose is a codec's above, or an eviction's."""
KINDS = ("normal", "channels", "tokens", "offset")
HEADS, KV_HEADS, DIM, LAYERS = 8, 2, 128, 32
LAYER = LayerContext(0, HEADS, KV_HEADS, DIM, torch.bfloat16, torch.bfloat16, torch.device("cpu"), layers=LAYERS)


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


def compressed(text: str, k: Tensor, v: Tensor, index: int = 0) -> LayerCache:
    """A layer's cache, filled. What a selector sees is drawn: attention mass."""
    method, length, where = parse(text), k.shape[1], replace(LAYER, index=index)
    mass = torch.rand(KV_HEADS, length, generator=torch.Generator().manual_seed(index))
    cache = method.cache(where, 1, method.capacity(length, 0), method.pages(where, length, 0), backend="reference")
    method.compress(0, [PrefilledLayer(index, k, v, {AttentionMass(): mass}, AttentionParams(DIM**-0.5))], [cache])
    return cache


def held(text: str, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """K and V as a cache of the method holds them."""
    views = compressed(text, k, v).read()
    return torch.stack([x.k for x in views]), torch.stack([x.v for x in views])


def shares(text: str) -> tuple[float, float]:
    """Bytes of 4,096 tokens over bfloat16's: of a layer in the middle, and of the model."""
    _, k, v = numbers("normal", 4096)
    codec, sizes = parse(text).codec, {}
    at = [codec.at(index, LAYERS) for index in range(LAYERS)]
    for index, own in enumerate(at):
        if own not in sizes:
            sizes[own] = compressed(text, k, v, index).row_nbytes(0) / (4096 * LAYER.token_bytes)
    return sizes[at[LAYERS // 2]], sum(sizes[own] for own in at) / LAYERS


def lost(given: Tensor, found: Tensor) -> str:
    """The relative error in per cent."""
    return f"{100 * float((found.double() - given.double()).norm() / given.double().norm()):.2g} %"


def main() -> None:
    """Print the table."""
    table = Table(
        "codec", "layer", "model", "V", *[f"{what}, {kind}" for kind in KINDS for what in ("K", "attention")], box=None
    )
    given = {kind: numbers(kind, 1024) for kind in KINDS}
    expected = {kind: attended(*x) for kind, x in given.items()}
    for text in METHODS:
        cells = [f"{share:.3f}" for share in shares(text)]
        for kind, (q, own_k, own_v) in given.items():
            found_k, found_v = held(text, own_k, own_v)
            cells += [lost(own_v, found_v)] if kind == "normal" else []
            cells += [lost(own_k, found_k), lost(expected[kind], attended(q, found_k, found_v))]
        table.add_row(text, *cells)
    for text in BYTES:
        table.add_row(text, *(f"{share:.3f}" for share in shares(text)))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
