"""What is stored: by `full` and by all that keep everything the tokens themselves, by a codec what it promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.cache.context import PAGE
from kvsuite.cache.prefill import Observation
from kvsuite.kernels.quantize import dequantize, quantize
from kvsuite.methods import parse
from suites.checks import naive
from suites.checks.table import DIM, HEADS, KV_HEADS, METHODS, SCALE, SELECTING, context, loaded, same, tokens

EVERYTHING = {everything for everything in METHODS.values() if everything is not None}
BOTH = slice(0, KV_HEADS)


@pytest.mark.parametrize("text", sorted(EVERYTHING))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=4)
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
        held = full.materialise()
        for h in range(HEADS):
            own = held[h // (HEADS // KV_HEADS)]
            bound = naive.rounding(q[h, t], own.k, own.v, SCALE, naive.weights(q[h, t], own.k, SCALE))
            assert ((out[h] - expected[h]).abs() <= 2 * bound).all()
    assert same(cache, full)
    for g, own in enumerate(full.materialise()):
        assert torch.equal(own.k, torch.cat([seen.k, k], dim=1)[g])
        assert torch.equal(own.v, torch.cat([seen.v, v], dim=1)[g])
        assert own.positions.tolist() == list(range(length + 20))


@pytest.mark.parametrize("text", [text for text in METHODS if not text.startswith("random")])  # it hashes K's own bits
@settings(max_examples=4)
@given(length=st.integers(1, 150), steps=st.integers(0, 30), seed=st.integers(0, 99))
def test_what_is_stored_does_not_depend_on_the_compute_dtype(text, length, steps, seed):
    """float32 computes, bfloat16 is stored: the same bits in every pool as where bfloat16 computes, too."""
    q, k, v = tokens(length, seed, torch.float32)
    mass = torch.rand(KV_HEADS, length, generator=torch.Generator().manual_seed(seed))
    mixed = loaded(parse(text), [Observation(0, k, v, mass)], steps, torch.float32, kv_dtype=torch.bfloat16)
    plain = loaded(parse(text), [Observation(0, k.bfloat16(), v.bfloat16(), mass)], steps)
    for i in range(steps):
        q, k, v = (x[None] for x in tokens(1, 1000 + i, torch.float32))
        for cache, dtype in ((mixed, torch.float32), (plain, torch.bfloat16)):
            cache.append(k.to(dtype), v.to(dtype))
            if parse(text).selector is None:  # which tokens an evictor gives up may hang on a rounding of the mass
                cache.attend(q.to(dtype), SCALE)
    for mine, other in ((mixed.k, plain.k), (mixed.v, plain.v)):
        for a, b in zip((*mine.pools, mine.residual), (*other.pools, other.residual), strict=True):
            assert a.dtype == b.dtype
        assert (mine.encoded == other.encoded).all()
        slots = int(mixed._slots.max())
        a, b = (store.codec.decode(fields(store, slots), torch.float32) for store in (mine, other))
        assert torch.equal(a, b)
    beside = 0 if plain._anchors is None else plain._anchors[0].nbytes  # sinks are put aside only where read in place
    assert mixed.row_nbytes(0) == plain.row_nbytes(0) - beside
    assert mixed.layer.token_bytes == plain.layer.token_bytes
    assert all(held.k.dtype == torch.float32 for held in mixed.materialise())


def fields(store, slots):
    """The encoded units of a store's first row."""
    units = min(slots, int(store.encoded.max())) // store.codec.block
    return tuple(view[0, :, :units] for view in store._views)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_full_can_be_told_its_dtype(dtype):
    _, k, v = tokens(60, 1, torch.float32)
    cache = loaded(parse(f"full:dtype={dtype}"), [Observation(0, k, v)], 4, torch.float32, kv_dtype=torch.bfloat16)
    size = getattr(torch, dtype).itemsize
    assert cache.row_nbytes(0) == 2 * KV_HEADS * (64 * DIM * size + 2 * 4 / 2)  # two pages, whole, and their table
    stored = [held.k for held in cache.materialise()]
    assert all(torch.equal(a, b.to(getattr(torch, dtype)).float()) for a, b in zip(stored, k, strict=True))


@pytest.mark.parametrize("text", METHODS)
@settings(max_examples=6)
@given(lengths=st.lists(st.integers(1, 150), min_size=3, max_size=3), steps=st.integers(1, 12))
def test_the_table_finds_a_rows_pages_in_the_pool(text, lengths, steps):
    cache = loaded(parse(text), [context(length, length) for length in lengths], steps)
    for i in range(steps):
        q, k, v = (torch.stack([x[:, i : i + 1]] * 3) for x in tokens(steps, 5))
        cache.append(k, v, (0, 1, 2))
        cache.attend(q, SCALE, (0, 1, 2))
    assert cache.table.unique().numel() == cache.table.numel()
    for row in range(3):
        cache.materialise(row)
        for store in (cache.k, cache.v):
            for head in range(KV_HEADS):
                done = store.encoded[row][head]
                pages = cache.table[row, head, : -(-done // PAGE)].long()
                units = done // store.codec.block
                fields = tuple(pool[pages].flatten(0, 1)[None, :units] for pool in store.pools)
                found = store.codec.decode(fields, torch.bfloat16).flatten(1, 2)
                assert torch.equal(found, store.read(row, slice(head, head + 1), done))
    if text == "full":
        for row in range(3):
            length = cache.seen(row)
            pages = cache.table[row, :, : -(-length // PAGE)].long()
            found = cache.k.pools[0][pages].flatten(1, 2)[:, :length]
            assert torch.equal(found, cache.k.read(row, BOTH, length))


@pytest.mark.parametrize("text", [text for text in METHODS if text.startswith("kivi")])
@settings(max_examples=8)
@given(length=st.integers(1, 290))
def test_kivi_quantizes_all_but_its_newest(text, length):
    codec = parse(text).codec
    bits, group, residual = codec.bits, codec.group, codec.residual
    _, k, v = tokens(length, 0)
    cache = loaded(parse(text), [Observation(0, k, v)], 0)
    k_end, v_end = length // residual * residual, max(0, length - residual)
    for g, own in enumerate(cache.materialise()):
        by_token = k[g, :k_end].view(-1, group, DIM)
        expected_k = dequantize(*quantize(by_token, bits, -2), torch.bfloat16).view(-1, DIM)
        by_channel = v[g, :v_end].view(v_end, DIM // group, group)
        expected_v = dequantize(*quantize(by_channel, bits, -1), torch.bfloat16).view(-1, DIM)
        assert torch.equal(own.k, torch.cat([expected_k, k[g, k_end:]]))
        assert torch.equal(own.v, torch.cat([expected_v, v[g, v_end:]]))


def test_int8_quantizes_every_token_by_itself():
    _, k, v = tokens(70, 0)
    for g, own in enumerate(loaded(parse("int8"), [Observation(0, k, v)], 0).materialise()):
        assert torch.equal(own.k, dequantize(*quantize(k[g], 8, -1), torch.bfloat16))
        assert torch.equal(own.v, dequantize(*quantize(v[g], 8, -1), torch.bfloat16))


@pytest.mark.parametrize("text", SELECTING)
@pytest.mark.parametrize("length", [10, 70])
def test_what_stays_is_stored_as_the_codec_alone_would(length, text):
    method, seen, (q, k, v) = parse(text), context(length, 0), tokens(30, 1)
    cache = loaded(method, [seen], 30)
    kept = torch.stack([held.positions for held in cache.materialise()]).long()
    for i in range(30):
        cache.append(k[None, :, i : i + 1], v[None, :, i : i + 1])
        cache.attend(q[None, :, i : i + 1], SCALE)
    index = kept.unsqueeze(-1).expand(-1, -1, DIM)
    given_k, given_v = torch.cat([seen.k.gather(1, index), k], 1), torch.cat([seen.v.gather(1, index), v], 1)
    alone = loaded(parse(method.codec.spelled()), [Observation(0, given_k, given_v)], 0).materialise()
    turned = getattr(method.selector, "positions", "") == "cache" and cache.kept(0) < KV_HEADS * cache.seen(0)
    for g, own in enumerate(cache.materialise()):
        place = {p: i for i, p in enumerate([*kept[g].tolist(), *range(length, length + 30)])}
        where = [place[p] for p in own.positions.tolist()]
        skip = 4 if turned else 0  # the sinks' keys: see test_positions.py
        assert torch.equal(own.k[skip:], alone[g].k[where][skip:])
        assert torch.equal(own.v, alone[g].v[where])
