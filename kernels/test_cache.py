"""Every method end to end: the cache by kernels against the cache by the reference."""

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch

from kvsuite.cache.checker import AttentionChecker
from kvsuite.cache.layer import RELEASE_EVERY, LayerCache
from kvsuite.cache.observations import AttentionMass, LastQueries, NewestAttention
from kvsuite.cache.prefill import PrefilledLayer
from kvsuite.kernels import triton as kernels
from kvsuite.kernels.context import LayerContext, Needs
from kvsuite.kernels.quantspec import PAGE, QuantSpec
from kvsuite.kernels.rope import Rope
from kvsuite.methods import parse
from kvsuite.methods.codecs.full import Plain
from suites.checks.depth import depth
from suites.checks.table import DIM, HEADS, KV_HEADS, METHODS, SCALE, context, sizes, tokens

CPU = torch.device("cpu")


def layer(device):
    rope = Rope(1e4 ** (-torch.arange(0, DIM, 2, device=device) / DIM))
    return LayerContext(0, HEADS, KV_HEADS, DIM, torch.bfloat16, torch.bfloat16, device, rope, layers=2)


def seen(length, seed, device):
    """A prefilled prompt. All was computed on the CPU, so that every device is given the same."""

    def there(x):
        return tuple(map(there, x)) if isinstance(x, tuple) else x.to(device)

    one = context(length, seed)
    observed = {what: there(x) for what, x in one.observed.items()}
    return replace(one, k=there(one.k), v=there(one.v), observed=observed, rope=layer(device).rope)


def build(backend, text, lengths, new, device):
    """A cache by this backend with a row per length, compressed."""
    method, where = parse(text), layer(device)
    slots, pages = (max(size) for size in zip(*[sizes(method, where, n, new) for n in lengths], strict=True))
    cache = method.cache(where, len(lengths), slots, pages, backend=backend)
    assert backend == cache.backend.NAME, cache.refusal
    for row, length in enumerate(lengths):
        method.compress(row, [seen(length, row, device)], [cache])
    return cache


def refusal(text):
    """Why kernels do not do a method of the table; empty where they do."""
    return parse(text).cache(layer(CPU), 1, 1, backend="triton").refusal


REFUSED = {text: reason for text in METHODS if (reason := refusal(text))}


def equal(x, y):
    """Equal; but for one rounding where another device decoded, or computed the sine of a turned key."""
    return torch.equal(x.cpu(), y) if x.device.type == "cpu" else torch.allclose(x.cpu(), y, rtol=2**-7, atol=1e-6)


def same(ours, theirs, row, other=None):
    there = theirs.read(row if other is None else other)
    for a, b in zip(ours.read(row), there, strict=True):
        assert equal(a.k, b.k)
        assert equal(a.v, b.v)
        assert torch.equal(a.positions.cpu(), b.positions)
        assert torch.equal(a.slots.cpu(), b.slots)


def counted(cache, row):
    """Whether the device counts as the host does."""
    kv, host = cache.kv, cache.kv.host
    pairs = (kv.num_slots, host.slots), (kv.num_tokens, host.tokens)
    assert all(x[row].tolist() == y[row].tolist() for x, y in pairs)
    assert kv.num_seen[row].tolist() == [int(host.seen[row])] * KV_HEADS


MORE = ["h2o:budget=0.4", "h2o:budget=50", "turboquant:bits=k4v4"]
"""A budget of each row's own, one that is never reached, and levels without signs."""
QUICK = [  # every codec's layout, every way of choosing what stays
    "jitter",
    "q8_0",
    "nvfp4:scale=4over6",
    "turboquant:bits=k4v4",
    "fp8:per=token",
    "kivi:bits=2,group=8,residual=16",
    "random:budget=20 + uniform",
    "h2o:budget=16 + int4",
    "streaming-llm:budget=24",
    "snapkv:budget=24,window=8 + ada + kivi:bits=4,group=16,residual=32",
    "redundant:budget=24,every=8",
    "h2o:budget=0.4",
]
SLOWER = ("snapkv:budget=24,window=8 + ada + kivi:bits=4,group=16,residual=32", "redundant:budget=24,every=8")
"""Of these: whose residual is longer, and which compacts every 8th step."""


@pytest.mark.parametrize("text", depth(QUICK, [text for text in [*METHODS, *MORE] if text not in REFUSED]))
def test_a_method_by_kernels_is_the_method(text, device):
    """What is held is the same bit for bit at every step, what is attended is right by the checker of the timings, and
    bytes, lengths and room are counted alike."""
    # each row takes another page, and fills a residual
    lengths, steps = depth(((59, 27), 12 if text in SLOWER else 6), ((45, 20), 20))
    theirs = build("reference", text, lengths, steps, CPU)
    ours = build("triton", text, lengths, steps, device)
    rows, checkers = (1, None, 0), [AttentionChecker(0), AttentionChecker(1)]
    for n in range(steps):
        q, k, v = (torch.stack(x) for x in zip(*[tokens(1, 100 * n + b) for b in range(3)], strict=True))
        theirs.append(k, v, rows)
        ours.append(k.to(device), v.to(device), rows)
        for one in checkers:
            one.before(ours)
        for row in range(2):
            same(ours, theirs, row)
        expected = theirs.attend(q, SCALE, rows)
        found = ours.attend(q.to(device), SCALE, rows)
        for one in checkers:
            one.after(ours, rows, q.to(device), found, SCALE, None, None, None)
            assert one.worst <= 1
        assert (found[1] == 0).all()
        assert (found.cpu().float() - expected.float()).abs().max() < 0.05
        for row in range(2):
            assert ours.kept(row) == theirs.kept(row)
            assert ours.seen(row) == theirs.seen(row)
            counted(ours, row)
            assert ours.row_nbytes(row) == theirs.row_nbytes(row)
            accumulated(ours, theirs, row)
    assert len(ours.kv.allocator) == len(theirs.kv.allocator)
    if ours.kv.recent_queries is not None:
        assert torch.equal(ours.kv.recent_queries.cpu(), theirs.kv.recent_queries)


def accumulated(ours, theirs, row):
    """The attention that the tokens got is the same but for rounding; slots that hold none are not looked at."""
    if ours.kv.accumulated_attention is None:
        return
    for head, held in enumerate(theirs.read(row)):
        slots = held.slots.numpy()
        near = []
        for cache in (ours, theirs):
            places = cache.kv.places(row, head, slots)
            near.append(cache.kv.accumulated_attention.cpu().view(-1)[places.cpu()])
        torch.testing.assert_close(*near, rtol=0.02, atol=0.002)


@pytest.mark.parametrize(
    "text", [*depth([], ["full", "int4"]), "kivi:bits=4,group=16,residual=32", "random:budget=20 + int8"]
)
def test_a_suffix_in_one_chunk(text, device):
    theirs, ours = build("reference", text, (45,), 70, CPU), build("triton", text, (45,), 70, device)
    q, k, v = tokens(50, 5)
    expected, found = [], []
    for first, last in ((0, 41), (41, 42), (42, 50)):
        part = slice(first, last)
        theirs.append(k[None, :, part], v[None, :, part])
        ours.append(k[None, :, part].to(device), v[None, :, part].to(device))
        same(ours, theirs, 0)
        counted(ours, 0)
        expected.append(theirs.attend(q[None, :, part], SCALE))
        found.append(ours.attend(q[None, :, part].to(device), SCALE).cpu())
    assert (torch.cat(found, 2).float() - torch.cat(expected, 2).float()).abs().max() < 0.05


def test_a_row_is_forgotten_and_filled_again(device):
    text = "h2o:budget=16"
    ours = build("triton", text, (60, 30), 10, device)
    first, free = ours.row_nbytes(1), len(ours.kv.allocator)
    ours.reset(0)
    assert ours.row_nbytes(0) == 0
    assert len(ours.kv.allocator) > free
    parse(text).compress(0, [seen(30, 1, device)], [ours])
    assert ours.row_nbytes(0) == first
    assert len(ours.kv.allocator) == free
    same(ours, build("reference", text, (60, 30), 10, CPU), 0, 1)


def test_ragged_heads_are_loaded_ragged(device):
    _, k, v = tokens(90, 0)
    keep = [torch.arange(0, 90, 2), torch.arange(5, 12)]
    caches = []
    for backend, there in (("reference", CPU), ("triton", device)):
        where = layer(there)
        cache = LayerCache(where, parse("int4").codec.specs(where), 1, 64, selects=True, backend=backend)
        cache.load(0, PrefilledLayer(0, k.to(there), v.to(there)), [index.to(there) for index in keep])
        caches.append(cache)
    same(caches[1], caches[0], 0)
    assert caches[1].kept(0) == 52
    assert caches[1].kv.num_slots.tolist() == [[45, 7]]


@dataclass(frozen=True)
class Odd(Plain):
    """A codec that could be, and what it asks for."""

    layout: str = "plain"
    rotation: str = ""
    shape: tuple = ()

    def fitted(self, head_dim, kv_dtype):
        return self.shape


def test_what_kernels_cannot_do_is_said():
    """Of the table: the methods there are no kernels for say why, and the reference does them. And each reason."""
    assert all(reason.startswith("triton: ") and len(reason) > 12 for reason in REFUSED.values())
    streaming = {text for text in METHODS if "streaming" in text and ("fp8" in text or "kivi" in text)}
    assert {text for text in streaming if "absolute" not in text} <= {*REFUSED}
    assert not {*REFUSED} & {
        text
        for text in METHODS
        if text.split(":")[0] in ("full", "jitter", "int4", "fp8", "kivi", "q8_0", "nvfp4")
        and "order=after" not in text
    }
    where, plain, e4m3 = layer(CPU), Plain(), parse("fp8").codec.specs(layer(CPU))[0]
    reasons = [
        kernels.supports(where, *specs, needs)
        for specs, needs in [
            ((plain, QuantSpec()), Needs()),
            ((plain, Odd(rotation="hadamard")), Needs()),
            ((Odd(shape=(((2,), torch.float32),)), plain), Needs()),
            ((plain, Plain(dtype="float32")), Needs()),
            ((plain, plain), Needs(reads_some=True)),
            ((plain, plain), Needs(newest_attention=True)),
            ((e4m3, plain), Needs(rerotated_sinks=4)),
            ((plain, plain), Needs(rerotated_sinks=PAGE + 1)),
        ]
    ]
    assert all(reasons)
    assert len({*reasons}) == len(reasons)
    for dtype, dim in ((torch.float32, DIM), (torch.bfloat16, 272), (torch.bfloat16, 24)):
        strange = LayerContext(0, HEADS, KV_HEADS, dim, dtype, dtype, CPU)
        assert kernels.supports(strange, plain, plain, Needs()) == f"no kernel for {dtype} with head dimension {dim}"
    assert not kernels.supports(where, plain, e4m3, Needs(positions=True, rerotated_sinks=PAGE, recent_queries=8))
    assert NewestAttention() not in parse("h2o").selector.eviction.observes


def evicting(backend, there, slots=64):
    """An empty row of a cache whose heavy hitters stay."""
    where, eviction = layer(there), parse("h2o:budget=12").selector.eviction
    return LayerCache(where, parse("full").codec.specs(where), 1, slots, eviction=eviction, backend=backend)


def test_a_row_filled_again_gives_up_none_of_its_former_tokens(device):
    ours = evicting("triton", device)
    _, k, v = (x.to(device) for x in tokens(200, 0))
    for n, mass in ((40, 0.0), (12, 5.0)):
        keep = [torch.arange(n, device=device)] * KV_HEADS
        observed = {AttentionMass(): torch.full((KV_HEADS, 200), mass, device=device)}
        ours.load(0, PrefilledLayer(0, k, v, observed), keep, [12] * KV_HEADS)
    q = torch.zeros(1, HEADS, 1, DIM, dtype=torch.bfloat16, device=device)
    ours.append(k[None, :, :1], v[None, :, :1])
    ours.attend(q, SCALE)
    assert 0 <= int(ours.kv.free_slot.max()) < 13
    assert ours.kept(0) == 12 * KV_HEADS == int(ours.kv.num_tokens.sum())


def test_without_a_budget_of_its_own_a_row_gives_nothing_up(device):
    for backend, there in (("reference", CPU), ("triton", device)):
        cache = evicting(backend, there)
        _, k, v = (x.to(there) for x in tokens(30, 0))
        cache.load(0, PrefilledLayer(0, k, v))
        cache.append(k[None, :, :1], v[None, :, :1])
        cache.attend(torch.zeros(1, HEADS, 1, DIM, dtype=torch.bfloat16, device=there), SCALE)
        assert cache.kept(0) == 31 * KV_HEADS


@dataclass(frozen=True)
class Watching:
    """An eviction that keeps all and asks for the newest queries."""

    every: int = 1
    rerotated_sinks: int = 0
    observes: tuple = (LastQueries(3),)

    def parameters(self, length):
        return ()

    def score(self, state):
        return state.positions.float()


def test_the_newest_queries_are_kept_whoever_is_idle(device):
    for backend, there in (("reference", CPU), ("triton", device)):
        where = layer(there)
        cache = LayerCache(where, parse("full").codec.specs(where), 3, 64, eviction=Watching(), backend=backend)
        newest = {}
        for row, length in enumerate((5, 9, 6)):
            q, k, v = (x.to(there) for x in tokens(length, row))
            cache.load(row, PrefilledLayer(0, k, v, {LastQueries(3): q[:, -3:]}))
            newest[row] = [*q[:, -3:].unbind(1)]
        for n, rows in enumerate([(0, None, 2), (None, 1, 0), (2, 0, None), (1, 2, 0), (0, None, None)]):
            q, k, v = (torch.stack(x).to(there) for x in zip(*[tokens(1, 9 * n + b) for b in range(3)], strict=True))
            cache.append(k, v, rows)
            cache.attend(q, SCALE, rows)
            for row, own in zip(rows, q[:, :, 0], strict=True):
                if row is not None:
                    newest[row] = [*newest[row][1:], own]
            for row, wanted in newest.items():
                ring = torch.arange(cache.seen(row) - 3, cache.seen(row), device=there) % 3
                assert torch.equal(cache.kv.recent_queries[row, :, ring].transpose(0, 1), torch.stack(wanted))


def test_a_head_far_above_its_budget_gives_up_one_at_a_time(device):
    kept = []
    for backend, there in (("reference", CPU), ("triton", device)):
        cache = evicting(backend, there)
        _, k, v = (x.to(there) for x in tokens(30, 0))
        observed = {AttentionMass(): torch.rand(KV_HEADS, 30).to(there)}
        cache.load(0, PrefilledLayer(0, k, v, observed), None, [16] * KV_HEADS)
        for _ in range(2):
            cache.append(k[None, :, :1], v[None, :, :1])
            cache.attend(torch.zeros(1, HEADS, 1, DIM, dtype=torch.bfloat16, device=there), SCALE)
        kept.append(cache.kept(0))
        assert sum(len(head.positions) for head in cache.read()) == cache.kept(0)
    assert kept == [30 * KV_HEADS] * 2 == [30 * KV_HEADS, int(cache.kv.num_tokens.sum())]


def test_a_full_cache_refuses_before_it_writes(device):
    ours = build("triton", "int8", (60,), 4, device)
    k = torch.zeros(1, KV_HEADS, 1, DIM, dtype=torch.bfloat16, device=device)
    for _ in range(4):
        ours.append(k, k)
    before = [x.clone() for x in (*ours.kv.k.pools, ours.kv.num_slots)]
    with pytest.raises(ValueError, match="row 0 is full"):
        ours.append(k, k)
    assert all(torch.equal(x, y) for x, y in zip(before, (*ours.kv.k.pools, ours.kv.num_slots), strict=True))


BLOCKS = depth(
    ["streaming-llm:budget=8,sinks=0,positions=absolute + kivi:bits=2,group=8,residual=16"],  # whose first page goes
    [
        "streaming-llm:budget=20,positions=absolute + kivi:bits=2,group=8,residual=16",
        "h2o:budget=12 + kivi:bits=4,group=16,residual=16",
    ],
)


@pytest.mark.parametrize("text", BLOCKS)
def test_pages_without_a_token_go_back_and_what_is_attended_stays_right(text, device, monkeypatch):
    """Longer than any page is needed: both backends give the same columns back, and take pages again."""
    monkeypatch.setattr("kvsuite.cache.layer.RELEASE_EVERY", depth(8, RELEASE_EVERY))
    steps, lengths = depth((44, (45,)), (100, (45, 20)))
    rows = (0, None, 1)[: 1 + len(lengths)]
    caches = [build(*what[:1], text, lengths, steps, what[1]) for what in (("reference", CPU), ("triton", device))]
    theirs, ours = caches
    held, checker = [], AttentionChecker(len(lengths) - 1)
    for n in range(steps):
        q, k, v = (torch.stack(x) for x in zip(*[tokens(1, 100 * n + b) for b in range(len(rows))], strict=True))
        for cache in caches:
            cache.append(k.to(cache.layer.device), v.to(cache.layer.device), rows)
        checker.before(ours)
        expected, found = (cache.attend(q.to(cache.layer.device), SCALE, rows) for cache in caches)
        checker.after(ours, rows, q.to(device), found, SCALE, None, None, None)
        assert checker.worst <= 1
        assert (found.cpu().float() - expected.float()).abs().max() < 0.05
        assert len(ours.kv.allocator) == len(theirs.kv.allocator)
        assert (ours.kv.host.gaps == theirs.kv.host.gaps).all()
        assert ((ours.kv.table == 0) == (theirs.kv.table == 0)).all()
        assert ours.nbytes == theirs.nbytes
        held.append(sum(cache.kv.held_pages(row) for cache in caches for row in range(len(lengths))))
    for row in range(len(lengths)):
        same(ours, theirs, row)
        counted(ours, row)
        accumulated(ours, theirs, row)
        assert ours.kv.host.gaps[row].min() > 0
        assert ours.fragmentation(row) == theirs.fragmentation(row) < 0.9
    assert any(b < a for a, b in pairwise(held))
    for cache in caches:
        for row in range(len(lengths)):
            cache.reset(row)
        assert cache.nbytes == 0
        assert len(cache.kv.allocator) == len(lengths) * cache.kv.pages_per_row
