"""The table of methods: each property of METHODS.md is checked over all of its rows. A new method is one new row."""

import torch

from kvsuite.cache.context import LayerContext
from kvsuite.cache.layer import LayerCache
from kvsuite.cache.prefill import Observation
from kvsuite.cache.rope import Rope
from kvsuite.kernels.mass import column_mass
from kvsuite.methods import Method, parse

METHODS = {
    # at sizes where every part of it acts within some 60 tokens: the same, keeping all of 100 tokens in 16 bit
    "full": "full",
    "jitter": None,
    "int8": None,
    "int4": None,
    "fp8": None,
    "fp8:per=token": None,
    "kivi:bits=4": "kivi:bits=4",
    "kivi:bits=2": "kivi:bits=2",
    "kivi:bits=4,group=16,residual=32": "kivi:bits=4,group=16",
    "kivi:bits=2,group=8,residual=16": "kivi:bits=2,group=8",
    "streaming-llm:budget=24": "streaming-llm:budget=100",
    "streaming-llm:budget=20,positions=absolute": "streaming-llm:budget=120,positions=absolute",
    "h2o:budget=16": "h2o:budget=100",
    "h2o:heavy=5,recent=9": "h2o:heavy=50,recent=50",
    "random:budget=20 + uniform": "random:budget=100 + uniform",
    "h2o:budget=16 + kivi:bits=4,group=16,residual=32": "h2o:budget=100 + kivi:bits=4",
    "h2o:budget=40 + kivi:bits=2,group=8,residual=16": "h2o:budget=100 + kivi:bits=2",
    "streaming-llm:budget=36 + kivi:bits=4,group=16,residual=32": "streaming-llm:budget=100 + kivi:bits=4",
    "streaming-llm:budget=31 + kivi:bits=4,group=16,residual=32": "streaming-llm:budget=100 + kivi:bits=4",
    "random:budget=20 + int8": None,
    "random:budget=36 + kivi:bits=2,group=8,residual=16": "random:budget=100 + kivi:bits=2",
    "h2o:budget=16 + int8": None,
    "h2o:budget=16 + int4": None,
    "streaming-llm:budget=24 + fp8:per=token": None,
    "streaming-llm:budget=24 + jitter": None,
}
STEPWISE = [text for text in METHODS if parse(text).selector and parse(text).selector.evictor(100)]
SELECTING = [text for text in METHODS if parse(text).selector]
CODECS = [text for text in METHODS if not parse(text).selector]
CHUNKED = [text for text in METHODS if text not in STEPWISE]

HEADS, KV_HEADS, DIM = 4, 2, 32
SCALE = DIM**-0.5


def layer(dtype: torch.dtype = torch.bfloat16, index: int = 0, kv_dtype: torch.dtype | None = None) -> LayerContext:
    rope = Rope(1e4 ** (-torch.arange(0, DIM, 2) / DIM))
    return LayerContext(index, HEADS, KV_HEADS, DIM, dtype, kv_dtype or dtype, torch.device("cpu"), rope)


def tokens(n: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (HEADS, n, DIM), k and v (KV_HEADS, n, DIM); K has channels of unlike size and offset, as models' keys have."""
    noise = torch.Generator().manual_seed(seed)
    q = torch.randn(HEADS, n, DIM, generator=noise)
    k = torch.randn(KV_HEADS, n, DIM, generator=noise) * torch.linspace(0.3, 2, DIM) + torch.linspace(-1, 1, DIM).sin()
    v = torch.randn(KV_HEADS, n, DIM, generator=noise)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def context(length: int, seed: int, dtype: torch.dtype = torch.bfloat16, index: int = 0) -> Observation:
    q, k, v = tokens(length, seed, dtype)
    return Observation(index, k, v, column_mass(q, k, SCALE))


def loaded(
    method: Method,
    contexts: list[Observation],
    new: int,
    dtype: torch.dtype = torch.bfloat16,
    index: int = 0,
    kv_dtype: torch.dtype | None = None,
) -> LayerCache:
    """A cache with one row per context, compressed, and room for ``new`` tokens more."""
    capacity = max(method.capacity(seen.k.shape[1], new) for seen in contexts)
    cache = method.cache(layer(dtype, index, kv_dtype), len(contexts), capacity)
    for row, seen in enumerate(contexts):
        method.compress(row, [seen], [cache])
    return cache


def same(one: LayerCache, other: LayerCache, row: int = 0, other_row: int = 0) -> bool:
    """Whether two rows hold the same, bit for bit."""
    pairs = zip(one.materialise(row), other.materialise(other_row), strict=True)
    return all(torch.equal(x, y) for a, b in pairs for x, y in ((a.k, b.k), (a.v, b.v), (a.positions, b.positions)))
