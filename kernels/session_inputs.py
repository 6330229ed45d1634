"""What `session.py` times: caches with random contents, libraries, models. Each can tell if its output is right."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from kvsuite.cache import adapter
from kvsuite.cache.context import LayerContext, SideCodec
from kvsuite.cache.fused import FusedCache
from kvsuite.cache.prefill import Observation
from kvsuite.engines.graph import StepGraph
from kvsuite.kernels.attend import stored
from kvsuite.kernels.fused import attend as fused
from kvsuite.kernels.paged import PAGE, Format, Paged, Side
from kvsuite.methods import Method, parse

Call = Callable[[], Any]
WRONG = 0.02
"""Relative error, in the Euclidean norm, beyond which nothing is timed: bfloat16 explains a quarter of it."""
CODED = {16: 0.001, 8: 0.05, 4: 0.2, 2: 0.7}
"""The same of a token that was encoded and read back, by bits."""


class Skip(Exception):
    """A cell that cannot be measured here, and why."""


class Wrong(RuntimeError):
    """What was to be timed does not compute what it should."""


@dataclass(frozen=True)
class Sizes:
    """Llama-3.1-8B's shape; 64 tokens short of round lengths, where KIVI's key residual is half full, as on average."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    shapes: tuple[tuple[int, int], ...] = (
        (32, 8128), (32, 32704), (8, 32704), (128, 8128), (1, 131008), (8, 8128), (1, 8128), (32, 960), (8, 960),
        (128, 960), (1, 960), (8, 131008), (1, 32704), (128, 32704), (32, 131008), (128, 131008),
    )  # fmt: skip
    prompts: tuple[int, ...] = (8192, 32768)
    start: int = 256
    batches: tuple[int, ...] = (32, 128)
    copied: int = 1 << 32
    repeats: int = 20
    kivi: str = ""
    h2o: str = "h2o:heavy=0.05,recent=0.05"
    budget: str = ""
    steps: int = 12
    vocabulary: int = 32000
    hidden: int = 4096
    inner: int = 14336
    layers: int = 4

    def model(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=self.inner, head_dim=self.dim,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=131072,
        )  # fmt: skip


TINY = Sizes(
    4, 2, 64, ((1, 64), (2, 100)), (100,), 64, (2,), 1 << 20, 3, ",residual=32", "h2o:heavy=8,recent=8", ":budget=20",
    1, 97, 64, 96, 1,
)  # fmt: skip


class Source:
    """Random tensors on the device, and the layer they are for."""

    def __init__(self, device: Any, tiny: bool) -> None:
        self.device, self.tiny, self.sizes = device, tiny, TINY if tiny else Sizes()
        z = self.sizes
        self.layer = LayerContext(0, z.heads, z.kv_heads, z.dim, torch.bfloat16, torch.bfloat16, device.at)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device.at)

    def lengths(self, batch: int, tokens: int) -> Tensor:
        return torch.full((batch, self.sizes.kv_heads), tokens, dtype=torch.int32, device=self.device.at)

    def side(self, codec: SideCodec, rows: int, pages: int) -> Side:
        """Random contents, numbers about as large as a standard normal's."""
        at, layer = (rows * self.layer.kv_heads * pages, PAGE // codec.block), self.layer
        kinds = enumerate(codec.fields(layer.head_dim, layer.dtype))
        fields = tuple([self.numbers(codec.format, i, (*at, *shape), dtype) for i, (shape, dtype) in kinds])
        residual = self.normal(rows, layer.kv_heads, codec.residual, layer.head_dim)
        return Side(codec.format, fields, residual, codec.rolling)

    def numbers(self, form: Format, i: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Field ``i`` of a format."""
        if form.kind == "fp8" and i == 0:
            wide = self.normal(*shape).mul_(1 if form.scale else 100).clamp_(-448, 448)
            return wide.to(torch.float8_e4m3fn).view(torch.uint8)
        x = torch.empty(shape, dtype=dtype, device=self.device.at)
        if form.kind == "plain":
            return x.normal_()
        if i == 0:
            return x.random_(0, 256)
        if form.kind == "fp8":
            return x.uniform_(0.008, 0.012)
        return x.uniform_(3, 4).div_((1 << form.bits) - 1) if i == 1 else x.uniform_(-2, -1.5)

    def observation(self, layer: LayerContext, tokens: int) -> Observation:
        k, v = (self.normal(layer.kv_heads, tokens, layer.head_dim) for _ in range(2))
        mass = torch.rand(layer.kv_heads, tokens, device=self.device.at)
        return Observation(layer.index, k, v, mass)


def held(paged: Paged, used: list[int]) -> int:
    """Bytes that attention must read of a cache (mass: and write), from the tensors themselves."""
    total = 4.0 * sum(-(-n // PAGE) for n in used)  # the page table
    for side in (paged.k, paged.v):
        done = sum(side.settled(n) for n in used)
        total += done * sum(x[0].nbytes for x in side.fields) / PAGE
        total += (sum(used) - done) * side.residual.shape[3] * side.residual.element_size()
    each = (0 if paged.positions is None else 4) + (0 if paged.mass is None else 8)
    return round(total + each * sum(used))


def expected(q: Tensor, paged: Paged, row: int, head: int, scale: float) -> tuple[Tensor, Tensor]:
    """float64 weights (group, n) and output (group, head_dim) of one (row, head)."""
    n, group = int(paged.used[row, head]), q.shape[1] // paged.table.shape[1]
    k, v = (stored(side, paged.table[row, head], row, head, n).double() for side in (paged.k, paged.v))
    scores = q[row, head * group : (head + 1) * group, 0].double() @ k.T * scale
    if paged.positions is not None:
        scores.masked_fill_(paged.positions[row, head, :n] < 0, -math.inf)
    p = scores.softmax(-1)
    return p, p @ v


def refuse(found: Tensor, wanted: Tensor, most: float = WRONG, what: str = "output") -> None:
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    if not error <= most:
        raise Wrong(f"{what} is wrong by {error:.3g}")


class Dense:
    """One input set of a library: q (batch, heads, 1, head_dim), k and v (batch, kv_heads, tokens, head_dim)."""

    def __init__(self, s: Source, batch: int, tokens: int) -> None:
        self.q = s.normal(batch, s.sizes.heads, 1, s.sizes.dim)
        self.k, self.v = (s.normal(batch, s.sizes.kv_heads, tokens, s.sizes.dim) for _ in range(2))
        self.nbytes = 2 * self.q.nbytes + self.k.nbytes + self.v.nbytes

    def refuse_wrong(self, out: Tensor) -> None:
        group = self.q.shape[1] // self.k.shape[1]
        p = (self.q[-1, -group:, 0].double() @ self.k[-1, -1].double().T * self.q.shape[3] ** -0.5).softmax(-1)
        refuse(out.view(self.q.shape)[-1, -group:, 0], p @ self.v[-1, -1].double())


def sdpa(backend: SDPBackend, dense: Dense, causal: bool = False) -> Call:
    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(dense.q, dense.k, dense.v, is_causal=causal, enable_gqa=True)

    return call


def flash_attn(dense: Dense) -> Call:
    from flash_attn import flash_attn_with_kvcache

    lengths = torch.full((len(dense.q),), dense.k.shape[2], dtype=torch.int32, device=dense.q.device)
    q, k, v = (x.transpose(1, 2) for x in (dense.q, dense.k, dense.v))
    return lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)


def flashinfer(dense: Dense) -> Call:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    (batch, heads, length, dim), q = dense.k.shape, dense.q
    each = length // 16
    pages = tuple(x.view(batch, heads, each, 16, dim).transpose(1, 2).reshape(-1, heads, 16, dim)
                  for x in (dense.k, dense.v))  # fmt: skip
    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=q.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    first = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * each
    index = torch.arange(batch * each, dtype=torch.int32, device=q.device)
    full = torch.full((batch,), 16, dtype=torch.int32, device=q.device)
    wrapper.plan(first, index, full, q.shape[1], heads, dim, 16, q_data_type=q.dtype, kv_data_type=q.dtype)
    return lambda: wrapper.run(q[:, :, 0], pages)


class Problem:
    """One input set of ours: a cache with random contents in scattered pages, and a query per row."""

    def __init__(self, s: Source, text: str, used: Tensor, *, mass: bool = False, ragged: bool = False, room: int = 64):
        rows, heads = used.shape
        most = int(used.max())
        pages = -(-(most + room) // PAGE)
        layer, there = s.layer, {"dtype": torch.int32, "device": s.device.at}
        self.counters = torch.stack([used, used, torch.full_like(used, most)])
        k, v = (s.side(codec, rows, pages) for codec in parse(text).codec.sides(layer))
        table = torch.randperm(rows * heads * pages, **there).view(rows, heads, pages)
        positions = None
        if ragged:
            slot, n = torch.arange(pages * PAGE, device=s.device.at), used[..., None]
            positions = torch.where(slot < n, slot * most // n.clamp(min=1), -1).int()
        scores = torch.rand(rows, heads, pages * PAGE, device=s.device.at) if mass else None
        freed = torch.full_like(used, -1)
        self.paged = Paged(k, v, table, *self.counters, freed, positions, scores)
        self.q, self.rows = s.normal(rows, layer.heads, 1, layer.head_dim), torch.arange(rows, **there)
        self.scale = layer.head_dim**-0.5
        self.nbytes = held(self.paged, used.flatten().tolist()) + 2 * self.q.nbytes

    def __call__(self) -> Tensor:
        return fused.attend(self.q, self.paged, self.rows, self.scale)

    def refuse_wrong(self) -> None:
        row, head = self.paged.table.shape[0] - 1, self.paged.table.shape[1] - 1
        p, wanted = expected(self.q, self.paged, row, head, self.scale)
        before = None if self.paged.mass is None else self.paged.mass[row, head].clone()
        refuse(self()[row, -p.shape[0] :, 0], wanted)
        if before is not None:
            refuse((self.paged.mass[row, head] - before)[: p.shape[1]], p.mean(0), what="attention mass")


def fused_cache(method: Method, layer: LayerContext, rows: int, capacity: int) -> FusedCache:
    """`Method.cache`, which takes the kernels on a GPU only, by kernels everywhere."""
    evictor = None if method.selector is None else method.selector.evictor(capacity)
    return FusedCache(layer, method.codec.sides(layer), rows, capacity, evictor, method.selector is not None)


class Evicting:
    """One input set of a step of a layer that gives up tokens: append, attention with mass, choice of a victim."""

    def __init__(self, s: Source, text: str, batch: int, tokens: int) -> None:
        method, layer = parse(text), s.layer
        self.cache = fused_cache(method, layer, batch, method.capacity(tokens, 64))
        for row in range(batch):
            method.compress(row, [s.observation(layer, tokens)], [self.cache])
        self.rows, self.scale = tuple(range(batch)), layer.head_dim**-0.5
        self.q = s.normal(batch, layer.heads, 1, layer.head_dim)
        self.k, self.v = (s.normal(batch, layer.kv_heads, 1, layer.head_dim) for _ in range(2))
        self._step()
        self.nbytes = held(self.cache.paged, self.cache.paged.used.flatten().tolist()) + 2 * self.q.nbytes

    def _step(self) -> None:
        """A step as the engine makes it, checked; from then on only the device counts, as in a replay."""
        self.cache.append(self.k, self.v, self.rows)
        p, wanted = expected(self.q, self.cache.paged, 0, 0, self.scale)
        out = self.cache.attend(self.q, self.scale, self.rows)
        refuse(out[0, : p.shape[0], 0], wanted)
        if not bool((self.cache.paged.freed >= 0).all()):
            raise Wrong("a head gave nothing up")
        self.cache.replaying = True

    def refuse_wrong(self) -> None:
        """Done when it was made."""

    def __call__(self) -> Tensor:
        self.cache.append(self.k, self.v, self.rows)
        return self.cache.attend(self.q, self.scale, self.rows)


def loaded(s: Source, model: Any, text: str, lengths: list[int], room: int) -> list[FusedCache]:
    """A model's caches, a random context in each row; the same ones each time."""
    torch.manual_seed(1)
    method, layers = parse(text), adapter.contexts(model)
    caches = [fused_cache(method, layer, len(lengths), method.capacity(max(lengths), room)) for layer in layers]
    for row, length in enumerate(lengths):
        method.compress(row, [s.observation(layer, length) for layer in layers], caches)
    return caches


@cache
def built(sizes: Sizes, device: torch.device) -> Any:
    """A model with random weights."""
    with torch.device(device):
        model = LlamaForCausalLM(sizes.model()).to(torch.bfloat16).eval()
    adapter.install(model)
    return model


class Walk:
    """Steps of a batch, each a token further; by StepGraph where there is one."""

    def __init__(self, model: Any, caches: list[FusedCache], lengths: list[int]) -> None:
        self.model, self.caches, self.positions = model, caches, list(lengths)
        self.cache = adapter.KVCache(adapter.Member(caches, tuple(range(len(lengths)))))
        self.graph: StepGraph | None = None

    def record(self, capture: Any) -> None:
        self.graph = StepGraph(self.model, self.cache, self.caches, len(self.positions), capture)

    def __call__(self) -> Tensor:
        tokens, where = [[n % 89] for n in self.positions], [[n] for n in self.positions]
        self.positions = [n + 1 for n in self.positions]
        if self.graph is not None:
            return self.graph(tokens, where)
        ids, at = (torch.tensor(x, device=self.model.device) for x in (tokens, where))
        return adapter.forward(self.model, self.cache, ids, position_ids=at)

    def us(self, device: Any) -> float:
        device.sync()
        start = time.perf_counter()
        self()
        device.sync()
        return 1e6 * (time.perf_counter() - start)


LIBRARIES: dict[str, Callable[[Dense], Call]] = {
    "SDPA flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "SDPA cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "SDPA efficient": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
    "flash-attn": flash_attn,
    "FlashInfer": flashinfer,
}
TINY_LIBRARIES = {"SDPA math": partial(sdpa, SDPBackend.MATH), "flash-attn": flash_attn, "FlashInfer": flashinfer}
