"""Pages: taken as a sequence grows, given back when its tokens are evicted, compacted or forgotten; never shared."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.cache.layer import LayerCache
from kvsuite.kernels.allocator import PageAllocator
from kvsuite.kernels.context import Needs
from kvsuite.kernels.paged import NULL_PAGE, PagedKV
from kvsuite.kernels.quantspec import PAGE
from kvsuite.kernels.reference import append, compact, evict, fill, release_empty
from kvsuite.methods import parse
from suites.checks.depth import depth
from suites.checks.table import DECIDED, KV_HEADS, RAGGED, SCALE, context, layer, loaded, plain, tokens

CODECS = ["int8", "kivi:bits=4,group=16,residual=32", "kivi:bits=2,group=8,residual=8"]


def nothing_leaks(kv):
    """Each page is free or in one place of the table; none holds what nobody owns."""
    null = int(kv.needs.positions)
    held = [
        int(page)
        for row in range(len(kv.host.seen))
        for head in range(KV_HEADS)
        for page in kv.table[row, head, : kv.host.columns[row, head]]
        if page >= null
    ]
    free = list(kv.allocator._free)
    assert torch.equal(kv.page_table, torch.from_numpy(kv.table))
    assert len(held) == len(set(held)) == sum(kv.held_pages(row) for row in range(len(kv.host.seen)))
    assert sorted([*held, *free]) == list(range(null, len(kv.k.pools[0])))
    if kv.positions is not None:
        assert (kv.positions[[NULL_PAGE, *free]] == -1).all()
        for row in range(len(kv.host.seen)):
            for head in range(KV_HEADS):
                pages = torch.from_numpy(kv.table[row, head].astype(np.int64))
                assert int((kv.positions[pages] >= 0).sum()) == kv.host.tokens[row, head]


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["admit", "admit", "step", "step", "step", "step", "evict", "compact", "release",
    "reset"]), st.integers(0, 999)), min_size=60, max_size=120,
)  # fmt: skip


@pytest.mark.parametrize("arena", [True, False], ids=["arena", "pool"])
@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=depth(8, 20))
@given(actions=ACTIONS)
def test_random_histories_leak_no_page_and_share_none(codec, arena, actions):
    """6 × 20 histories of 60 to 120 actions each: some 10,000."""
    where, rows, slots = layer(), 3, 5 * PAGE
    specs = parse(codec).codec.specs(where)
    kv = PagedKV.empty(where, specs, rows, slots, Needs(positions=True, evicts=True), pages=4 * KV_HEADS, arena=arena)
    kv.host.budget[:] = 5
    _, k, v = tokens(200, 0)
    for action, seed in actions:
        noise = np.random.default_rng(seed)
        row = int(noise.integers(rows))
        room = int((kv.host.limit[row] - kv.host.slots[row]).min())
        if action == "admit":
            kv.release(row)
            counts = noise.integers(0, 2 * PAGE, KV_HEADS)
            keep = [torch.from_numpy(np.sort(noise.permutation(90)[:n])) for n in counts]
            fill(kv, row, k[:, :90], v[:, :90], keep)
        elif action == "step" and room:
            n = int(noise.integers(1, min(room, 40) + 1))

            kv.advance([row], n)
            append(kv, k[None, :, :n], v[None, :, :n], (row,))
        elif action == "evict" and kv.host.tokens[row].min() > 5:
            held = kv.positions[torch.from_numpy(kv.table[row].astype(np.int64))].flatten(1) >= 0
            if (kv.host.free_slot[row] >= 0).any():
                continue  # a step takes the slot first
            evict(kv, (row,), held.int().argmax(-1)[None])
            kv.count_evicted([row])
        elif action == "compact" and kv.host.tokens[row].min() > 0:
            held = kv.positions[torch.from_numpy(kv.table[row].astype(np.int64))].flatten(1) >= 0
            keep = [torch.nonzero(own)[:, 0] for own in held]
            compact(kv, row, [own[torch.from_numpy(noise.random(len(own)) < 0.5)] for own in keep])
            kv.host.free_slot[row] = -1
        elif action == "release":
            release_empty(kv, [row])
        elif action == "reset":
            kv.release(row)
        nothing_leaks(kv)
    for row in range(rows):
        kv.release(row)
    assert len(kv.allocator) == rows * 4 * KV_HEADS


def test_an_allocator_refuses_what_is_not_there():
    pages = PageAllocator(range(3))
    assert sorted(pages.take() for _ in range(3)) == [0, 1, 2]
    with pytest.raises(ValueError, match="no page is free"):
        pages.take()
    pages.give([1])
    with pytest.raises(ValueError, match="page 1 was free already"):
        pages.give([1])
    with pytest.raises(ValueError, match="page 2 is not free"):
        pages.claim(2)
    assert pages.claim(1) == 1


def decode(cache, steps, seed=1):
    """Bytes held and free pages after each step of the first row."""
    q, k, v = tokens(steps, seed)
    found = []
    for n in range(steps):
        cache.append(k[None, :, n : n + 1], v[None, :, n : n + 1])
        cache.attend(q[None, :, n : n + 1], SCALE)
        found.append((cache.row_nbytes(0), len(cache.kv.allocator), cache.fragmentation(0)))
    return found


def test_streaming_over_blocks_gives_its_old_pages_back():
    codec, steps = "kivi:bits=4,group=16,residual=32", 400
    cache = loaded(parse(f"streaming-llm:budget=40 + {codec}"), [context(200, 0)], steps)
    found = decode(cache, steps)
    assert any(b[0] < a[0] and b[1] > a[1] for a, b in pairwise(found))
    # sinks' page, 40 tokens and up to 31 more in pages cut at both ends, a residual not yet encoded, 32 steps to the
    # next look
    most = 1 + -(-(40 + 32 + 32 + 2 * PAGE) // PAGE)
    held = [(KV_HEADS * (cache.kv.pages_per_row // KV_HEADS) - free) / KV_HEADS for _, free, _ in found]
    assert max(held) <= most < 400 // PAGE
    assert 0 < found[-1][2] < 0.8, "what is left of fragmentation"
    nothing_leaks(cache.kv)


def test_heavy_hitters_over_blocks_free_pages_that_are_wholly_empty():
    text, steps = "h2o:heavy=2,recent=40 + kivi:bits=4,group=16,residual=32", 500
    cache = loaded(parse(text), [context(200, 0)], steps)
    stored = {(g, int(p)): held.k[i] for g, held in enumerate(cache.read()) for i, p in enumerate(held.positions)}
    found = decode(cache, steps)
    assert cache.kv.host.gaps.sum() > 0
    assert found[-1][0] < cache.kv.pages_per_row * cache.kv.page_bytes / 2
    for g, held in enumerate(cache.read()):
        for i, position in enumerate(held.positions.tolist()):
            if (g, position) in stored:  # still the very codes: nothing was encoded again
                assert torch.equal(held.k[i], stored[g, position])
    nothing_leaks(cache.kv)


@pytest.mark.parametrize("text", [text for text in RAGGED if text not in DECIDED])
def test_ragged_heads_hold_what_they_need(text):
    cache = loaded(parse(text), [context(160, 3)], 8)
    counts = [len(held.positions) for held in cache.read()]
    assert sum(counts) == KV_HEADS * parse(text).selector.tokens(160)
    pages = [-(-n // PAGE) for n in counts]
    assert cache.kv.held_pages(0) == sum(pages)
    assert len(cache.kv.allocator) == cache.kv.pages_per_row - sum(pages)
    nothing_leaks(cache.kv)


def test_a_head_gives_its_pages_to_another_that_keeps_more():
    where = layer()
    cache = LayerCache(where, parse("full").codec.specs(where), 2, 10 * PAGE, selects=True, pages=12)
    _, k, v = tokens(300, 0)
    for row, counts in enumerate([(9 * PAGE, PAGE), (PAGE, 9 * PAGE)]):
        cache.load(row, plain(k, v), [torch.arange(n) for n in counts])
    assert [cache.kv.held_pages(row) for row in range(2)] == [10, 10]
    with pytest.raises(ValueError, match="row 1 is full: 14 pages do not fit into 12"):
        cache.load(1, plain(k, v), [torch.arange(7 * PAGE)] * 2)
    nothing_leaks(cache.kv)
