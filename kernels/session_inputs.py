"""What `session.py` times: caches with random contents, libraries, models. Each can tell if its output is right."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from kvsuite.cache import adapter
from kvsuite.cache.layer import LayerCache
from kvsuite.cache.observations import AttentionMass
from kvsuite.cache.prefill import PrefilledLayer
from kvsuite.engines.graph import StepGraph
from kvsuite.kernels import triton as kernels
from kvsuite.kernels.allocator import PageAllocator
from kvsuite.kernels.context import AttentionParams, LayerContext, Needs
from kvsuite.kernels.paged import KVStore, PagedKV
from kvsuite.kernels.quantspec import PAGE, QuantSpec
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

    def lengths(self, batch: int, tokens: int) -> np.ndarray:
        return np.full((batch, self.sizes.kv_heads), tokens)

    def randomise(self, store: KVStore) -> None:
        """Random contents, numbers about as large as a standard normal's."""
        for i, pool in enumerate(store.pools):
            self.numbers(store.spec, i, pool)
        store.residual.normal_()

    def numbers(self, spec: QuantSpec, i: int, x: Tensor) -> None:
        """Into field ``i`` of a layout."""
        if spec.layout == "plain":
            x.normal_()
        elif i == 0 and spec.layout == "fp8":
            wide = self.normal(*x.shape).mul_(1 if spec.scale else 100).clamp_(-448, 448)
            x.copy_(wide.to(torch.float8_e4m3fn).view(torch.uint8))
        elif i == 0:
            x.random_(0, 256)
        elif spec.layout == "fp8":
            x.uniform_(0.008, 0.012)
        elif i == 1:
            x.uniform_(3, 4).div_((1 << spec.bits) - 1)
        else:
            x.uniform_(-2, -1.5)

    def prefilled(self, layer: LayerContext, tokens: int) -> PrefilledLayer:
        k, v = (self.normal(layer.kv_heads, tokens, layer.head_dim) for _ in range(2))
        mass = torch.rand(layer.kv_heads, tokens, device=self.device.at)
        return PrefilledLayer(layer.index, k, v, {AttentionMass(): mass}, AttentionParams(layer.head_dim**-0.5))


def held(kv: PagedKV, used: list[int]) -> int:
    """Bytes that attention must read of a cache (attention so far: and write), from the tensors themselves."""
    total = 4.0 * sum(-(-n // PAGE) for n in used)  # the page table
    for store in (kv.k, kv.v):
        done = sum(store.spec.num_encoded(n) for n in used)
        total += done * sum(x[0].nbytes for x in store.pools) / PAGE
        total += (sum(used) - done) * store.residual.shape[3] * store.residual.element_size()
    each = (0 if kv.positions is None else 4) + (0 if kv.accumulated_attention is None else 8)
    return round(total + each * sum(used))


def stored(kv: PagedKV, store: KVStore, row: int, head: int) -> Tensor:
    """The slots of one (row, head) as they read, not rounded: float64 (n, head_dim)."""
    n = int(kv.host.slots[row, head])
    done = store.spec.num_encoded(n)
    pages = kv.page_table[row, head, : -(-done // PAGE)].long()
    fields = tuple([pool[pages].flatten(0, 1)[None] for pool in store.pools])
    x = store.spec.decode(fields, torch.float32, ()).reshape(-1, kv.layer.head_dim)[:done]
    recent = torch.arange(done, n, device=x.device) % max(1, store.spec.residual)
    return torch.cat([x.double(), store.residual[row, head, recent].double()])


def of_slots(kv: PagedKV, field: Tensor, row: int, head: int) -> Tensor:
    """A field of pages of one (row, head), slot by slot: (n,)."""
    n = int(kv.host.slots[row, head])
    pages = kv.page_table[row, head, : -(-n // PAGE)].long()
    return field[pages].flatten()[:n]


def expected(q: Tensor, kv: PagedKV, row: int, head: int, scale: float) -> tuple[Tensor, Tensor]:
    """float64 weights (group, n) and output (group, head_dim) of one (row, head)."""
    group = q.shape[1] // kv.layer.kv_heads
    k, v = (stored(kv, store, row, head) for store in (kv.k, kv.v))
    scores = q[row, head * group : (head + 1) * group, 0].double() @ k.T * scale
    if kv.positions is not None:
        scores.masked_fill_(of_slots(kv, kv.positions, row, head) < 0, -math.inf)
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

    def __init__(
        self, s: Source, text: str, used: np.ndarray, *, mass: bool = False, ragged: bool = False, room: int = 64
    ) -> None:
        rows, most, layer = len(used), int(used.max()), s.layer
        needs = Needs(positions=ragged, accumulated_attention=mass)
        self.kv = kv = PagedKV.empty(layer, parse(text).codec.specs(layer), rows, most + room, needs, arena=False)
        first = int(needs.positions)
        kv.allocator = PageAllocator((first + torch.randperm(len(kv.k.pools[0]) - first)).tolist())
        for store in (kv.k, kv.v):
            s.randomise(store)
        for row in range(rows):
            kv.admit(row, used[row], most)
            kv.upload(row)
            for head, n in enumerate(used[row].tolist() if kv.positions is not None else ()):
                at = torch.arange(n) * most // max(1, n)
                places = kv.places(row, head, np.arange(n))
                kv.positions.view(-1)[places.to(s.device.at)] = at.int().to(s.device.at)
        if kv.accumulated_attention is not None:
            kv.accumulated_attention.uniform_()
        self.lengths = torch.stack([kv.num_slots, kv.num_tokens, kv.num_seen])
        self.q, self.rows = s.normal(rows, layer.heads, 1, layer.head_dim), tuple(range(rows))
        self.params = AttentionParams(layer.head_dim**-0.5)
        self.nbytes = held(kv, used.flatten().tolist()) + 2 * self.q.nbytes

    def rewind(self) -> None:
        """The device counts as before; on the device alone."""
        for x, was in zip((self.kv.num_slots, self.kv.num_tokens, self.kv.num_seen), self.lengths, strict=True):
            x.copy_(was)

    def __call__(self) -> Tensor:
        return kernels.attend(self.kv, self.q, self.rows, self.params)

    def refuse_wrong(self) -> None:
        row, head = (n - 1 for n in self.kv.host.slots.shape)
        mass = self.kv.accumulated_attention
        p, wanted = expected(self.q, self.kv, row, head, self.params.scale)
        before = None if mass is None else of_slots(self.kv, mass, row, head)
        refuse(self()[row, -p.shape[0] :, 0], wanted)
        if mass is not None:
            refuse(of_slots(self.kv, mass, row, head) - before, p.mean(0), what="accumulated attention")


def by_kernels(method: Method, layer: LayerContext, rows: int, tokens: int, room: int) -> LayerCache:
    """`Method.cache`, which takes the kernels on a GPU only, by kernels everywhere."""
    slots, pages = method.capacity(tokens, room), method.pages(layer, tokens, room)
    found = method.cache(layer, rows, slots, pages, backend="triton")
    if found.refusal:
        raise Skip(found.refusal)
    return found


class Evicting:
    """One input set of a step of a layer that evicts: append, attention that is accumulated, choice of a token."""

    def __init__(self, s: Source, text: str, batch: int, tokens: int) -> None:
        method, layer = parse(text), s.layer
        self.cache = by_kernels(method, layer, batch, tokens, 64)
        for row in range(batch):
            method.compress(row, [s.prefilled(layer, tokens)], [self.cache])
        self.rows, self.scale = tuple(range(batch)), layer.head_dim**-0.5
        self.q = s.normal(batch, layer.heads, 1, layer.head_dim)
        self.k, self.v = (s.normal(batch, layer.kv_heads, 1, layer.head_dim) for _ in range(2))
        self._step()
        self.nbytes = held(self.cache.kv, self.cache.kv.host.slots.flatten().tolist()) + 2 * self.q.nbytes

    def _step(self) -> None:
        """A step as the engine makes it, checked; from then on only the device counts, as in a replay."""
        self.cache.append(self.k, self.v, self.rows)
        p, wanted = expected(self.q, self.cache.kv, 0, 0, self.scale)
        out = self.cache.attend(self.q, self.scale, self.rows)
        refuse(out[0, : p.shape[0], 0], wanted)
        if not bool((self.cache.kv.free_slot >= 0).all()):
            raise Wrong("a head gave nothing up")
        self.cache.prepared = True

    def refuse_wrong(self) -> None:
        """Done when it was made."""

    def __call__(self) -> Tensor:
        self.cache.append(self.k, self.v, self.rows)
        return self.cache.attend(self.q, self.scale, self.rows)


def loaded(s: Source, model: Any, text: str, lengths: list[int], room: int) -> list[LayerCache]:
    """A model's caches, a random context in each row; the same ones each time."""
    torch.manual_seed(1)
    method, layers = parse(text), adapter.contexts(model)
    caches = [by_kernels(method, layer, len(lengths), max(lengths), room) for layer in layers]
    for row, length in enumerate(lengths):
        method.compress(row, [s.prefilled(layer, length) for layer in layers], caches)
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

    def __init__(self, model: Any, caches: list[LayerCache], lengths: list[int]) -> None:
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
