"""Property 6: the bytes reported are the bytes held, by formula and by counting, and compressing shrinks them."""

from itertools import pairwise
from math import ceil
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.cache.layer import LayerCache
from kvsuite.kernels.context import LayerContext
from kvsuite.kernels.quantspec import PAGE
from kvsuite.methods import parse
from suites.checks.table import (
    CHUNKED,
    COMPACTING,
    DIM,
    EVERY_STEP,
    KV_HEADS,
    METHODS,
    SCALE,
    STEPWISE,
    context,
    layer,
    loaded,
    plain,
    tokens,
)
from suites.findings.codecs import shares

WIDE = DIM * 2  # bytes of a bfloat16 vector
KIVI = {"bits": 4, "group": 32, "residual": 128}


def reachable(thing, found=None, seen=None):
    """All tensors an object holds, its model's own apart: storage address -> bytes."""
    found, seen = {} if found is None else found, set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, (LayerContext, ModuleType)):
        return found
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        found.pop(0, None)  # an empty tensor's
    elif isinstance(thing, dict):
        for value in thing.values():
            reachable(value, found, seen)
    elif isinstance(thing, (list, tuple, set)):
        for value in thing:
            reachable(value, found, seen)
    elif hasattr(thing, "__dict__"):
        reachable(vars(thing), found, seen)
    return found


def pages(tokens):
    return ceil(tokens / PAGE)


def whole(n):
    return 2 * pages(n) * PAGE * WIDE


def int8(n):
    return 2 * pages(n) * PAGE * (DIM + 2 + 2)


def kivi(n, bits=4, group=32, residual=128, positions=False):
    keys = PAGE * DIM * bits // 8 + PAGE // group * DIM * 4
    values = PAGE * (DIM * bits // 8 + DIM // group * 4)
    return pages(n if positions else n // residual * residual) * (keys + values) + 2 * residual * WIDE


def turboquant(n):
    return pages(n) * PAGE * ((DIM // 2 + 2) + (DIM // 2 + 2 + 2))


def lmdeploys(n):
    return pages(n) * PAGE * ((DIM // 2 + 2 + 2) + (DIM // 4 + 2))


def kvarn(n):
    keys = PAGE * DIM // 2 + DIM * 4 + PAGE * 2
    values = PAGE * DIM // 4 + PAGE * 4 + DIM * 2
    return n // PAGE * (keys + values) + 2 * PAGE * WIDE


def gear(n, outliers=2, rank=4):
    keys = PAGE * DIM // 2 + DIM * (4 + 3 * outliers) + PAGE * rank * 2
    values = PAGE * (DIM // 2 + 4 + 3 * outliers + rank * 2)
    return n // PAGE * (keys + values) + 2 * PAGE * WIDE + 2 * DIM * rank * 2


# a head's stored K and V for n slots, and the state of its selector: (per page, once); one number of a row is two
# halves
SMALL = {"group": 16, "residual": 32}
EXPECTED = {
    "full": (whole, 0, 0),
    "jitter": (whole, 0, 0),
    "int8": (int8, 0, 0),
    "kivi:bits=4": (kivi, 0, 0),
    "kivi:bits=2": (lambda n: kivi(n, 2), 0, 0),
    "kivi:bits=4,group=16,residual=32": (lambda n: kivi(n, **SMALL), 0, 0),
    "kivi:bits=2,group=8,residual=16": (lambda n: kivi(n, 2, 8, 16), 0, 0),
    "turboquant:bits=k4v4": (turboquant, 0, 0),
    "turboquant:bits=k4v2": (lmdeploys, 0, 0),
    "kvarn:bits=k4v2": (kvarn, 0, 0),
    "gear:bits=4,residual=32": (gear, 0, 0),
    "gear-l:bits=4,residual=32,rank=2": (lambda n: gear(n, 0, 2), 0, 0),
    "random:budget=40": (whole, 4 * PAGE, 0),
    "random:budget=40 + int8": (int8, 4 * PAGE, 0),
    "streaming-llm:budget=40": (whole, 4 * PAGE, 4 * WIDE + 4),
    "streaming-llm:budget=40,sinks=7": (whole, 4 * PAGE, 7 * WIDE + 4),
    "streaming-llm:budget=40,positions=absolute": (whole, 4 * PAGE, 4),
    "streaming-llm:budget=40 + kivi:bits=4,group=16,residual=32": (
        lambda n: kivi(n, **SMALL, positions=True), 4 * PAGE, 4,
    ),
    "h2o:budget=40": (whole, 8 * PAGE, 4 + 4 // KV_HEADS),
    "h2o:budget=40 + int8": (int8, 8 * PAGE, 4 + 4 // KV_HEADS),
    "h2o:budget=40 + kivi:bits=4,group=16,residual=32": (
        lambda n: kivi(n, **SMALL, positions=True), 8 * PAGE, 4 + 4 // KV_HEADS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", EXPECTED)
@settings(max_examples=6)
@given(length=st.integers(1, 290), steps=st.integers(0, 12))
def test_bytes_are_those_of_the_formula(text, length, steps):
    method, (held, per_page, once) = parse(text), EXPECTED[text]
    q, k, v = tokens(length + steps, 0)
    mass = torch.ones(KV_HEADS, length)
    cache = loaded(method, [plain(k[:, :length], v[:, :length], mass)], steps)
    slots = min(length, 40) if method.selector else length
    for n in range(length, length + steps):
        cache.append(k[None, :, n : n + 1], v[None, :, n : n + 1])
        cache.attend(q[None, :, n : n + 1], SCALE)
    if cache.stepwise and cache.kv.k.spec.residual == 0:  # the freed slot is taken again
        slots = min(slots + steps, 41)
    else:
        slots += steps
    table, lengths = 4, 4 * 4
    columns = int(cache.kv.host.columns[0, 0])  # a residual without positions needs none
    assert columns == (pages(slots) if method.selector or cache.kv.k.spec.residual == 0 else columns)
    assert cache.nbytes == KV_HEADS * (held(slots) + columns * (table + per_page) + lengths + once)


@pytest.mark.parametrize("text", METHODS)
@settings(max_examples=5)
@given(lengths=st.lists(st.integers(1, 99), min_size=1, max_size=3), steps=st.integers(0, 20), spare=st.integers(0, 70))
def test_bytes_and_slack_are_all_that_is_allocated(text, lengths, steps, spare):
    contexts = [context(length, length) for length in lengths]
    cache = loaded(parse(text), contexts, steps + spare)
    rows = range(len(lengths))
    q, k, v = (x.expand(len(lengths), -1, -1, -1) for x in tokens(max(1, steps), 1))
    before = reachable(cache)
    for n in range(steps):
        cache.append(k[:, :, n : n + 1], v[:, :, n : n + 1], rows)
        cache.attend(q[:, :, n : n + 1], SCALE, rows)
    assert reachable(cache) == before, "decoding allocates nothing"
    assert cache.nbytes + cache.slack == sum(before.values())
    assert cache.slack >= 0
    assert cache.nbytes == sum(cache.row_nbytes(row) for row in rows)
    alone = [loaded(parse(text), [seen], steps + spare) for seen in contexts]
    for row, single in enumerate(alone):
        for n in range(steps):
            single.append(k[:1, :, n : n + 1], v[:1, :, n : n + 1])
            single.attend(q[:1, :, n : n + 1], SCALE)
        assert single.nbytes == cache.row_nbytes(row) > 0
    cache.reset(0)
    assert cache.row_nbytes(0) == 0
    assert cache.nbytes + cache.slack == sum(before.values())


@pytest.mark.parametrize("text", ["full", "jitter", "int8"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_row_of_whole_pages_has_no_slack(text, count):
    cache = parse(text).cache(layer(), 2, count * PAGE)
    _, k, v = tokens(count * PAGE, 0)
    for row in range(2):
        assert cache.slack == sum(reachable(cache).values()) - row * cache.row_nbytes(0)
        cache.load(row, plain(k, v))
    assert cache.slack == 0
    less = parse(text).cache(layer(), 2, count * PAGE + 1)
    less.load(0, plain(k, v))
    assert less.slack == sum(reachable(less).values()) - cache.row_nbytes(0) > 0


@pytest.mark.parametrize("text", METHODS)
def test_capacity_is_whole_pages(text):
    sizes = [sum(reachable(parse(text).cache(layer(), 1, n)).values()) for n in (1, PAGE, PAGE + 1)]
    assert sizes[0] == sizes[1] < sizes[2]


@pytest.mark.parametrize("text", METHODS)
def test_an_empty_cache_holds_nothing(text):
    cache = parse(text).cache(layer(), 3, 64)
    assert cache.nbytes == 0
    assert cache.slack == sum(reachable(cache).values())


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("full", 16),
        ("int8", 8 + 32 / DIM),
        ("kivi:bits=4", 4 + 32 / 32),
        ("kivi:bits=2", 2 + 32 / 32),
        ("kivi:bits=2,group=8", 2 + 32 / 8),
        ("nvfp4", 4 + 8 / 16),
        ("mxfp4", 4 + 8 / 32),
        ("q8_0", 8 + 16 / 32),
        ("q4_0", 4 + 16 / 32),
        ("turboquant:bits=k4v4", 4 + (16 + 32) / DIM / 2),
        ("turboquant:bits=k3v4", 3.5 + (16 + 32) / DIM / 2),
        ("turboquant:bits=k3v3", 3 + (16 + 32) / DIM / 2),
        ("turboquant:bits=k8v4", 6 + 32 / DIM / 2),
        ("turboquant:bits=k4v2", 3 + (32 + 16) / DIM / 2),
        ("kvarn:bits=k4v2", 3 + (48 / 32 + 48 / DIM) / 2),
        ("gear-l:bits=4", 4 + (32 / 32 + 64 / DIM + (32 + 64) / DIM) / 2),
        ("gear:bits=4", 4 + (80 / 32 + 64 / DIM + (32 + 48 + 64) / DIM) / 2),
    ],
)
def test_a_codec_takes_as_many_bits_per_element_as_claimed(text, bits):
    sizes = []
    for length in (256, 1024):
        _, k, v = tokens(length, 0)
        sizes.append(loaded(parse(text), [plain(k, v)], 0).nbytes)
    table = 4 * KV_HEADS * (1024 - 256) // PAGE
    assert (sizes[1] - sizes[0] - table) * 8 == 2 * KV_HEADS * DIM * (1024 - 256) * bits


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("kivi:bits=4", 0.345),
        ("kivi:bits=2", 0.225),
        ("int4", 0.28),
        ("int4:rotate=hadamard", 0.28),
        ("nvfp4", 0.29),
        ("mxfp4", 0.27),
        ("q4_0", 0.29),
        ("int8", 0.53),
        ("q8_0", 0.54),
        ("fp8", 0.51),
        ("turboquant:bits=k4v4", 0.28),
        ("turboquant:bits=k3v3", 0.2),
        ("turboquant:bits=k8v4", 0.39),
        ("turboquant:bits=k4v2", 0.2),
        ("kvarn:bits=k4v2", 0.26),
        ("gear-l:bits=4", 0.35),
        ("gear:bits=4", 0.41),
        ("h2o:budget=0.5 + ada", 0.515),
    ],
)
def test_4096_tokens_take_no_more_of_bfloat16s_bytes(text, most):
    """A layer that is compressed, and a model of 32 of them: docs/parity.md."""
    assert max(shares(text)) <= most


@pytest.mark.parametrize(("text", "most"), [("vllm:turboquant_4bit_nc", 0.355), ("vllm:turboquant_3bit_nc", 0.301)])
def test_a_model_of_which_four_layers_stay_whole(text, most):
    layer, model = shares(text)
    assert model == pytest.approx((28 * layer + 4) / 32, rel=1e-3)  # but for the page table
    assert layer < model <= most


def test_compressing_shrinks():
    seen = context(300, 0)
    order = ["kivi:bits=2,residual=32", "kivi:bits=4,residual=32", "int8", "full"]
    sizes = [loaded(parse(text), [seen], 0).nbytes for text in order]
    assert sizes == sorted(set(sizes))
    for text in METHODS:
        if parse(text).selector and not parse(text).budget.whole(0, 1):
            assert loaded(parse(text), [seen], 0).nbytes < sizes[-1] / 2


@settings(max_examples=10)
@given(sizes=st.lists(st.integers(1, 150), min_size=KV_HEADS, max_size=KV_HEADS))
def test_ragged_heads_free_memory(sizes):
    _, k, v = tokens(150, 0)
    cache = LayerCache(layer(), parse("full").codec.specs(layer()), 1, 150, selects=True)
    cache.load(0, plain(k, v), [torch.arange(n) for n in sizes])
    assert cache.nbytes == sum(whole(n) + pages(n) * (4 + 4 * PAGE) + 16 for n in sizes)
    assert cache.kept(0) == sum(sizes)


@pytest.mark.parametrize("text", STEPWISE + CHUNKED)
def test_capacity_is_enough_and_decoding_at_a_budget_takes_no_more_pages(text):
    method = parse(text)
    cache = loaded(method, [context(60, 0)], 70)
    q, k, v = tokens(70, 1)
    sizes = []
    for n in range(70):
        cache.append(k[None, :, n : n + 1], v[None, :, n : n + 1])
        cache.attend(q[None, :, n : n + 1], SCALE)
        sizes.append(cache.nbytes)
    singly = cache.kv.by_token
    if text in EVERY_STEP and singly:  # the next token takes the evicted one's slot
        assert len(set(sizes[max(0, method.selector.tokens(60) - 60) :])) == 1
    elif text in COMPACTING and singly:
        assert any(b < a for a, b in pairwise(sizes))
        assert max(sizes[16:]) <= max(sizes[:16]) + KV_HEADS * cache.kv.page_bytes
    else:
        assert max(sizes) > sizes[0]
        assert sizes == sorted(sizes) or not singly  # pages without a token go back: test_pages.py
