"""The table of methods, made of the parts that docs/methods.md lists: each property is checked over all of its rows. A
new method is one new row."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from kvsuite import registry
from kvsuite.cache.layer import LayerCache
from kvsuite.cache.observations import AttentionMass, ExtraPass, LastQueries, Observation, QueryCentres
from kvsuite.cache.prefill import PrefillCache, PrefilledLayer
from kvsuite.kernels.context import AttentionParams, LayerContext
from kvsuite.kernels.cpu.build import BuildError, compiler
from kvsuite.kernels.rope import Rope
from kvsuite.methods import Method, parse

CHECKS = Path(__file__).parent
sys.path += [str(CHECKS / "plugin"), str(CHECKS.parents[1] / "docs" / "examples")]  # as if installed, with entry points
registry.known.cache_clear()

HEADS, KV_HEADS, DIM = 4, 2, 32
SCALE = DIM**-0.5
KVZAP = CHECKS / "kvzap.safetensors"
"""Weights for as many layers as a check has, alike for all heads."""
SHARES = CHECKS / "shares.json"

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
    "snapkv:budget=24,window=8,kernel=3": "snapkv:budget=120,window=8",
    "snapkv:budget=40,window=16,kernel=7,pool=avg + int8": None,
    "snapkv:budget=24,window=8 + ada + kivi:bits=4,group=16,residual=32": "snapkv:budget=100,window=8 + ada + kivi",
    "h2o:budget=20 + ada": "h2o:budget=100 + ada",
    "knorm:budget=20 + ada:rule=kvpress": "knorm:budget=100 + ada:rule=kvpress",
    "streaming-llm:budget=24 + ada + int4": None,
    "int4:rotate=hadamard": None,
    "nvfp4:scale=4over6": None,
    "mxfp4": None,
    "q8_0": None,
    "q4_0": None,
    "q8_0:rotate=hadamard": None,
    "h2o:budget=40 + q4_0:rotate=hadamard": None,
    "nvfp4:rotate=hadamard": None,
    "turboquant:bits=k4v4,seed=3": None,
    "turboquant:bits=k4v2": None,
    "kvarn:bits=k4v2": None,
    "h2o:budget=40 + kvarn:bits=k4v4": None,
    "gear:bits=4,residual=32": "gear:bits=4,residual=128",
    "gear-l:bits=2,rank=0.1,residual=32,order=after": None,
    "kivi:bits=2,group=16,residual=32,order=after": "kivi:bits=2,group=16,order=after",
    "int8:skip_first=1": "int8:skip_first=1",
    "knorm:budget=20": "knorm:budget=100",
    "knorm:budget=20 + layers": "knorm:budget=100 + layers",
    "keydiff:budget=20 + int8": None,
    "tova:budget=16": "tova:budget=100",
    "tova:budget=20,recent=1 + kivi:bits=4,group=16,residual=32": "tova:budget=100,recent=1 + kivi:bits=4",
    "lagkv:budget=24,sinks=2,lag=8": "lagkv:budget=100,sinks=2,lag=8",
    "observed-attention:budget=20 + ada": "observed-attention:budget=100 + ada",
    "expected-attention:budget=20,future=64": "expected-attention:budget=100",
    "leverage:budget=20,sketch=16": "leverage:budget=100",
    "compactor:budget=24,chunk=16,sketch=16,sinks=2,recent=3": "compactor:budget=100",
    "r-kv:budget=24,every=16": "r-kv:budget=100,every=16",
    "snapkv:budget=24,window=8 + pyramid": "snapkv:budget=100,window=8 + pyramid",
    "kvzip:budget=20,sinks=2": "kvzip:budget=100",
    "kvzip-plus:budget=20,sinks=2 + dms + int8": None,
    "knorm:budget=20 + dms": "knorm:budget=100 + dms",
    f"kvzap:weights={KVZAP},budget=20,recent=3": f"kvzap:weights={KVZAP},budget=100,recent=3",
    f"random + headwise:shares={SHARES}": None,
    "triattention:budget=24,every=16": "triattention:budget=100,every=16",
    "triattention:budget=30,every=16 + kivi:bits=4,group=16,residual=32": None,
    "think:recent=8": "think:prune=0",
    "quest:budget=64,dense=0": "quest:budget=320,dense=0",
    "h2o:budget=70 + int8 + rocketkv:budget=32,channels=8": None,
    # from outside, by entry points: docs/examples, and plugin/kvsuite_fixtures.py
    "redundant:budget=24,every=16": "redundant:budget=100,every=16",
    "redundant:budget=30,every=16 + kivi:bits=4,group=16,residual=32": None,
    "top-pages:top=2": "top-pages:top=9",
    "h2o:budget=40 + int8 + top-pages:top=1": None,
    "codebook": None,
}
ELSEWHERE = {"loud": "test_outside.py, since it needs a model's hidden states at each step"}
EVERY_STEP = [
    text for text in METHODS if parse(text).selector and getattr(parse(text).selector.eviction, "every", 0) == 1
]
COMPACTING = [
    text for text in METHODS if parse(text).selector and getattr(parse(text).selector.eviction, "every", 0) > 1
]
READING = [text for text in METHODS if parse(text).reader]
STEPWISE = [*EVERY_STEP, *COMPACTING, *(text for text in READING if text not in EVERY_STEP)]
SELECTING = [text for text in METHODS if parse(text).selector]
CODECS = [text for text in METHODS if not parse(text).selector and not parse(text).reader]
CHUNKED = [text for text in METHODS if text not in STEPWISE]
RAGGED = [text for text in METHODS if parse(text).budget.ragged]
DECIDED = [text for text in METHODS if parse(text).budget.decides]
OBSERVED = list(dict.fromkeys(observation for text in METHODS for observation in parse(text).observes))


def has_compiler() -> bool:
    """Whether the cpu backend can be compiled here."""
    try:
        return bool(compiler())
    except BuildError:
        return False


def layer(
    dtype: torch.dtype = torch.bfloat16,
    index: int = 0,
    kv_dtype: torch.dtype | None = None,
    shape: tuple[int, int, int] = (HEADS, KV_HEADS, DIM),
) -> LayerContext:
    dim, cpu = shape[2], torch.device("cpu")
    rope = Rope(1e4 ** (-torch.arange(0, dim, 2) / dim))
    return LayerContext(index, *shape, dtype, kv_dtype or dtype, cpu, rope, layers=2, hidden_size=dim)


FITTED = [text for text in CODECS if any(spec.fitted(DIM, torch.bfloat16) for spec in parse(text).codec.specs(layer()))]
"""What each prompt teaches something."""


def tokens(n: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q (HEADS, n, DIM), k and v (KV_HEADS, n, DIM); K has channels of unlike size and offset, as models' keys have."""
    noise = torch.Generator().manual_seed(seed)
    q = torch.randn(HEADS, n, DIM, generator=noise)
    k = torch.randn(KV_HEADS, n, DIM, generator=noise) * torch.linspace(0.3, 2, DIM) + torch.linspace(-1, 1, DIM).sin()
    v = torch.randn(KV_HEADS, n, DIM, generator=noise)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def context(length: int, seed: int, dtype: torch.dtype = torch.bfloat16, index: int = 0) -> PrefilledLayer:
    """A prefilled layer of which all was observed that the table's methods ask for."""
    return prefilled(*tokens(length, seed, dtype), index)


def prefilled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, index: int = 0) -> PrefilledLayer:
    """The same of a prompt's own q (HEADS, T, DIM), k and v (KV_HEADS, T, DIM)."""
    return observed(layer(k.dtype, index), [*OBSERVED, *(LastQueries(n) for n in (8, 16, 32))], q, k, v)


def observed(
    where: LayerContext, asked: Sequence[Observation], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> PrefilledLayer:
    """A layer's prompt and what is asked of it. What only a model could show is stood in for: hidden states by keys, an
    extra pass by the attention of this one."""
    (one,) = PrefillCache([where], [AttentionMass(), *asked], "reference").layers
    one.hidden = k.amax(0)[None]
    one.update(k[None], v[None])
    one.attend(q[None], where.head_dim**-0.5, None, None, None)
    one.seen.observed.update({what: one.seen[AttentionMass()] for what in asked if isinstance(what, ExtraPass)})
    return one.seen


def plain(k: torch.Tensor, v: torch.Tensor, mass: torch.Tensor | None = None, index: int = 0) -> PrefilledLayer:
    """k, v (KV_HEADS, n, DIM) of which nothing was observed but the attention mass, if that; its queries are always the
    same."""
    heads, dim = len(k) * HEADS // KV_HEADS, k.shape[-1]
    queries = torch.linspace(-1, 1, 32 * dim).sin().view(1, 32, dim)[:, : k.shape[1]].expand(heads, -1, -1).to(k.dtype)
    observed = {LastQueries(32): queries, QueryCentres(): torch.ones(heads, dim + dim // 2)}
    observed |= {} if mass is None else {AttentionMass(): mass}
    return PrefilledLayer(index, k, v, observed, AttentionParams(SCALE))


def loaded(
    method: Method,
    contexts: list[PrefilledLayer],
    new: int,
    dtype: torch.dtype = torch.bfloat16,
    index: int = 0,
    kv_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> LayerCache:
    """A cache with one row per context, compressed, and room for ``new`` tokens more."""
    where, lengths = layer(dtype, index, kv_dtype), [seen.k.shape[1] for seen in contexts]
    slots, pages = (max(size) for size in zip(*[sizes(method, where, n, new) for n in lengths], strict=True))
    cache = method.cache(where, len(contexts), slots, pages, backend=backend)
    for row, seen in enumerate(contexts):
        method.compress(row, [seen], [cache])
    return cache


def sizes(method: Method, where: LayerContext, length: int, new: int) -> tuple[int, int]:
    """Slots and pages of a row for a context of ``length`` and ``new`` tokens more."""
    return method.capacity(length, new), method.pages(where, length, new)


def same(one: LayerCache, other: LayerCache, row: int = 0, other_row: int = 0) -> bool:
    """Whether two rows hold the same, bit for bit."""
    pairs = zip(one.read(row), other.read(other_row), strict=True)
    return all(torch.equal(x, y) for a, b in pairs for x, y in ((a.k, b.k), (a.v, b.v), (a.positions, b.positions)))
