"""Property 3: token by token, in chunks or all at once, the same is stored."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.cache.layer import LayerCache
from kvsuite.methods import parse
from suites.checks.table import (
    CHUNKED,
    CODECS,
    FITTED,
    KV_HEADS,
    SCALE,
    STEPWISE,
    context,
    layer,
    loaded,
    plain,
    same,
    tokens,
)

chunks = st.lists(st.integers(1, 9) | st.integers(16, 60), min_size=1, max_size=5)


def feed(cache, k, v, chunks, rows=(0,)):
    """Append k, v (heads, n, D) chunk by chunk, the same to every row."""
    first = 0
    for n in chunks:
        part = (slice(None), slice(first, first + n))
        cache.append(k[part].expand(len(rows), -1, -1, -1), v[part].expand(len(rows), -1, -1, -1), rows)
        first += n


@pytest.mark.parametrize("text", [text for text in CODECS if text not in FITTED])
@settings(max_examples=8)
@given(prompt=st.integers(1, 140), chunks=chunks)
def test_any_chunks_equal_one_by_one_equal_all_at_once(text, prompt, chunks):
    method, total = parse(text), prompt + sum(chunks)
    _, k, v = tokens(total, 0)
    start = plain(k[:, :prompt], v[:, :prompt])
    k_after, v_after = k[:, prompt:], v[:, prompt:]
    once = loaded(method, [plain(k, v)], 0)
    in_chunks, singly = loaded(method, [start], sum(chunks)), loaded(method, [start], sum(chunks))
    feed(in_chunks, k_after, v_after, chunks)
    feed(singly, k_after, v_after, [1] * sum(chunks))
    for cache in (in_chunks, singly):
        assert same(cache, once)
        assert cache.seen(0) == once.seen(0) == total
        assert cache.row_nbytes(0) == once.row_nbytes(0)
    q, _, _ = tokens(1, 1)
    assert torch.equal(in_chunks.attend(q[None], SCALE), once.attend(q[None], SCALE))
    assert torch.equal(singly.attend(q[None], SCALE), once.attend(q[None], SCALE))


@pytest.mark.parametrize("text", [text for text in CHUNKED if text not in CODECS or text in FITTED])
@settings(max_examples=8)
@given(prompt=st.integers(1, 140), chunks=chunks)
def test_chunks_after_a_selected_prompt_equal_one_by_one(text, prompt, chunks):
    method, seen = parse(text), context(prompt, 0)
    _, k, v = tokens(sum(chunks), 1)
    in_chunks, singly = loaded(method, [seen], sum(chunks)), loaded(method, [seen], sum(chunks))
    feed(in_chunks, k, v, chunks)
    feed(singly, k, v, [1] * sum(chunks))
    assert same(in_chunks, singly)
    assert in_chunks.row_nbytes(0) == singly.row_nbytes(0)


@pytest.mark.parametrize("text", CODECS)
@settings(max_examples=6)
@given(lengths=st.lists(st.integers(1, 50), min_size=4, max_size=4), chunks=chunks)
def test_chunks_on_ragged_heads_and_rows_equal_one_by_one(text, lengths, chunks):
    _, k, v = tokens(50 + sum(chunks), 0)
    caches = []
    for fed in (chunks, [1] * sum(chunks)):
        cache = LayerCache(layer(), parse(text).codec.specs(layer()), 2, 50 + sum(chunks), selects=True)
        for row in range(2):
            keep = [torch.arange(50 - n, 50) for n in lengths[row * KV_HEADS : (row + 1) * KV_HEADS]]
            cache.load(row, plain(k[:, :50], v[:, :50]), keep)
        feed(cache, k[:, 50:], v[:, 50:], fed, rows=(1, 0))
        caches.append(cache)
    for row in range(2):
        assert same(caches[0], caches[1], row, row)
        assert caches[0].kept(row) == sum(lengths[2 * row : 2 * row + 2]) + KV_HEADS * sum(chunks)


@pytest.mark.parametrize("text", STEPWISE)
def test_what_evicts_while_decoding_takes_tokens_one_by_one(text):
    cache = loaded(parse(text), [context(40, 0)], 8)
    assert cache.stepwise
    _, k, v = tokens(2, 1)
    with pytest.raises(ValueError, match="one by one"):
        cache.append(k[None], v[None])
    assert cache.seen(0) == 40


@pytest.mark.parametrize("text", CHUNKED)
def test_what_does_not_evict_takes_chunks(text):
    assert not loaded(parse(text), [context(40, 0)], 8).stepwise


@pytest.mark.parametrize("text", CHUNKED)
@pytest.mark.parametrize("step", [1, 5])
def test_a_full_row_refuses_more_and_keeps_what_it_has(text, step):
    method, seen = parse(text), context(40, 0)
    cache, twin = (method.cache(layer(), 2, 64) for _ in range(2))
    for full in (cache, twin):
        for row in range(2):
            method.compress(row, [seen], [full])
    q, k, v = tokens(64, 1)
    room = int((cache.kv.host.limit - cache.kv.host.slots).min())
    for full in (cache, twin):
        feed(full, k, v, [room])
    with pytest.raises(ValueError, match="row 0 is full"):
        cache.append(k[None, :, :step], v[None, :, :step])
    assert same(cache, twin)
    assert same(cache, twin, 1, 1)
    assert torch.equal(cache.attend(q[None, :, :1], SCALE), twin.attend(q[None, :, :1], SCALE))


@pytest.mark.parametrize("text", CODECS)
@pytest.mark.parametrize("length", [33, 70])
def test_a_prompt_larger_than_a_row_is_refused(text, length):
    cache = parse(text).cache(layer(), 2, 32)
    _, k, v = tokens(length, 0)
    with pytest.raises((ValueError, RuntimeError)):
        cache.load(0, plain(k, v))


def test_a_cache_that_keeps_all_refuses_to_leave_tokens_out():
    cache = parse("full").cache(layer(), 1, 32)
    _, k, v = tokens(8, 0)
    with pytest.raises(ValueError, match="selects"):
        cache.load(0, plain(k, v), torch.tensor([[1, 2], [3, 4]]))
