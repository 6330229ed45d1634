"""What the cpu backend attends to is what the reference does, within the reference's own bound, whoever computes it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.cache.checker import error
from kvsuite.kernels import cpu, reference
from kvsuite.kernels.context import AttentionParams, LayerContext, Needs
from kvsuite.kernels.paged import PagedKV
from kvsuite.kernels.rope import Rope
from kvsuite.methods import parse
from suites.checks.depth import depth
from suites.checks.table import has_compiler

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
CASES = [  # codec, head dimension, queries per kv head, compute dtype, K/V dtype
    ("full", 64, 3, BFLOAT16, BFLOAT16),
    ("full", 128, 4, FLOAT32, BFLOAT16),
    ("full", 32, 1, FLOAT32, FLOAT32),
    ("full", 96, 2, FLOAT16, FLOAT16),
    ("int8", 64, 3, BFLOAT16, BFLOAT16),
    ("int8", 128, 7, FLOAT32, BFLOAT16),
    ("int8", 256, 2, BFLOAT16, BFLOAT16),
    ("int4", 64, 3, BFLOAT16, BFLOAT16),
    ("int4", 128, 4, FLOAT16, FLOAT16),
    ("int8:rotate=hadamard", 96, 3, BFLOAT16, BFLOAT16),
    ("int4:rotate=hadamard", 128, 4, FLOAT32, BFLOAT16),
    ("turboquant:bits=k4v4", 64, 3, BFLOAT16, BFLOAT16),
    ("turboquant:bits=k4v4", 128, 4, FLOAT32, FLOAT16),
    ("q8_0", 64, 3, BFLOAT16, BFLOAT16),
    ("q8_0", 96, 4, FLOAT32, FLOAT16),
    ("q8_0:rotate=hadamard", 96, 3, BFLOAT16, BFLOAT16),
    ("nvfp4", 64, 3, BFLOAT16, BFLOAT16),
    ("nvfp4:rotate=hadamard,scale=4over6", 128, 4, FLOAT32, BFLOAT16),
    ("nvfp4:k_scale=0.3,v_scale=7.1", 96, 4, FLOAT32, FLOAT16),
    ("fp8", 64, 3, BFLOAT16, BFLOAT16),
    ("fp8:k_scale=0.3,v_scale=7.1", 32, 8, FLOAT32, BFLOAT16),
    ("fp8:per=token", 64, 3, FLOAT32, FLOAT32),
    ("kivi:bits=4", 64, 3, BFLOAT16, BFLOAT16),
    ("kivi:bits=4", 128, 4, FLOAT32, BFLOAT16),
    ("kivi:bits=2", 64, 3, BFLOAT16, BFLOAT16),
    ("kivi:bits=2,residual=32", 128, 5, FLOAT16, FLOAT16),
]
KV_HEADS = 2
cases = pytest.mark.parametrize(
    ("text", "dim", "group", "dtype", "kv_dtype"), CASES, ids=lambda x: str(x).removeprefix("torch.")
)


def numbers(shape, dtype, seed, exponent=0.0):
    """With channels of unlike size, as keys have; times 10^exponent."""
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=noise) * torch.linspace(0.3, 3, shape[-1]) + torch.linspace(-2, 2, shape[-1]).sin()
    return (x * 10.0**exponent).clamp(-6e4, 6e4).to(dtype)  # float16 scales hold no more


def cache(text, dim, group, dtype, kv_dtype, lengths, needs=None, exponents=(0.0, 0.0), seed=0, rope=None):
    """Prompts of these lengths, in memory that held NaN before."""
    layer = LayerContext(0, KV_HEADS * group, KV_HEADS, dim, dtype, kv_dtype, torch.device("cpu"), rope)
    specs, needs = parse(text).codec.specs(layer), needs or Needs()
    assert cpu.supports(layer, *specs, needs) == ""
    kv = PagedKV.empty(layer, specs, len(lengths), max(lengths) + 64, needs)
    for x in (*kv.k.pools, *kv.v.pools, kv.k.residual, kv.v.residual):
        x.view(torch.uint8).fill_(255)
    for row, length in enumerate(lengths):
        shape = (KV_HEADS, length, dim)
        k, v = (numbers(shape, dtype, seed + 2 * row + i, exponents[i]) for i in range(2))
        reference.fill(kv, row, k, v, None, torch.zeros(KV_HEADS, length))
    return kv


def worst(kv, q, out, rows, params):
    """The largest error of any row and query, in units of what is allowed."""
    errors = []
    queries, group = q.shape[2], q.shape[1] // KV_HEADS
    for b, row in enumerate(rows):
        views = [] if row is None else cpu.read(kv, row)
        for head, view in enumerate(views):
            heads = slice(head * group, (head + 1) * group)
            sinks = None if params.sink_logits is None else params.sink_logits[heads]
            for i in range(queries):
                before = view.positions <= kv.host.seen[row] - queries + i
                fields = [x[before] for x in (view.k, view.v, view.positions, view.slots)]
                own = type(view)(*fields, view.exact, view.integers, view.rotated)
                window, softcap = params.window, params.softcap
                errors.append(error(q[b, heads, i], out[b, heads, i], own, params.scale, window, softcap, sinks))
    return max(errors)


@cases
@given(
    lengths=st.lists(
        st.one_of(st.integers(1, 140), st.sampled_from([511, 512, 513, 700, 1100])), min_size=1, max_size=3
    ),
    queries=st.sampled_from([1, 1, 1, 2, 5]),
    exponents=st.tuples(st.sampled_from([-6, -3, 0, 0, 1, 4]), st.sampled_from([-6, 0, 0, 4])),
    window=st.sampled_from([None, None, 1, 40, 600]),
    softcap=st.sampled_from([None, None, 3.0]),
    sinks=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=depth(8, 100), deadline=None)
def test_the_error_is_within_the_references_bound(
    text, dim, group, dtype, kv_dtype, lengths, queries, exponents, window, softcap, sinks, seed
):
    if FLOAT16 in (dtype, kv_dtype) or "rotate" in text:
        exponents = tuple(min(x, 3) for x in exponents)
    kv = cache(text, dim, group, dtype, kv_dtype, lengths, None, exponents, seed)
    rows = [*range(len(lengths)), None][::-1]
    if queries > 1:
        kv.advance([row for row in rows if row is not None], queries)
        shape = (len(rows), KV_HEADS, queries, dim)
        reference.append(kv, *(numbers(shape, dtype, seed + 50 + i, exponents[i]) for i in range(2)), rows)
    q = numbers((len(rows), KV_HEADS * group, queries, dim), dtype, seed + 70, -exponents[0])
    logits = torch.linspace(-1, 3, KV_HEADS * group) if sinks else None
    params = AttentionParams(dim**-0.5, window, softcap, logits)
    out = cpu.attend(kv, q, rows, params)
    assert out.dtype == dtype
    assert not out[0].any(), "idle"
    assert worst(kv, q, out, rows, params) <= 1


@cases
def test_a_row_does_not_depend_on_mates_order_or_threads(text, dim, group, dtype, kv_dtype):
    lengths = [1500, 3, 700, 513]
    kv = cache(text, dim, group, dtype, kv_dtype, lengths)
    q, params = numbers((4, KV_HEADS * group, 1, dim), dtype, 9), AttentionParams(dim**-0.5)
    together = cpu.attend(kv, q, [0, 1, 2, 3], params)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for order in ([3, 1, 0, 2], [2], [0, 3]):
            assert torch.equal(cpu.attend(kv, q[order], order, params), together[order]), (threads, order)
    torch.set_num_threads(1)
    small = cache(text, dim, group, dtype, kv_dtype, [9, 3])  # elsewhere in memory, with other mates
    alone = cache(text, dim, group, dtype, kv_dtype, lengths[:1])
    assert torch.equal(cpu.attend(alone, q[:1], [0], params), together[:1])
    assert cpu.attend(small, q[:2], [0, 1], params).isfinite().all()


@cases
@pytest.mark.parametrize("window", [None, 50])
def test_attention_is_accumulated_as_the_reference_does(text, dim, group, dtype, kv_dtype, window):
    """Over rows with holes, twice."""
    needs = Needs(positions=True, evicts=True, accumulated_attention=True, newest_attention=True)
    kvs = [cache(text, dim, group, dtype, kv_dtype, [700, 40], needs) for _ in range(2)]
    noise = np.random.default_rng(0)
    dropped = noise.choice(699, 400, replace=False)
    for kv in kvs:
        kv.newest_attention.fill_(5.0)
        kv.positions.view(-1)[kv.places(0, np.arange(KV_HEADS)[:, None], dropped[None])] = -1
        kv.host.tokens[0] -= 400
        kv.layout = None
    ours, theirs = kvs
    params = AttentionParams(dim**-0.5, window)
    for step in range(2):
        q = numbers((2, KV_HEADS * group, 1, dim), dtype, step)
        out = cpu.attend(ours, q, [0, 1], params)
        reference.attend(theirs, q, [0, 1], params)
        assert worst(ours, q, out, [0, 1], params) <= 1
    held = [ours.places(row, np.arange(KV_HEADS)[:, None], np.arange(n)[None]) for row, n in enumerate([700, 40])]
    for name in ("accumulated_attention", "newest_attention"):
        a, b = getattr(ours, name).view(-1), getattr(theirs, name).view(-1)
        for places in held:
            torch.testing.assert_close(a[places], b[places], rtol=0.03, atol=2e-3)
    empty = (ours.positions.view(-1) < 0)[held[0]]
    assert (ours.newest_attention.view(-1)[held[0]][empty] == 0).all()
    sums = ours.accumulated_attention.view(-1)[held[0]].sum(1)
    torch.testing.assert_close(sums, torch.full_like(sums, 2.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("text", ["full", "int8", "fp8", "q8_0", "nvfp4:k_scale=0.3", "kivi:bits=4,residual=32"])
@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32], ids=str)
def test_sinks_are_turned_on_to_where_the_cache_has_them(text, dtype):
    rope, dim = Rope(1e4 ** (-torch.arange(0, 48, 2) / 48)), 64  # 16 channels are not rotated
    needs = Needs(positions=True, evicts=True, rerotated_sinks=4)
    kvs = [cache(text, dim, 3, dtype, BFLOAT16, [300, 90], needs, rope=rope) for _ in range(2)]
    for kv in kvs:
        assert kv.original_sinks is None or text == "full"
        gone = np.arange(4, 104)
        kv.positions.view(-1)[kv.places(0, np.arange(KV_HEADS)[:, None], gone[None])] = -1
        kv.host.tokens[0] -= 100
        kv.layout = None
    q, params = numbers((2, 6, 1, dim), dtype, 3), AttentionParams(dim**-0.5)
    out, right = (backend.attend(kv, q, [0, 1], params) for backend, kv in zip((cpu, reference), kvs, strict=True))
    assert worst(kvs[1], q, out, [0, 1], params) <= 1
    torch.testing.assert_close(out, right, rtol=0.03, atol=0.03)
    unturned = reference.attend(cache(text, dim, 3, dtype, BFLOAT16, [300, 90]), q, [0, 1], params)
    assert not torch.allclose(unturned[0], right[0], rtol=0.03, atol=0.03)


@cases
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")], ids=["nan", "-nan", "inf"])
def test_what_is_no_number_is_not_hidden(text, dim, group, dtype, kv_dtype, bad):
    """As one number of a prompt's K or V, or of a step's."""
    q, params = numbers((1, KV_HEADS * group, 1, dim), dtype, 9), AttentionParams(dim**-0.5)
    for at in ("k", "v"):
        if bad == float("inf") and ((at == "k" and text == "full") or (text.startswith("fp8") and "token" not in text)):
            continue  # a score of -inf is one; a fixed scale saturates
        if bad == float("inf") and text.startswith("nvfp4"):
            continue  # so does this one
        kv = cache(text, dim, group, dtype, kv_dtype, [200])
        x = {name: numbers((KV_HEADS, 200, dim), dtype, i) for i, name in enumerate("kv")}
        for tokens in ([20], list(range(60))):
            x[at][0, tokens, 5] = bad
            kv.release(0)
            cpu.fill(kv, 0, x["k"], x["v"])
            out = cpu.attend(kv, q, [0], params)
            assert not out[:, :group].isfinite().all()
            assert out[:, group:].isfinite().all()


@pytest.mark.parametrize(
    ("text", "dim", "reason"),
    [
        ("kivi:bits=4,group=16", 64, "groups of 16"),
        ("kivi:bits=2", 32, "head dimension 32 with 2 bits"),
        ("full", 24, ""),
        ("full", 20, "head dimension 20 with 16 bits"),
    ],
)
def test_what_it_cannot_do_has_a_reason(text, dim, reason):
    layer = LayerContext(0, 4, 2, dim, BFLOAT16, BFLOAT16, torch.device("cpu"))
    found = cpu.supports(layer, *parse(text).codec.specs(layer), Needs())
    assert found.startswith(reason)
    assert bool(found) == bool(reason)
    assert cpu.supports(layer, *parse("full").codec.specs(layer), Needs(reads_some=True))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize(
    "asked", [{}, {"window": 37}, {"softcap": 4.0}, {"sinks": True}, {"last": 30}, {"last": 0}], ids=str
)
def test_column_mass_is_the_references(asked, dtype):
    for length in (1, 7, 33, 200, 517):
        q, k = numbers((6, length, 64), dtype, 1), numbers((2, length, 64), dtype, 2)
        more = {name: value for name, value in asked.items() if name != "sinks"}
        more |= {"sink_logits": torch.linspace(-1, 2, 6)} if "sinks" in asked else {}
        right = reference.column_mass(q, k, 0.125, **more)
        torch.set_num_threads(1)
        found = cpu.column_mass(q, k, 0.125, **more)
        torch.testing.assert_close(found, right, rtol=2e-5, atol=2e-5)
        torch.set_num_threads(3)
        assert torch.equal(cpu.column_mass(q.transpose(0, 1).contiguous().transpose(0, 1), k, 0.125, **more), found)
        torch.set_num_threads(1)
