"""Decode attention over pages: the kernel and the reference against dense float64."""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.kernels import backends, reference, triton
from kvsuite.kernels.allocator import PageAllocator
from kvsuite.kernels.context import AttentionParams, LayerContext, Needs
from kvsuite.kernels.hadamard import hadamard
from kvsuite.kernels.paged import NULL_PAGE, KVStore, PagedKV
from kvsuite.kernels.quantspec import PAGE
from kvsuite.methods.codecs.fp8 import E4M3
from kvsuite.methods.codecs.full import Plain
from kvsuite.methods.codecs.int8 import PerToken
from kvsuite.methods.codecs.kivi import PerChannel
from kvsuite.methods.codecs.nvfp4 import E2M1Blocks
from kvsuite.methods.codecs.q8_0 import Symmetric8
from kvsuite.methods.codecs.turboquant import LloydMax
from suites.checks import naive
from suites.checks.depth import NIGHTLY, depth

fused = import_module("kvsuite.kernels.triton.attend")  # its package has a function of that name

WHOLE = 64
"""Stands for the head dimension."""
FORMATS = {
    "plain": (Plain(), Plain()),
    "int8": (PerToken(8, WHOLE), PerToken(8, WHOLE)),
    "int4": (PerToken(4, WHOLE), PerToken(4, WHOLE)),
    "fp8": (E4M3(1.0), E4M3(0.5)),
    "fp8 per token": (E4M3(None), E4M3(None)),
    "kivi-4": (PerChannel(4, 32, 64), PerToken(4, 32, 64)),
    "kivi-2": (PerChannel(2, 32, 96), PerToken(2, 32, 96)),
    "kivi-2 in groups of 16": (PerChannel(2, 16, 32), PerToken(2, 16, 32)),
    "fp8 keys, 4-bit values": (E4M3(2.0), PerToken(4, 16)),
    "rotated": (PerToken(8, WHOLE, rotation="hadamard"), PerToken(4, 16, rotation="hadamard")),
    "levels": (LloydMax(4, corrected=True), PerToken(4, WHOLE)),
    "blocks": (Symmetric8(), Symmetric8()),
    "e2m1": (E2M1Blocks(1.0, False), E2M1Blocks(0.3, True)),
    "rotated blocks": (Symmetric8("hadamard"), E2M1Blocks(0.3, True, "hadamard")),
    "rotated e2m1": (E2M1Blocks(1.0, False, "hadamard"), Symmetric8("hadamard")),
    "values as levels": (Plain(), LloydMax(4, corrected=True)),
}
BLOCKS = [name for name in FORMATS if "kivi" in name]


@dataclass(frozen=True)
class Shape:
    """What a case looks like: tokens per (row, head), and what is asked of them. ``gaps``: the share of a block codec's
    complete pages that were given back."""

    lengths: list[list[int]]
    dim: int = 64
    group: int = 2
    queries: int = 1
    dtype: torch.dtype = torch.bfloat16
    selects: bool = False
    mass: bool = False
    asked: frozenset = frozenset()
    tile: int | None = None
    splits: int | None = None
    gaps: float = 0.0


def draw(store, dim, noise):
    """Random contents: any codes, scales and zeros are a valid page."""
    spec, (first, *rest) = store.spec, store.pools

    def normal(like):
        return torch.randn(like.shape, generator=noise)

    if spec.layout == "plain":
        first.copy_(normal(first))
    elif spec.layout == "fp8":
        first.copy_(normal(first).clamp(-4, 4).to(torch.float8_e4m3fn).view(torch.uint8))
        for scale in rest:
            scale.copy_(normal(scale).abs())
    else:
        first.view(torch.uint8).copy_(torch.randint(0, 256, first.shape, generator=noise, dtype=torch.uint8))
        scale, *zeros = rest
        if spec.layout == "e2m1":
            scale.copy_(normal(scale).abs().to(torch.float8_e4m3fn).view(torch.uint8))
            scale, zeros = torch.empty(0), []
        size, shift = (3, 1.5) if spec.layout == "channel" else (1, 1)
        scale.copy_(normal(scale).abs() * size / (1 << spec.bits))
        for zero in zeros:
            zero.copy_(normal(zero) - shift)
    store.residual.copy_(normal(store.residual))


def make(name, shape, seed):
    """A cache with random contents in scattered pages, NaN where nothing may be read, and queries."""
    noise = torch.Generator().manual_seed(seed)
    rows, heads = len(shape.lengths), len(shape.lengths[0])
    used = np.array(shape.lengths)
    if not shape.selects:  # where all tokens stay, all heads have as many
        used[:] = used.max(1, keepdims=True)
    specs = [replace(spec, group=shape.dim) if vars(spec).get("group") == WHOLE else spec for spec in FORMATS[name]]
    layer = LayerContext(0, heads * shape.group, heads, shape.dim, shape.dtype, shape.dtype, torch.device("cpu"))
    needs = Needs(positions=shape.selects, evicts=shape.mass, accumulated_attention=shape.mass)
    slots = int(used.max()) + 2 * PAGE
    kv = PagedKV.empty(layer, tuple(specs), rows, slots, needs, arena=False)
    first = int(needs.positions)
    total = len(kv.k.pools[0])
    kv.allocator = PageAllocator((first + torch.randperm(total - first, generator=noise)).tolist())
    for store in (kv.k, kv.v):
        draw(store, shape.dim, noise)
        if needs.positions:
            for pool in store.pools:
                pool[NULL_PAGE] = 0
    if shape.mass:
        kv.accumulated_attention[first:] = torch.rand(total - first, PAGE, generator=noise)
    for row, counts in enumerate(used):
        seen = int(counts.max()) + (5 if shape.selects else 0)
        kv.admit(row, counts, seen)
        for head, n in enumerate(counts.tolist() if shape.selects else ()):
            kept = torch.randperm(seen - 1, generator=noise)[: n - 1].sort().values
            at = torch.cat([kept, torch.tensor([seen - 1])])[:n].int()
            at[: n - 1][torch.rand(n - 1, generator=noise) < 0.2] = -1
            gone = [
                column
                for column in range(min(int(spec.num_encoded(n)) for spec in specs) // PAGE)
                if shape.gaps and (column + 1) * PAGE < n and torch.rand((), generator=noise) < shape.gaps
            ]
            for column in gone:
                at[column * PAGE : (column + 1) * PAGE] = -1
            kv.positions.view(-1)[kv.places(row, head, np.arange(n))] = at
            kv.host.tokens[row, head] = int((at >= 0).sum())
            kv.give_back(row, head, np.array(gone, dtype=np.int64))
        kv.upload(row)
    for store in (kv.k, kv.v):
        poison(kv, store)
    q = torch.randn(rows, heads * shape.group, shape.queries, shape.dim, generator=noise).to(shape.dtype)
    return q, kv


def poison(kv, store):
    """NaN into every unit of the pools, and every place of the residual, that no slot in use lies in."""
    units = store.pools[0].shape[1]
    held, recent = torch.zeros(store.pools[0].shape[:2], dtype=torch.bool), torch.zeros(store.residual.shape[:3]).bool()
    held[NULL_PAGE] |= kv.needs.positions
    for row, head in np.ndindex(kv.host.slots.shape):
        n = int(kv.host.slots[row, head])
        done = int(store.spec.num_encoded(n))
        for unit in range(-(-done // (PAGE // units))):
            held[kv.table[row, head, unit // units], unit % units] = True
        recent[row, head, torch.arange(done, n) % max(1, store.spec.residual)] = True
    for field in store.pools:
        field[~held] = 0x7F if field.dtype.itemsize == 1 else float("nan")
    store.residual[~recent] = float("nan")


def move(thing, device):
    """The same on another device."""
    if isinstance(thing, torch.Tensor):
        return thing.clone().to(device)
    if isinstance(thing, tuple):
        return tuple(move(x, device) for x in thing)
    if isinstance(thing, LayerContext):
        return replace(thing, device=device)
    if isinstance(thing, (PagedKV, KVStore)):
        return replace(thing, **{name: move(value, device) for name, value in vars(thing).items()})
    return thing


@contextmanager
def poisoned():
    """Whatever is allocated inside is NaN first: an element that is not written shows."""
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory is its default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def options(shape):
    noise = torch.Generator().manual_seed(1)
    sinks = torch.randn(len(shape.lengths[0]) * shape.group, generator=noise)
    known = {"window": 20, "softcap": 2.5, "sink_logits": sinks}
    return {name: known[name] for name in shape.asked}


def stored(kv, store, row, head, dtype):
    """Slots 0 … n - 1 of one (row, head) as they read, rounded to ``dtype``: float64 (n, head_dim)."""
    n = int(kv.host.slots[row, head])
    done = int(store.spec.num_encoded(n))
    pages = torch.from_numpy(kv.table[row, head, : -(-done // PAGE)]).long()
    x = store.spec.decode(tuple(pool[pages].flatten(0, 1)[None] for pool in store.pools), dtype, ())
    recent = torch.arange(done, n) % max(1, store.spec.residual)
    return torch.cat([x.reshape(-1, x.shape[-1])[:done].double(), store.residual[row, head, recent].double()])


def exact(q, kv, row, head, scale, asked, dtype):
    """float64 weights (group, Q, n), values (n, D), the largest error a weight may have, relative (group, Q), and of a
    result what turned values' roundings add, (group, Q, 1): of attention that reads its numbers rounded to ``dtype``,
    where that is float32 rounding them itself, turned where they are stored so."""
    group, queries, dim = q.shape[1] // kv.layer.kv_heads, q.shape[2], q.shape[3]
    n, seen = int(kv.host.slots[row, head]), int(kv.host.seen[row])
    k, v = (stored(kv, store, row, head, dtype) for store in (kv.k, kv.v))
    at = torch.arange(n)
    if kv.positions is not None:
        at = kv.positions.view(-1)[kv.places(row, head, np.arange(n))]
    allowed = naive.causal(torch.arange(seen - queries, seen), at, asked.get("window")) & (at >= 0)
    unit, single = torch.finfo(q.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    itself = dtype != q.dtype
    turns = [bool(store.spec.rotation) and itself for store in (kv.k, kv.v)]
    size = (hadamard(k).double() if turns[0] else k).abs()
    parts = size + 3 * size.amax(1, keepdim=True)  # codes times scale and zeros are added up apart, and cancel
    exactly = kv.k.spec.layout == "plain" or dtype == q.dtype
    rounded = 0 if exactly else unit / 3**0.5  # the standard deviation of a rounding
    weights, errors = [], []
    for h in range(head * group, (head + 1) * group):
        sink = None if "sink_logits" not in asked else float(asked["sink_logits"][h])
        weights.append(naive.weights(q[row, h], k, scale, allowed, asked.get("softcap"), sink))
        own = hadamard(q[row, h]).double() if turns[0] else q[row, h].double()
        sums = own.abs() @ ((dim + 16) * single * parts).T
        several = 8 * rounded * (own.square() @ size.square().T).sqrt()  # and they are independent
        errors.append(2 * scale * (sums + several).amax(1) + (n + 16) * single)
    p = torch.stack(weights)
    spread = (p.square() @ hadamard(v).double().square()).sum(-1, keepdim=True) / (dim & -dim)  # a block has its share
    return p, v, torch.stack(errors), 8 * unit / 3**0.5 * turns[1] * spread.sqrt()


def check(name, shape, seed, device):
    q, kv = make(name, shape, seed)
    scale, asked = shape.dim**-0.5, options(shape)
    rows = tuple(range(len(shape.lengths)))
    found = {}
    with pytest.MonkeyPatch.context() as patch, poisoned():
        if shape.tile:
            for kind, chosen in fused.TUNED.items():
                patch.setitem(fused.TUNED, kind, replace(chosen, tile=shape.tile))
        if shape.splits:
            patch.setattr(fused, "SPLITS", shape.splits)
        for backend in (reference, triton):
            there = device if backend is triton else torch.device("cpu")
            state = move(kv, there)
            params = AttentionParams(scale, **{k: move(v, there) for k, v in asked.items()})
            out = backend.attend(state, q.to(there), rows, params)
            mass = state.accumulated_attention
            read = torch.float32 if backend is triton else q.dtype
            found[read] = out.cpu(), None if mass is None else mass.cpu()
    unit = torch.finfo(q.dtype).eps / 2
    tiny = torch.finfo(q.dtype).smallest_normal * 2 * unit
    untouched = None if kv.accumulated_attention is None else torch.ones_like(kv.accumulated_attention).bool()
    for row, head in np.ndindex(kv.host.slots.shape):
        for dtype, (out, mass) in found.items():
            p, v, error, turned = exact(q, kv, row, head, scale, asked, dtype)
            span = slice(head * shape.group, (head + 1) * shape.group)
            bound = (error + 3 * unit)[..., None] * (p @ v.abs()) + turned + tiny * (1 + v.abs().sum(0))
            assert out.dtype == q.dtype
            assert ((out[row, span].double() - p @ v).abs() <= bound).all()
            if mass is not None:
                places = kv.places(row, head, np.arange(v.shape[0]))
                after = mass.view(-1)[places]
                added = after - kv.accumulated_attention.view(-1)[places]
                half = torch.finfo(torch.float16)
                few = (error + half.eps)[..., None] * p + half.smallest_normal * half.eps
                few = few.mean((0, 1)) + 1e-7 * after  # and the addition itself
                assert ((added - p.mean((0, 1))).abs() <= few).all()
                untouched.view(-1)[places[p.sum((0, 1)) > 0]] = False
    for _, mass in found.values():
        assert mass is None or torch.equal(mass[untouched], kv.accumulated_attention[untouched])


lengths = st.integers(1, 3).flatmap(
    lambda heads: st.lists(
        st.lists(st.integers(1, depth(150, 260)), min_size=heads, max_size=heads), min_size=1, max_size=2
    )
)


@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_and_its_reference_are_attention(name, device):
    @settings(max_examples=depth(3, 12))  # the interpreter takes half a second each
    @given(
        lengths=lengths,
        group=st.sampled_from([1, 3, 4]),
        dtype=st.sampled_from([torch.bfloat16, torch.float16]),
        kind=st.sampled_from(["", "", "selects", "mass", "gaps"]),
        asked=st.sets(st.sampled_from(["window", "softcap", "sink_logits"]), max_size=2),
        seed=st.integers(0, 999),
        tile=st.sampled_from([None, None, 32, 64]),
    )
    def run(lengths, group, dtype, kind, asked, seed, tile):
        gaps = 0.5 if kind == "gaps" and name in BLOCKS else 0.0
        shape = Shape(lengths, 64, group, 1, dtype, kind != "", kind == "mass", frozenset(asked), tile, gaps=gaps)
        check(name, shape, seed, device)

    run()


@pytest.mark.parametrize(
    ("dim", "dtype"), [(64, torch.float16), (96, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16)]
)
@pytest.mark.parametrize("name", FORMATS)
def test_every_head_dimension(name, dim, dtype, device):
    check(name, Shape([[depth(105, 205), 96]], dim, 4, dtype=dtype), dim, device)


@pytest.mark.parametrize("asked", [(), ("window",), ("sink_logits", "softcap")], ids="+".join)
@pytest.mark.parametrize("splits", [None, 5])
def test_a_long_row_is_many_parts(asked, splits, device):
    check("plain", Shape([[2500]], 64, 2, asked=frozenset(asked), splits=splits), 4, device)


def test_mass_of_a_long_row(device):
    check("plain", Shape([[1500]], 64, 2, selects=True, mass=True), 5, device)
    check("int4", Shape([[700]], 64, 2, selects=True, mass=True, splits=3), 6, device)


@pytest.mark.parametrize("group", [20, 71])
def test_more_query_heads_than_a_tensor_instruction_takes(group, device):
    check("int8", Shape([[150]], 64, group), group, device)


def test_a_window_begins_where_it_begins(device):
    for length in range(100, 132, 5):
        check("plain", Shape([[length]], 64, 1, asked=frozenset({"window"}), tile=32), length, device)


SEVERAL = [
    case
    for case in product(("plain", "int4", "kivi-4"), (5, 30), ((), ("window",), ("sink_logits", "softcap")))
    if NIGHTLY or case[1] == 5 or case == ("kivi-4", 30, ("window",))  # 30 are two tiles: seconds in the interpreter
]


@pytest.mark.parametrize(("name", "queries", "asked"), SEVERAL, ids=str)
def test_several_queries_are_causal_among_themselves(name, queries, asked, device):
    lengths = [[80, 40]] if queries == 30 and not NIGHTLY else [[170, 40], [65, 33]]
    check(name, Shape(lengths, 64, 3, queries, asked=frozenset(asked)), 1, device)


@pytest.mark.parametrize("name", depth(["kivi-2 in groups of 16"], BLOCKS))
@pytest.mark.parametrize("mass", [False, True])
@pytest.mark.parametrize("gaps", [0.5, 1.0])
def test_pages_that_were_given_back_hold_nothing(name, mass, gaps, device):
    """Some of them, which share tiles with others, and all: whole parts of a row in which nothing is read."""
    shape = Shape([[420, 33], [131, 300]], 64, 2, selects=True, mass=mass, gaps=gaps, asked=frozenset({"softcap"}))
    _, kv = make(name, shape, 7)
    assert (kv.host.gaps[:, 1] > 0).any()
    assert kv.host.gaps[0, 0] > 1
    check(name, shape, 7, device)
    check(name, replace(shape, tile=32, queries=1 if mass else 5), 8, device)


@pytest.mark.parametrize("name", ["plain", "kivi-2"])
def test_idle_items_are_zero_and_a_row_does_not_depend_on_its_mates(name, device):
    q, kv = make(name, Shape([[300, 40], [65, 333], [7, 129]], 64, 2), 3)
    q, kv, params = q.to(device), move(kv, device), AttentionParams(0.1)
    every = triton.attend(kv, q, (0, 1, 2), params)
    some = triton.attend(kv, q[[2, 0, 1]], (2, None, 1), params)
    assert torch.equal(some[0], every[2])
    assert torch.equal(some[2], every[1])
    assert (some[1] == 0).all()


def test_queries_may_lie_as_the_model_left_them(device):
    q, kv = make("plain", Shape([[100, 100], [60, 60]], 64, 2, 3), 3)
    kv, params = move(kv, device), AttentionParams(0.1)
    strided = q.to(device).transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(triton.attend(kv, strided, (0, 1), params), triton.attend(kv, q.to(device), (0, 1), params))


def test_nan_is_not_lost(device):
    for name in FORMATS:
        q, kv = make(name, Shape([[100]], 64, 2), 0)
        if kv.v.spec.layout == "fp8":
            kv.v.pools[0][kv.page_table[0, 0, 1], 3, 5] = 0xFF
        elif kv.v.spec.layout == "plain":
            kv.v.pools[0][kv.page_table[0, 0, 1], 3, 5] = float("nan")
        else:
            continue
        out = triton.attend(move(kv, device), q.to(device), (0,), AttentionParams(0.1))
        assert out[..., 5].isnan().all()
        assert out[..., 6].isfinite().all()


def test_both_are_called_as_backends_are():
    """What a backend adds it does not need."""
    wanted = {name: x for name, x in vars(backends.Backend).items() if inspect.isfunction(getattr(x, "__func__", None))}
    assert {*wanted, "NAME"} == {*triton.__all__} == {*reference.__all__}
    for backend in (reference, triton):
        for name, x in wanted.items():
            asked = [*inspect.signature(x.__func__).parameters.values()]
            own = [*inspect.signature(getattr(backend, name)).parameters.values()]
            of = [[(p.name, p.kind, p.default) for p in found] for found in (asked, own)]
            assert of[1][: len(asked)] == of[0], name
            assert all(p.default is not p.empty for p in own[len(asked) :])
    assert inspect.signature(reference.attend) == inspect.signature(triton.attend)


def test_attention_accumulated_over_several_queries_is_refused(device):
    q, kv = make("plain", Shape([[40]], 64, 4, 2, selects=True, mass=True), 0)
    for backend, there in ((reference, torch.device("cpu")), (triton, device)):
        with pytest.raises(ValueError, match="query by query"):
            backend.attend(move(kv, there), q.to(there), (0,), AttentionParams(0.1))


def test_a_choice_of_pages_is_refused(device):
    q, kv = make("plain", Shape([[40]], 64, 2), 0)
    with pytest.raises(ValueError, match="all pages"):
        triton.attend(move(kv, device), q.to(device), (0,), AttentionParams(0.1), [[np.zeros(1, dtype=np.int64)]])
