"""Every method end to end: the cache that steps by kernels against the cache that steps by PyTorch."""

import pytest
import torch

from kvsuite.cache.context import LayerContext
from kvsuite.cache.fused import FusedCache, refusal
from kvsuite.cache.layer import LayerCache
from kvsuite.cache.prefill import Observation
from kvsuite.cache.rope import Rope
from kvsuite.cache.witness import Witness
from kvsuite.kernels.mass import column_mass
from kvsuite.methods import parse
from suites.checks.table import DIM, HEADS, KV_HEADS, METHODS, SCALE, tokens

CPU = torch.device("cpu")
UNFUSED = {text for text in METHODS if text.startswith("streaming-llm") and "fp8" in text} | {
    text for text in METHODS if text.startswith("streaming-llm") and "kivi" in text
}


def layer(device):
    rope = Rope(1e4 ** (-torch.arange(0, DIM, 2, device=device) / DIM))
    return LayerContext(0, HEADS, KV_HEADS, DIM, torch.bfloat16, torch.bfloat16, device, rope)


def build(kind, text, lengths, new, device):
    """A cache of this kind with a row per length, compressed."""
    method = parse(text)
    capacity = max(method.capacity(n, new) for n in lengths)
    evictor = method.selector.evictor(capacity) if method.selector else None
    where, selects = layer(device), method.selector is not None
    cache = kind(where, method.codec.sides(where), len(lengths), capacity, evictor, selects)
    for row, length in enumerate(lengths):
        q, k, v = tokens(length, row)
        mass = column_mass(q, k, SCALE)
        seen = Observation(0, k.to(device), v.to(device), mass.to(device))
        method.compress(row, [seen], [cache])
    return cache


def equal(x, y):
    """Equal; but for one rounding where another device decoded, or computed the sine of a turned key."""
    return torch.equal(x.cpu(), y) if x.device.type == "cpu" else torch.allclose(x.cpu(), y, rtol=2**-7, atol=1e-6)


def same(ours, theirs, row, other=None):
    there = theirs.materialise(row if other is None else other)
    for a, b in zip(ours.materialise(row), there, strict=True):
        assert equal(a.k, b.k)
        assert equal(a.v, b.v)
        assert torch.equal(a.positions.cpu(), b.positions)


SHARES = ["h2o:budget=0.4", "h2o:budget=50"]  # a budget of each row's own, and one that is never reached


@pytest.mark.parametrize("text", [text for text in [*METHODS, *SHARES] if text not in UNFUSED])
def test_a_method_by_kernels_is_the_method(text, device):
    """What is held is the same bit for bit at every step, what is attended is right by the witness of the timings, and
    bytes, lengths and room are counted alike."""
    lengths, steps = (45, 20), 20
    theirs = build(LayerCache, text, lengths, steps, CPU)
    ours = build(FusedCache, text, lengths, steps, device)
    rows, witness = (1, None, 0), [Witness(0), Witness(1)]
    for n in range(steps):
        q, k, v = (torch.stack(x) for x in zip(*[tokens(1, 100 * n + b) for b in range(3)], strict=True))
        theirs.append(k, v, rows)
        ours.append(k.to(device), v.to(device), rows)
        for one in witness:
            one.before(ours)
        for row in range(2):
            same(ours, theirs, row)
        expected = theirs.attend(q, SCALE, rows)
        found = ours.attend(q.to(device), SCALE, rows)
        for one in witness:
            one.after(rows, q.to(device), found, SCALE, None, None, None)
            assert one.worst <= 1
        assert (found[1] == 0).all()
        assert (found.cpu().float() - expected.float()).abs().max() < 0.05
        for row in range(2):
            assert ours.kept(row) == theirs.kept(row) == int(ours.paged.live[row].sum())
            assert ours.seen(row) == theirs.seen(row) == int(ours.paged.seen[row, 0])
            if ours.scores is not None:  # slots beyond those in use hold nothing
                near = ours.scores[row].cpu(), theirs.scores[row]
                live = theirs.positions[row] >= 0
                torch.testing.assert_close(near[0][live], near[1][live], rtol=0.02, atol=0.002)
    extra = 16 * KV_HEADS + 4 * sum(n != "shift" and type(x) is int for n, x in vars(ours.evictor or ours).items()) * (
        ours.evictor is not None
    )
    freed = 8 * KV_HEADS if ours.evictor is not None else 0
    for row in range(2):
        assert ours.row_nbytes(row) == theirs.row_nbytes(row) + extra - freed


@pytest.mark.parametrize("text", ["full", "int4", "kivi:bits=4,group=16,residual=32", "random:budget=20 + int8"])
def test_a_suffix_in_one_chunk(text, device):
    theirs, ours = build(LayerCache, text, (45,), 70, CPU), build(FusedCache, text, (45,), 70, device)
    q, k, v = tokens(50, 5)
    expected, found = [], []
    for first, last in ((0, 41), (41, 42), (42, 50)):
        part = slice(first, last)
        theirs.append(k[None, :, part], v[None, :, part])
        ours.append(k[None, :, part].to(device), v[None, :, part].to(device))
        same(ours, theirs, 0)
        expected.append(theirs.attend(q[None, :, part], SCALE))
        found.append(ours.attend(q[None, :, part].to(device), SCALE).cpu())
    assert (torch.cat(found, 2).float() - torch.cat(expected, 2).float()).abs().max() < 0.05


def test_a_row_is_forgotten_and_filled_again(device):
    text = "h2o:budget=16"
    ours = build(FusedCache, text, (60, 30), 10, device)
    first = ours.row_nbytes(1)
    ours.reset(0)
    assert ours.row_nbytes(0) == 0
    q, k, v = tokens(30, 1)
    seen = Observation(0, k.to(device), v.to(device), column_mass(q, k, SCALE).to(device))
    parse(text).compress(0, [seen], [ours])
    assert ours.row_nbytes(0) == first
    same(ours, build(LayerCache, text, (60, 30), 10, CPU), 0, 1)


def test_ragged_heads_are_loaded_ragged(device):
    _, k, v = tokens(90, 0)
    keep = [torch.arange(0, 90, 2), torch.arange(5, 12)]
    caches = []
    for kind, there in ((LayerCache, CPU), (FusedCache, device)):
        where = layer(there)
        cache = kind(where, parse("int4").codec.sides(where), 1, 64, selects=True)
        cache.load(0, k.to(there), v.to(there), [index.to(there) for index in keep])
        caches.append(cache)
    same(caches[1], caches[0], 0)
    assert caches[1].kept(0) == 52
    assert caches[1].paged.used.tolist() == [[45, 7]]


def test_what_kernels_cannot_do_is_said(device):
    where = layer(device)
    for text in METHODS:
        method = parse(text)
        evictor = method.selector.evictor(100) if method.selector else None
        assert bool(refusal(where, method.codec.sides(where), evictor)) == (text in UNFUSED)


def test_a_row_filled_again_gives_up_none_of_its_former_tokens(device):
    where, evictor = layer(device), parse("h2o:budget=12").selector.evictor(200)
    ours = FusedCache(where, parse("full").codec.sides(where), 1, 64, evictor, True)
    _, k, v = (x.to(device) for x in tokens(200, 0))
    kept = [torch.arange(n, device=device).expand(KV_HEADS, -1) for n in (40, 12)]
    for index, mass in zip(kept, (0.0, 5.0), strict=True):
        ours.load(0, k, v, index, torch.full((KV_HEADS, 200), mass, device=device), evictor)
    q = torch.zeros(1, HEADS, 1, DIM, dtype=torch.bfloat16, device=device)
    ours.append(k[None, :, :1], v[None, :, :1])
    ours.attend(q, SCALE)
    assert int(ours.paged.freed.max()) < 13
    assert ours.kept(0) == 12 * KV_HEADS == int(ours.paged.live.sum())


def test_without_an_evictor_of_its_own_a_row_gives_nothing_up(device):
    for kind, there in ((LayerCache, CPU), (FusedCache, device)):
        where = layer(there)
        evictor = parse("h2o:budget=12").selector.evictor(200)
        cache = kind(where, parse("full").codec.sides(where), 1, 64, evictor, True)
        _, k, v = (x.to(there) for x in tokens(30, 0))
        cache.load(0, k, v)
        cache.append(k[None, :, :1], v[None, :, :1])
        cache.attend(torch.zeros(1, HEADS, 1, DIM, dtype=torch.bfloat16, device=there), SCALE)
        assert cache.kept(0) == 31 * KV_HEADS


def test_a_head_far_above_its_budget_gives_up_one_at_a_time(device):
    kept = []
    for kind, there in ((LayerCache, CPU), (FusedCache, device)):
        where = layer(there)
        evictor = parse("h2o:budget=16").selector.evictor(200)
        cache = kind(where, parse("full").codec.sides(where), 1, 64, evictor, True)
        _, k, v = (x.to(there) for x in tokens(30, 0))
        cache.load(0, k, v, None, torch.rand(KV_HEADS, 30).to(there), evictor)
        for _ in range(2):
            cache.append(k[None, :, :1], v[None, :, :1])
            cache.attend(torch.zeros(1, HEADS, 1, DIM, dtype=torch.bfloat16, device=there), SCALE)
        kept.append(cache.kept(0))
    assert kept == [30 * KV_HEADS] * 2 == [30 * KV_HEADS, int(cache.paged.live.sum())]


def test_a_full_cache_refuses_before_it_writes(device):
    ours = build(FusedCache, "int8", (60,), 4, device)
    k = torch.zeros(1, KV_HEADS, 1, DIM, dtype=torch.bfloat16, device=device)
    for _ in range(4):
        ours.append(k, k)
    before = [x.clone() for x in (*ours.k.pools, ours.paged.used)]
    with pytest.raises(ValueError, match="row 0 is full"):
        ours.append(k, k)
    assert all(torch.equal(x, y) for x, y in zip(before, (*ours.k.pools, ours.paged.used), strict=True))
