"""Property 2: a sequence does not depend on its mates, on its place in the batch, or on which head is which."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.cache.layer import LayerCache
from kvsuite.methods import parse
from suites.checks.table import (
    CHUNKED,
    HEADS,
    KV_HEADS,
    METHODS,
    SCALE,
    context,
    layer,
    loaded,
    plain,
    prefilled,
    same,
    sizes,
    tokens,
)

STEPS = 24
ROWS = 3
lengths = st.lists(st.integers(1, 70), min_size=ROWS, max_size=ROWS)
orders = st.lists(st.permutations([0, 1, 2, None]), min_size=6, max_size=STEPS)


def stacked(parts, rows, at, n):
    """One batch: the next ``n`` tokens of each row, anything where an item is idle."""
    first = [0 if row is None else at[row] for row in rows]
    return torch.stack([part[:, i : i + n] for part, i in zip(parts, first, strict=True)])


def decode(cache, q, k, v, steps):
    """The outputs of one row fed token by token, (heads, steps, D)."""
    out = [torch.zeros(1, HEADS, 0, q.shape[2])]
    for i in range(steps):
        cache.append(k[None, :, i : i + 1], v[None, :, i : i + 1])
        out.append(cache.attend(q[None, :, i : i + 1], SCALE))
    return torch.cat(out, dim=2)[0]


@pytest.mark.parametrize("text", METHODS)
@settings(max_examples=6)
@given(lengths=lengths, orders=orders, widths=st.lists(st.integers(1, 4), min_size=STEPS, max_size=STEPS))
def test_rows_together_equal_each_row_alone(text, lengths, orders, widths):
    method = parse(text)
    contexts = [context(length, row) for row, length in enumerate(lengths)]
    fed = [tokens(2 * STEPS, 100 + row) for row in range(ROWS)]
    together = loaded(method, contexts, 2 * STEPS)
    alone = [loaded(method, [seen], 2 * STEPS) for seen in contexts]
    at = [0] * ROWS
    for order, width in zip(orders, widths, strict=False):
        rows = order[:width]
        n = 2 if text in CHUNKED and width == 4 else 1
        mine = [fed[0 if row is None else row] for row in rows]
        q, k, v = (stacked([parts[side] for parts in mine], rows, at, n) for side in range(3))
        together.append(k, v, rows)
        out = together.attend(q, SCALE, rows)
        for b, row in enumerate(rows):
            if row is None:
                assert (out[b] == 0).all()
                continue
            alone[row].append(k[b : b + 1], v[b : b + 1])
            assert torch.equal(out[b], alone[row].attend(q[b : b + 1], SCALE)[0])
            at[row] += n
    for row, single in enumerate(alone):
        assert same(together, single, row)
        assert together.seen(row) == single.seen(0) == lengths[row] + at[row]
        assert together.kept(row) == single.kept(0)
        assert together.row_nbytes(row) == single.row_nbytes(0)


@pytest.mark.parametrize("text", METHODS)
@settings(max_examples=4)
@given(length=st.integers(2, 70), seed=st.integers(0, 999))
def test_permuting_heads_permutes_the_result(text, length, seed):
    method = parse(text)
    seen, (q, k, v) = context(length, seed), tokens(STEPS, seed + 1)
    swapped = torch.arange(HEADS).view(KV_HEADS, -1).flip(0).flatten()
    own = tokens(length, seed)
    turned = prefilled(own[0][swapped], own[1].flip(0), own[2].flip(0))
    one, other = loaded(method, [seen], STEPS), loaded(method, [turned], STEPS)
    out = decode(one, q, k, v, STEPS)
    assert torch.equal(decode(other, q[swapped], k.flip(0), v.flip(0), STEPS), out[swapped])
    for a, b in zip(one.read(), reversed(other.read()), strict=True):
        assert torch.equal(a.k, b.k)
        assert torch.equal(a.v, b.v)
        assert torch.equal(a.positions, b.positions)


@pytest.mark.parametrize("text", [text for text in METHODS if not getattr(parse(text).selector, "one_set", False)])
@settings(max_examples=4)
@given(sizes=st.lists(st.integers(5, 30), min_size=KV_HEADS, max_size=KV_HEADS), seed=st.integers(0, 999))
def test_a_head_among_longer_and_shorter_ones_equals_itself_among_equals(text, sizes, seed):
    method, (q, k, v) = parse(text), tokens(40 + STEPS, seed)
    eviction, budget = method.selector and method.selector.eviction, method.selector and method.selector.tokens(40)
    mass = torch.arange(40.0).expand(KV_HEADS, -1) % 7

    def cache(sizes):
        made = LayerCache(layer(), method.codec.specs(layer()), 1, 40 + STEPS, eviction=eviction, selects=True)
        keep = [torch.tensor([*range(min(n, 4)), *range(40 - max(0, n - 4), 40)]) for n in sizes]
        made.load(0, plain(k[:, :40], v[:, :40], mass), keep, budget and [budget] * KV_HEADS)
        return made

    ragged = cache(sizes)
    equal = [cache([n] * KV_HEADS) for n in sizes]
    out = decode(ragged, q[:, 40:], k[:, 40:], v[:, 40:], STEPS).unflatten(0, (KV_HEADS, -1))
    for g, other in enumerate(equal):
        expected = decode(other, q[:, 40:], k[:, 40:], v[:, 40:], STEPS).unflatten(0, (KV_HEADS, -1))
        assert torch.equal(out[g], expected[g])
        a, b = ragged.read()[g], other.read()[g]
        assert torch.equal(a.positions, b.positions)
        assert torch.equal(a.k, b.k)
        assert torch.equal(a.v, b.v)
    assert ragged.kept(0) == sum(other.kept(0) for other in equal) // KV_HEADS


@pytest.mark.parametrize("text", METHODS)
@settings(max_examples=4)
@given(first=st.integers(1, 70), then=st.integers(1, 70), steps=st.integers(0, STEPS))
def test_a_row_used_before_equals_a_fresh_one(text, first, then, steps):
    method, seen = parse(text), context(then, 1)
    used, fresh = (method.cache(layer(), 1, *sizes(method, layer(), max(first, then), STEPS)) for _ in range(2))
    method.compress(0, [context(first, 0)], [used])
    q, k, v = tokens(2 * STEPS, 2)
    decode(used, q[:, STEPS:], k[:, STEPS:], v[:, STEPS:], steps)
    used.reset(0)
    assert used.nbytes == used.seen(0) == used.kept(0) == 0
    for cache in (used, fresh):
        method.compress(0, [seen], [cache])
    assert torch.equal(decode(used, q, k, v, STEPS), decode(fresh, q, k, v, STEPS))
    assert same(used, fresh)
    assert used.nbytes == fresh.nbytes


@pytest.mark.parametrize("text", METHODS)
@pytest.mark.parametrize("length", [12, 60])
def test_looking_at_a_cache_does_not_change_it(length, text):
    method, seen = parse(text), context(length, 0)
    q, k, v = tokens(STEPS, 1)
    looked_at, left_alone = loaded(method, [seen], STEPS), loaded(method, [seen], STEPS)
    looked_at.read()
    for i in range(STEPS):
        t = slice(i, i + 1)
        for cache in (looked_at, left_alone):
            cache.append(k[None, :, t], v[None, :, t])
        looked_at.read()
        out = looked_at.attend(q[None, :, t], SCALE)
        looked_at.read()
        assert torch.equal(left_alone.attend(q[None, :, t], SCALE), out)


@pytest.mark.parametrize("text", METHODS)
def test_what_was_given_is_left_as_it_was(text):
    method, seen = parse(text), context(60, 0)
    q, k, v = tokens(STEPS, 1)
    observed = [y for x in seen.observed.values() for y in (x if isinstance(x, tuple) else (x,))]
    given = (seen.k, seen.v, *observed, q, k, v)
    before = [x.clone() for x in given]
    decode(loaded(method, [seen], STEPS), q, k, v, STEPS)
    for x, y in zip(given, before, strict=True):
        assert torch.equal(x, y)
