"""What kernels/cpu/store.h writes is what the reference writes, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.kernels import cpu
from kvsuite.kernels.context import LayerContext, Needs
from kvsuite.kernels.paged import PagedKV
from kvsuite.kernels.quantspec import PAGE
from kvsuite.kernels.reference import store as reference
from kvsuite.methods import parse
from kvsuite.methods.codecs.fp8 import E4M3
from kvsuite.methods.codecs.full import Plain
from kvsuite.methods.codecs.int8 import PerToken
from kvsuite.methods.codecs.kivi import PerChannel
from suites.checks.depth import depth
from suites.checks.table import has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

ROWS, KV_HEADS = 3, 2
POISON = 0xA5
FLOAT32, FLOAT16, BFLOAT16 = NUMBERS = torch.float32, torch.float16, torch.bfloat16
OWN = {  # formats that no codec has
    "2 bits in fours, 8 bits in sixteens": (PerToken(2, 4), PerToken(8, 16)),
    "keys of 8 bits by channel, e4m3 by token": (PerChannel(8, 32, 32), E4M3(None)),
    "a residual that no page divides": (PerToken(4, 8, residual=20), PerToken(2, 32, residual=7)),
    "keys as they are, values rolling": (Plain("float16"), PerToken(4, 32, residual=40)),
}
FORMATS = [
    ("full", 64, BFLOAT16),
    ("full", 32, FLOAT32),
    ("full:dtype=float16", 32, BFLOAT16),
    ("int8", 64, BFLOAT16),
    ("int8", 128, FLOAT16),
    ("int4", 32, FLOAT32),
    ("int8:rotate=hadamard", 96, BFLOAT16),
    ("int4:rotate=hadamard", 128, FLOAT16),
    ("turboquant:bits=k4v4", 64, BFLOAT16),
    ("turboquant:bits=k4v4", 32, FLOAT32),
    ("q8_0", 64, BFLOAT16),
    ("q8_0", 32, FLOAT32),
    ("q8_0:rotate=hadamard", 96, BFLOAT16),
    ("nvfp4", 64, BFLOAT16),
    ("nvfp4:rotate=hadamard,scale=4over6", 64, FLOAT16),
    ("nvfp4:k_scale=0.3,scale=4over6,v_scale=7.1", 96, FLOAT32),
    ("fp8", 64, FLOAT16),
    ("fp8:k_scale=0.3,v_scale=7.1", 32, FLOAT32),
    ("fp8:per=token", 128, BFLOAT16),
    ("fp8:per=token", 32, FLOAT32),
    ("kivi:bits=4", 64, BFLOAT16),
    ("kivi:bits=2,group=8,residual=16", 32, FLOAT32),
    ("kivi:bits=4,group=16,residual=32", 128, FLOAT16),
    *[(name, 32, dtype) for name, dtype in zip(OWN, (BFLOAT16, FLOAT32, FLOAT16, FLOAT32), strict=True)],
]
formats = pytest.mark.parametrize(("text", "dim", "kv_dtype"), FORMATS, ids=lambda x: str(x).removeprefix("torch."))


def on(threads):
    torch.set_num_threads(max(1, threads))
    return cpu


def specs(text, layer):
    return OWN[text] if text in OWN else parse(text).codec.specs(layer)


def caches(text, dim, kv_dtype, dtype, slots, needs, arena=True):
    layer = LayerContext(0, 2 * KV_HEADS, KV_HEADS, dim, dtype, kv_dtype, torch.device("cpu"))
    made = [PagedKV.empty(layer, specs(text, layer), ROWS, slots, needs, arena=arena) for _ in range(2)]
    for kv in made:
        own = [x for x in (kv.accumulated_attention, kv.newest_attention) if x is not None]
        for x in (*kv.k.pools, *kv.v.pools, kv.k.residual, kv.v.residual, *own):
            x.view(torch.uint8).fill_(POISON)
    return made


def assert_same(one, other):
    for name in ("k", "v"):
        a, b = getattr(one, name), getattr(other, name)
        for i, (x, y) in enumerate(zip((*a.pools, a.residual), (*b.pools, b.residual), strict=True)):
            if 0 < i < len(a.pools) and x.is_floating_point():  # of 0 and -0 the least may be either: it is not read
                x, y = (torch.where(z == 0, torch.zeros_like(z), z) for z in (x, y))
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), f"{name}: field {i} of {len(a.pools) + 1}"
    for name in ("positions", "accumulated_attention", "newest_attention"):
        x, y = getattr(one, name), getattr(other, name)
        assert (x is None) == (y is None)
        assert x is None or torch.equal(x.view(torch.uint8), y.view(torch.uint8)), name
    assert_counted_alike(one, other)


def assert_counted_alike(one, other):
    """On the host, pages included."""
    for name in ("slots", "tokens", "seen", "free_slot", "columns", "gaps"):
        assert (getattr(one.host, name) == getattr(other.host, name)).all(), name
    assert (one.table == other.table).all()
    assert one.mapping.rows == other.mapping.rows
    assert (one.mapping.slots == other.mapping.slots).all()


KINDS = "normal", "channels", "constant", "zero", "-0.0", "zeros of both signs", "positive", "halves"


def numbers(shape, dtype, seed, kind, exponent, most=65504):
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=noise)
    if kind == "channels":
        x = x * torch.linspace(0.3, 2, shape[-1]) + torch.linspace(-4, 4, shape[-1]).sin()
    elif kind == "constant":
        x = x[..., :1].expand(shape)
    elif kind == "zero":
        x = torch.zeros(shape)
    elif kind == "-0.0":
        x = -torch.zeros(shape)
    elif kind == "zeros of both signs":
        x = torch.where(x < 0, -0.0, 0.0)
    elif kind == "positive":  # the least of many a group is 0
        x = x.clamp(0)
    elif kind == "halves":  # many ties
        x = (2 * x).round() / 2
    return (x * 10.0**exponent).clamp(-most, most).to(dtype)


def strided(shape, dtype, kv_dtype, seed, kinds, layout):
    """K and V, as they leave a model: heads before tokens in memory, or after."""
    most = 6e4 if FLOAT16 in (dtype, kv_dtype) else 1e9  # no infinity, but what float16 scales and zeros cannot hold
    for i, (kind, exponent) in enumerate(kinds):
        x = numbers(shape, dtype, seed * 2 + i, kind, exponent, most)
        yield x.transpose(-3, -2).contiguous().transpose(-3, -2) if layout else x


content = st.tuples(st.sampled_from(KINDS), st.integers(-6, 4))
pairs = st.tuples(content, content)


@formats
@given(data=st.data(), dtype=st.sampled_from(NUMBERS), arena=st.booleans(), threads=st.sampled_from([0, 3]))
@settings(max_examples=depth(15, 40), deadline=None)
def test_what_is_stored_is_what_the_reference_stores(text, dim, kv_dtype, data, dtype, arena, threads):
    draw = data.draw
    positions, evicts = draw(st.sampled_from([(False, False), (True, False), (True, True)]))
    needs = Needs(positions, evicts, evicts or (draw(st.booleans()) and positions), evicts)
    slots = draw(st.sampled_from([96, 320]))
    kvs = one, other = caches(text, dim, kv_dtype, dtype, slots, needs, arena)
    theirs = on(threads)

    def fill(row):
        length = draw(st.integers(0, min(slots, 280) - 20))
        k, v = strided(
            (KV_HEADS, length, dim), dtype, kv_dtype, draw(st.integers(0, 99)), draw(pairs), draw(st.booleans())
        )
        keep = None
        if positions and draw(st.booleans()):
            noise = torch.Generator().manual_seed(draw(st.integers(0, 99)))
            counts = draw(st.tuples(*[st.integers(0, length)] * KV_HEADS))
            keep = [torch.randperm(length, generator=noise)[:n].sort().values for n in counts]
        mass = torch.rand(KV_HEADS, length) if draw(st.booleans()) else None
        for kv in kvs:
            kv.release(row)
        reference.fill(one, row, k, v, keep, mass)
        theirs.fill(other, row, k, v, keep, mass)
        budget = draw(st.integers(1, 40))
        for kv in kvs:
            kv.host.budget[row] = budget

    def append():
        n = 1 if evicts else draw(st.sampled_from([1, 1, 2, 7, 33, 64]))
        rows = draw(st.permutations([None, *range(ROWS)]))[: draw(st.integers(1, ROWS + 1))]
        limits, used = one.host.limit.min(1), one.host.slots.max(1)
        rows = [None if row is None or used[row] + n > limits[row] else row for row in rows]
        shape = (len(rows), KV_HEADS, n, dim)
        k, v = strided(shape, dtype, kv_dtype, draw(st.integers(0, 99)), draw(pairs), draw(st.booleans()))
        at = [row for row in rows if row is not None]
        if not at:
            return
        reference.advance(one, rows, n)
        theirs.advance(other, rows, n)
        reference.append(one, k, v, rows)
        theirs.append(other, k, v, rows)
        if evicts:
            evict(rows, at)

    def evict(rows, at):
        noise = np.random.default_rng(draw(st.integers(0, 99)))
        chosen = np.zeros((len(rows), KV_HEADS), dtype=np.int64)
        for b, row in enumerate(rows):
            for head in range(KV_HEADS if row is not None else 0):
                held = np.arange(one.host.slots[row, head])
                held = held[(one.positions.view(-1)[one.places(row, head, held)] >= 0).numpy()]
                chosen[b, head] = noise.choice(held)
        for kv in kvs:
            reference.evict(kv, rows, torch.from_numpy(chosen))
            kv.count_evicted(at)
            if not kv.by_token:
                reference.release_empty(kv, at)

    for row in range(ROWS):
        if draw(st.integers(0, 3)):
            fill(row)
    for _ in range(draw(st.integers(1, 12))):
        append() if draw(st.integers(0, 5)) else fill(draw(st.integers(0, ROWS - 1)))
        assert_same(one, other)


@formats
def test_a_long_generation_is_stored_alike(text, dim, kv_dtype):
    one, other = caches(text, dim, kv_dtype, BFLOAT16, 12 * PAGE, Needs())
    theirs = cpu
    for step in range(300):
        rows = [0, 1] if step % 3 else [2, None, 0]
        k, v = (numbers((len(rows), KV_HEADS, 1, dim), BFLOAT16, 2 * step + i, "channels", 0) for i in range(2))
        reference.advance(one, rows)
        theirs.advance(other, rows)
        reference.append(one, k, v, rows)
        theirs.append(other, k, v, rows)
    assert_same(one, other)


@formats
@pytest.mark.parametrize("threads", [0, 2, 5])
def test_threads_store_alike(text, dim, kv_dtype, threads):
    one, other = caches(text, dim, kv_dtype, FLOAT32, 700, Needs(positions=True))
    k, v = (numbers((KV_HEADS, 601, dim), FLOAT32, i, "channels", 0) for i in range(2))
    reference.fill(one, 0, k, v)
    on(threads).fill(other, 0, k, v)
    assert_same(one, other)


@pytest.mark.parametrize("text", ["full", "int8", "kivi:bits=4,group=16,residual=32"])
def test_a_full_row_is_refused_and_nothing_is_counted(text):
    one, other = caches(text, 32, FLOAT32, FLOAT32, 2 * PAGE, Needs())
    for advance, kv in ((reference.advance, one), (cpu.advance, other)):
        advance(kv, [0, 1], 60)
        advance(kv, [1, 2], 4)
        with pytest.raises(ValueError, match="row 1 is full: 65 tokens per head do not fit into 64 slots"):
            advance(kv, [None, 0, 1])
    assert_counted_alike(one, other)


@pytest.mark.parametrize(
    "text", ["full", "fp8", "fp8:k_scale=0.3,v_scale=7.1", "fp8:per=token", "int8", "int4", "q8_0", "nvfp4"]
)
@pytest.mark.parametrize("kv_dtype", NUMBERS, ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_every_finite_float16_is_stored_alike(text, kv_dtype, wide):
    """As they are and, wide, between them and beyond: that is where rounding is decided."""
    x = torch.arange(1 << 16).to(torch.int16).view(torch.float16).float()
    x = x[x.isfinite()]
    if wide:
        x = torch.cat([x * (1 + 2.0**-11), x * (1 + 2.0**-11 + 2.0**-20), x * 1e-5])
        x = x[x.abs() < 60000]
    x = x[: len(x) // 64 * 64].view(1, -1, 64).expand(KV_HEADS, -1, -1)
    one, other = caches(text, 64, kv_dtype, FLOAT32, x.shape[1], Needs())
    reference.fill(one, 0, x, x.flip(1))
    cpu.fill(other, 0, x, x.flip(1))
    assert_same(one, other)
