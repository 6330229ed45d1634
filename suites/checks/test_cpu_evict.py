"""What kernels/cpu/count.h evicts is what `LowestEviction` scores lowest."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.cache.decoding import LowestEviction
from kvsuite.cache.layer import LayerCache
from kvsuite.methods import parse
from suites.checks.table import KV_HEADS, SCALE, context, has_compiler, layer, tokens
from suites.checks.test_cpu_store import assert_same

pytestmark = pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")

ROWS, SLOTS = 3, 160
FIELDS = "positions", "accumulated_attention", "newest_attention"
VALUES = (0.0, -0.0, 0.25, 0.5, 1.0, -1.0, math.inf, -math.inf, math.nan)
"""Few, so that many are alike."""


def pair(text, eviction):
    """A cache whose backend evicts by itself, and one that scores in PyTorch."""
    made = []
    for own in (True, False):
        where = layer(torch.float32)
        cache = LayerCache(where, parse(text).codec.specs(where), ROWS, SLOTS, eviction=eviction, backend="cpu")
        assert cache.backend.NAME == "cpu"
        assert cache.evict_lowest is not None
        if not own:
            cache.evict_lowest = None
        for field in (cache.kv.accumulated_attention, cache.kv.newest_attention):
            if field is not None:
                field.zero_()
        for store in (cache.kv.k, cache.kv.v):
            for x in (*store.pools, store.residual):
                x.zero_()
        made.append(cache)
    return made


@st.composite
def evictions(draw):
    field = draw(st.sampled_from(FIELDS))
    recent = draw(st.sampled_from([None, 0, 1, 5, 1000]))
    sinks = draw(st.sampled_from([0, 4])) if field == "positions" else 0
    first = draw(st.sampled_from([0, 4, 1000]))
    return LowestEviction(field, first, None if recent is None else lambda length: recent, sinks)


@pytest.mark.parametrize("text", ["full", "int8", "kivi:bits=4,group=32,residual=32", "int4"])
@given(data=st.data(), eviction=evictions(), threads=st.sampled_from([1, 3]))
@settings(max_examples=60, deadline=None)
def test_the_same_tokens_go(text, data, eviction, threads):
    """Of ragged heads, beside empty slots, where several are the lowest, and where they are no numbers."""
    draw = data.draw
    torch.set_num_threads(threads)
    both = one, other = pair(text, eviction)
    noise = np.random.default_rng(draw(st.integers(0, 999)))

    def load(row):
        length = draw(st.integers(1, 90))
        counts = draw(st.tuples(*[st.integers(0, length)] * KV_HEADS))
        keep = [torch.from_numpy(np.sort(noise.permutation(length)[:n])) for n in counts]
        beyond = draw(st.integers(0, 3))  # tokens that a head has too many
        for cache in both:
            cache.load(row, context(length, row, torch.float32), keep, [max(0, n - beyond) for n in counts])

    def step():
        rows = draw(st.permutations([None, *range(ROWS)]))[: draw(st.integers(1, ROWS + 1))]
        field = getattr(one.kv, eviction.field)
        if eviction.field != "positions" and draw(st.booleans()):
            values = torch.from_numpy(noise.choice(np.array(VALUES, dtype=np.float32), field.shape))
            for cache in both:
                getattr(cache.kv, eviction.field).copy_(values)
        q, k, v = (torch.stack(x) for x in zip(*[tokens(1, n, torch.float32) for n in range(len(rows))], strict=True))
        q = q * draw(st.sampled_from([0, 1]))  # a query of zeros attends to all alike
        attends = draw(st.booleans())  # else the values stay as they were drawn
        for cache in both:
            cache.append(k, v, rows)
            if attends:
                cache.attend(q, SCALE, rows)
            else:
                cache._evict(rows)
                cache.settle(rows)

    for row in range(ROWS):
        load(row)
    for _ in range(draw(st.integers(1, 40))):
        step() if draw(st.integers(0, 20)) else load(draw(st.integers(0, ROWS - 1)))
        assert_same(one.kv, other.kv)
        sinks = one.kv.original_sinks, other.kv.original_sinks
        for row in range(ROWS if sinks[0] is not None else 0):
            for head in np.flatnonzero(one.kv.host.tokens[row] < one.kv.host.seen[row]):
                assert torch.equal(sinks[0][row, head], sinks[1][row, head])
