"""Property 5: attention equals float64 softmax over what is materialised, as far as the dtype's rounding allows."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.cache.layer import LayerCache
from kvsuite.kernels.quantspec import PAGE
from kvsuite.methods import parse
from suites.checks import naive
from suites.checks.table import (
    CHUNKED,
    CODECS,
    DIM,
    HEADS,
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

GROUP = HEADS // KV_HEADS
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SINKS = torch.tensor([-1.0, 0.5, 2.0, 4.0])
ASKED = st.fixed_dictionaries(
    {},
    optional={
        "window": st.sampled_from([1, 5, 24, 200]),
        "softcap": st.sampled_from([0.7, 4.0]),
        "sink_logits": st.just(SINKS),
    },
)


def read(cache, item, held):
    """Of what each head holds, what its reader has read for one item of the batch."""
    if cache.pages_read is None:
        return held
    chosen = [torch.from_numpy(columns) for columns in cache.pages_read[item]]
    some = [torch.isin(own.slots // PAGE, columns) for own, columns in zip(held, chosen, strict=True)]
    assert all(own.all() or len(columns) for own, columns in zip(some, chosen, strict=True))
    parts = zip(held, some, strict=True)
    return [replace(h, k=h.k[own], v=h.v[own], positions=h.positions[own], slots=h.slots[own]) for h, own in parts]


def check(cache, row, q, out, asked, held):
    """out (HEADS, Q, D) is what float64 gives for the newest Q tokens of a row over ``held``, or what of it was
    read."""
    queries = torch.arange(cache.seen(row) - q.shape[1], cache.seen(row))
    assert out.dtype == q.dtype
    for head in range(HEADS):
        own = held[head // GROUP]
        allowed = naive.causal(queries, own.positions, asked.get("window"))
        sink = float(SINKS[head]) if "sink_logits" in asked else None
        p = naive.weights(q[head], own.k, SCALE, allowed, asked.get("softcap"), sink)
        bound = naive.rounding(q[head], own.k, own.v, SCALE, p, own.integers, own.exact, own.rotated)
        assert ((out[head].double() - p @ own.v.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_bound_notices_that_one_key_is_missing(dtype):
    q, k, v = tokens(40, 0, dtype)
    for head in range(HEADS):
        keys, values = k[head // GROUP], v[head // GROUP]
        p = naive.weights(q[head], keys, SCALE)
        wrong = naive.weights(q[head], keys[:-1], SCALE) @ values[:-1].double()
        assert ((wrong - p @ values.double()).abs() > naive.rounding(q[head], keys, values, SCALE, p)).any(1).sum() > 30


@pytest.mark.parametrize("text", CHUNKED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=5)
@given(
    lengths=st.lists(st.integers(1, 100), min_size=2, max_size=2),
    queries=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    asked=ASKED,
)
def test_attention_of_ragged_rows(dtype, text, lengths, queries, asked):
    method, rows = parse(text), (1, None, 0)
    cache = loaded(method, [context(length, length, dtype) for length in lengths], sum(queries), dtype)
    for seed, n in enumerate(queries):
        fed = [tokens(n, 10 * seed + i, dtype) for i in range(3)]
        q, k, v = (torch.stack([parts[side] for parts in fed]) for side in range(3))
        cache.append(k, v, rows)
        out = cache.attend(q, SCALE, rows, **asked)
        assert (out[1] == 0).all()
        for b, row in ((0, 1), (2, 0)):
            check(cache, row, q[b], out[b], asked, cache.read(row))


@pytest.mark.parametrize("text", STEPWISE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=4)
@given(lengths=st.lists(st.integers(1, 90), min_size=2, max_size=2), asked=ASKED)
def test_attention_while_evicting(dtype, text, lengths, asked):
    rows = (None, 1, 0)
    cache = loaded(parse(text), [context(length, length, dtype) for length in lengths], 12, dtype)
    fed = [tokens(12, i, dtype) for i in range(3)]
    for i in range(12):
        q, k, v = (torch.stack([parts[side][:, i : i + 1] for parts in fed]) for side in range(3))
        cache.append(k, v, rows)
        held = [cache.read(row) for row in range(2)]
        out = cache.attend(q, SCALE, rows, **asked)
        assert (out[0] == 0).all()
        for b, row in ((1, 1), (2, 0)):
            check(cache, row, q[b], out[b], asked, read(cache, b, held[row]))


@pytest.mark.parametrize("text", CODECS)
@settings(max_examples=8)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=KV_HEADS, max_size=KV_HEADS),
    queries=st.integers(1, 9),
    asked=ASKED,
    seed=st.integers(0, 999),
)
def test_attention_of_ragged_heads(text, sizes, queries, asked, seed):
    noise = torch.Generator().manual_seed(seed)
    keep = [torch.randperm(60, generator=noise)[:n].sort().values for n in sizes]
    _, k, v = tokens(60, seed)
    cache = LayerCache(layer(), parse(text).codec.specs(layer()), 2, 60 + queries, selects=True)
    cache.load(1, plain(k, v), keep)
    q, k, v = tokens(queries, seed + 1)
    cache.append(k[None], v[None], (1,))
    held = cache.read(1)
    for index, own in zip(keep, held, strict=True):
        assert own.positions.tolist() == [*index.tolist(), *range(60, 60 + queries)]
    check(cache, 1, q, cache.attend(q[None], SCALE, (1,), **asked)[0], asked, held)


@pytest.mark.parametrize("text", METHODS)
def test_an_idle_batch_is_zero_and_changes_nothing(text):
    cache = loaded(parse(text), [context(30, 0)], 4)
    q, k, v = tokens(2, 1)
    before = cache.nbytes, cache.seen(0), cache.kept(0)
    cache.append(k[None, :, :1].expand(2, -1, -1, -1), v[None, :, :1].expand(2, -1, -1, -1), (None, None))
    out = cache.attend(q[None, :, :1].expand(2, -1, -1, -1), SCALE, (None, None))
    assert torch.equal(out, torch.zeros(2, HEADS, 1, DIM, dtype=torch.bfloat16))
    assert (cache.nbytes, cache.seen(0), cache.kept(0)) == before
