"""What is stored: by `full` and by all that keep everything the tokens themselves, by a codec what it promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.kernels.quantize import dequantize, quantize
from kvsuite.kernels.quantspec import PAGE
from kvsuite.methods import parse
from suites.checks import naive
from suites.checks.depth import depth
from suites.checks.table import DIM, HEADS, KV_HEADS, METHODS, SCALE, SELECTING, context, loaded, plain, same, tokens

EVERYTHING = {everything for everything in METHODS.values() if everything is not None}


@pytest.mark.parametrize("text", sorted(EVERYTHING))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=depth(2, 4))
@given(length=st.integers(1, 80))
def test_keeping_everything_stores_what_full_stores(dtype, text, length):
    seen, (q, k, v) = context(length, 0, dtype), tokens(20, 1, dtype)
    cache, full = (loaded(parse(name), [seen], 20, dtype) for name in (text, "full"))
    for i in range(20):
        t = slice(i, i + 1)
        for each in (cache, full):
            each.append(k[None, :, t], v[None, :, t])
        assert same(cache, full)
        out, expected = (each.attend(q[None, :, t], SCALE)[0].double() for each in (cache, full))
        held = full.read()
        for h in range(HEADS):
            own = held[h // (HEADS // KV_HEADS)]
            bound = naive.rounding(q[h, t], own.k, own.v, SCALE, naive.weights(q[h, t], own.k, SCALE))
            assert ((out[h] - expected[h]).abs() <= 2 * bound).all()
    assert same(cache, full)
    for g, own in enumerate(full.read()):
        assert torch.equal(own.k, torch.cat([seen.k, k], dim=1)[g])
        assert torch.equal(own.v, torch.cat([seen.v, v], dim=1)[g])
        assert own.positions.tolist() == list(range(length + 20))


BY_MASS = ("h2o", "observed-attention", "streaming-llm")
"""Which tokens others keep hangs on the very bits of K, V or of the queries."""


@pytest.mark.parametrize("text", [text for text in METHODS if text not in SELECTING or text.startswith(BY_MASS)])
@settings(max_examples=depth(2, 4))
@given(length=st.integers(1, 150), steps=st.integers(0, 30), seed=st.integers(0, 99))
def test_what_is_stored_does_not_depend_on_the_compute_dtype(text, length, steps, seed):
    """float32 computes, bfloat16 is stored: the same bits in every pool as where bfloat16 computes, too."""
    q, k, v = tokens(length, seed, torch.float32)
    mass = torch.rand(KV_HEADS, length, generator=torch.Generator().manual_seed(seed))
    mixed = loaded(parse(text), [plain(k, v, mass)], steps, torch.float32, kv_dtype=torch.bfloat16)
    same_dtype = loaded(parse(text), [plain(k.bfloat16(), v.bfloat16(), mass)], steps)
    for i in range(steps):
        q, k, v = (x[None] for x in tokens(1, 1000 + i, torch.float32))
        for cache, dtype in ((mixed, torch.float32), (same_dtype, torch.bfloat16)):
            cache.append(k.to(dtype), v.to(dtype))
            if parse(text).selector is None:  # which tokens an evictor gives up may hang on a rounding of the mass
                cache.attend(q.to(dtype), SCALE)
    for mine, other in ((mixed.kv.k, same_dtype.kv.k), (mixed.kv.v, same_dtype.kv.v)):
        for a, b in zip((*mine.pools, mine.residual), (*other.pools, other.residual), strict=True):
            assert a.dtype == b.dtype
        for head in range(KV_HEADS):
            done = mine.spec.num_encoded(int(mixed.kv.host.slots[0, head]))
            for a, b in zip(units(mixed, mine, 0, head, done), units(same_dtype, other, 0, head, done), strict=True):
                assert torch.equal(a, b)
    sinks = same_dtype.kv.original_sinks  # they are put aside only where pages are read in place
    assert mixed.row_nbytes(0) == same_dtype.row_nbytes(0) - (0 if sinks is None else sinks[0].nbytes)
    assert mixed.layer.token_bytes == same_dtype.layer.token_bytes
    assert all(held.k.dtype == torch.float32 for held in mixed.read())


def units(cache, store, row, head, done):
    """The fields of a (row, head)'s ``done`` encoded slots, found by the page table: each (1, units, *shape)."""
    pages = cache.kv.page_table[row, head, : -(-done // PAGE)].long()
    return tuple(pool[pages].flatten(0, 1)[None, : done // store.spec.block] for pool in store.pools)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_full_can_be_told_its_dtype(dtype):
    _, k, v = tokens(60, 1, torch.float32)
    cache = loaded(parse(f"full:dtype={dtype}"), [plain(k, v)], 4, torch.float32, kv_dtype=torch.bfloat16)
    size = getattr(torch, dtype).itemsize
    assert cache.row_nbytes(0) == KV_HEADS * (2 * 64 * DIM * size + 2 * 4 + 4 * 4)  # two pages, their table, lengths
    stored = [held.k for held in cache.read()]
    assert all(torch.equal(a, b.to(getattr(torch, dtype)).float()) for a, b in zip(stored, k, strict=True))


@pytest.mark.parametrize("text", METHODS)
@settings(max_examples=depth(2, 6))
@given(lengths=st.lists(st.integers(1, 150), min_size=3, max_size=3), steps=st.integers(1, 12))
def test_the_table_finds_a_rows_pages_in_the_pool(text, lengths, steps):
    cache = loaded(parse(text), [context(length, length) for length in lengths], steps)
    for i in range(steps):
        q, k, v = (torch.stack([x[:, i : i + 1]] * 3) for x in tokens(steps, 5))
        cache.append(k, v, (0, 1, 2))
        cache.attend(q, SCALE, (0, 1, 2))
    for row in range(3):
        held = cache.read(row)
        for name in ("k", "v"):
            store = getattr(cache.kv, name)
            for head in range(KV_HEADS):
                done = int(store.spec.num_encoded(int(cache.kv.host.slots[row, head])))
                fitted = tuple(x[row, head : head + 1] for x in store.fitted)
                found = store.spec.decode(units(cache, store, row, head, done), torch.bfloat16, fitted).flatten(1, 2)[0]
                slots = held[head].slots
                slots = slots[(slots < done) & ((slots >= 4) if name == "k" else True)]  # sinks' keys may be turned
                own = torch.isin(held[head].slots, slots)
                assert torch.equal(found[slots.long()], getattr(held[head], name)[own])


@pytest.mark.parametrize("text", [text for text in METHODS if text.startswith("kivi")])
@settings(max_examples=depth(5, 8))
@given(length=st.integers(1, 290), steps=st.integers(0, 3))
def test_kivi_quantizes_all_but_its_newest(text, length, steps):
    codec = parse(text).codec
    bits, group, residual = codec.bits, codec.group, codec.residual
    _, k, v = tokens(length + steps, 0)
    cache = loaded(parse(text), [plain(k[:, :length], v[:, :length])], steps)
    for i in range(length, length + steps):
        cache.append(k[None, :, i : i + 1], v[None, :, i : i + 1])
    there = length + steps - (codec.order == "after")  # when the authors encoded last: after the step before this one
    k_end, v_end = there // residual * residual, max(0, there - residual)
    for g, own in enumerate(cache.read()):
        by_token = k[g, :k_end].view(-1, group, DIM)
        expected_k = dequantize(*quantize(by_token, bits, -2), torch.bfloat16).view(-1, DIM)
        by_channel = v[g, :v_end].view(v_end, DIM // group, group)
        expected_v = dequantize(*quantize(by_channel, bits, -1), torch.bfloat16).view(-1, DIM)
        assert torch.equal(own.k, torch.cat([expected_k, k[g, k_end:]]))
        assert torch.equal(own.v, torch.cat([expected_v, v[g, v_end:]]))


def test_int8_quantizes_every_token_by_itself():
    _, k, v = tokens(70, 0)
    for g, own in enumerate(loaded(parse("int8"), [plain(k, v)], 0).read()):
        assert torch.equal(own.k, dequantize(*quantize(k[g], 8, -1), torch.bfloat16))
        assert torch.equal(own.v, dequantize(*quantize(v[g], 8, -1), torch.bfloat16))


@pytest.mark.parametrize("text", SELECTING)
@pytest.mark.parametrize("length", [10, 70])
def test_what_stays_is_stored_as_the_codec_alone_would(length, text):
    method, seen, (q, k, v) = parse(text), context(length, 0), tokens(30, 1)
    cache = loaded(method, [seen], 30)
    kept = [held.positions.long() for held in cache.read()]
    for i in range(30):
        cache.append(k[None, :, i : i + 1], v[None, :, i : i + 1])
        cache.attend(q[None, :, i : i + 1], SCALE)
    turned = getattr(method.selector, "positions", "") == "cache" and cache.kept(0) < KV_HEADS * cache.seen(0)
    for g, own in enumerate(cache.read()):
        given = [torch.cat([x[g, kept[g]], new[g]]).expand(KV_HEADS, -1, -1) for x, new in ((seen.k, k), (seen.v, v))]
        alone = loaded(parse(method.codec.spelled()), [plain(*given)], 0).read()
        place = {p: i for i, p in enumerate([*kept[g].tolist(), *range(length, length + 30)])}
        where = [place[p] for p in own.positions.tolist()]
        skip = 4 if turned else 0  # the sinks' keys: see test_positions.py
        assert torch.equal(own.k[skip:], alone[g].k[where][skip:])
        assert torch.equal(own.v, alone[g].v[where])
