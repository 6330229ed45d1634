"""Writing: the kernels against their reference byte for byte, and the reference against the cache."""

import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st

from kvsuite.cache.context import LayerContext
from kvsuite.cache.layer import LayerCache
from kvsuite.kernels import store
from kvsuite.kernels.fused import store as fused
from kvsuite.kernels.fused.launch import recording
from kvsuite.kernels.paged import PAGE, Format, Paged, Side
from kvsuite.kernels.quantize import to_e4m3
from kvsuite.methods import parse

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def poisoned(*shape, dtype, device=CPU):
    """Bytes that nobody writes: what is left out and what is overwritten shows."""
    x = torch.empty(shape, dtype=dtype, device=device)
    x.view(torch.uint8).fill_(0xAB)
    return x


def fields(form, head_dim, dtype):
    """Shape and dtype of what a unit stores, and its tokens."""
    codes, groups = head_dim * form.bits // 8, head_dim // (form.group or head_dim)
    half = torch.float16
    if form.kind == "plain":
        return [((head_dim,), dtype)], 1
    if form.kind == "token":
        return [((codes,), torch.uint8), ((groups, 1), half), ((groups, 1), half)], 1
    if form.kind == "channel":
        return [((form.group, codes), torch.uint8), ((1, head_dim), half), ((1, head_dim), half)], form.group
    per_token = [] if form.scale is not None else [((1,), torch.float32)]
    return [((head_dim,), torch.uint8), *per_token], 1


def empty(sides, rows, heads, pages, head_dim, dtype, states=True, noise=None):
    """A cache with nothing in it but poison, its pages in no order; ``sides``: format, residual, rolling of K and V."""
    total = rows * heads * pages
    pools = []
    for form, residual, rolling in sides:
        of, tokens = fields(form, head_dim, dtype)
        made = tuple(poisoned(total + 3, PAGE // tokens, *shape, dtype=kind) for shape, kind in of)
        pools.append(Side(form, made, poisoned(rows, heads, residual, head_dim, dtype=dtype), rolling))
    table = torch.randperm(total + 3, generator=noise)[:total].to(torch.int32).view(rows, heads, pages)
    counters = [torch.zeros(rows, heads, dtype=torch.int32) for _ in range(3)]
    freed = torch.full((rows, heads), -1, dtype=torch.int32)
    slots = (rows, heads, pages * PAGE)
    positions = poisoned(*slots, dtype=torch.int32) if states else None
    mass = poisoned(*slots, dtype=torch.float32) if states else None
    return Paged(*pools, table, *counters, freed, positions, mass)


def copied(paged, device):
    def copy(x):
        return None if x is None else x.to(device, copy=True)

    def side(x):
        return replace(x, fields=tuple(copy(field) for field in x.fields), residual=copy(x.residual))

    names = ("table", "used", "live", "seen", "freed", "positions", "mass")
    return Paged(side(paged.k), side(paged.v), *(copy(getattr(paged, name)) for name in names))


def tensors(paged):
    found = {name: getattr(paged, name) for name in ("table", "used", "live", "seen", "freed", "positions", "mass")}
    for name, side in (("k", paged.k), ("v", paged.v)):
        found |= {f"{name}.fields[{i}]": field for i, field in enumerate(side.fields)}
        found[f"{name}.residual"] = side.residual
    return {name: x for name, x in found.items() if x is not None}


def differing(one, other):
    """Names of the tensors that are not the same to the last bit."""
    pairs = zip(tensors(one).items(), tensors(other).values(), strict=True)
    return [name for (name, a), b in pairs if not torch.equal(a.cpu().view(torch.uint8), b.cpu().view(torch.uint8))]


def numbers(noise, heads, n, head_dim, dtype):
    """(heads, n, head_dim), strides unlike its shape: of every size float16 has, constant tokens, zeros, ties; but no
    -0, as which of two zeros is the smaller one nobody says."""
    x = torch.randn(n, heads, head_dim, generator=noise)
    kind = torch.randint(6, (n, heads, 1), generator=noise)
    size = 2.0 ** torch.randint(-28, 12, (n, heads, 1), generator=noise)
    x = torch.where(kind == 0, x * size, x)
    x = torch.where(kind == 1, x[:, :, :1], x)
    x = torch.where(kind == 2, (x * 8).round() / 8, x)
    x = torch.where((kind == 3) & (torch.rand(x.shape, generator=noise) < 0.5), 0.0, x)
    return (x.to(dtype) + 0.0).transpose(0, 1)


RINGS = ((8, True), (37, True), (24, False), (0, True))
SIDES = {
    # kinds of K and V, and their residuals: how many, and whether rolling
    "no residual": (("plain", "token", "fp8"), ((0, True), (0, False))),
    "channel": (("channel",), ()),
    "token": (("token",), RINGS),
    "plain or fp8": (("plain", "fp8"), RINGS),
}
PAIRS = ("no residual", "no residual"), ("channel", "token"), ("token", "plain or fp8"), ("plain or fp8", "channel")


def a_side(draw, head_dim, kinds, residuals):
    """Format, residual, rolling."""
    kind = draw(st.sampled_from(kinds))
    if kind == "channel":
        group = draw(st.sampled_from([8, 16, 32]))
        return Format(kind, draw(st.sampled_from([4, 2])), group), group * draw(st.sampled_from([1, 2, 3])), False
    residual, rolling = draw(st.sampled_from(residuals))
    if kind == "plain":
        return Format(kind), residual, rolling
    if kind == "fp8":
        return Format(kind, 8, scale=draw(st.sampled_from([None, 1.0, 0.3]))), residual, rolling
    group = draw(st.sampled_from([g for g in (8, 16, 32, head_dim) if head_dim % g == 0]))
    return Format(kind, draw(st.sampled_from([8, 4, 2])), group), residual, rolling


@st.composite
def histories(draw, pair):
    """A cache and what happens to it."""
    head_dim = draw(st.sampled_from([32, 64, 96, 256]))
    sides = tuple(a_side(draw, head_dim, *SIDES[name]) for name in pair)
    rows, heads, pages = (draw(st.sampled_from(n)) for n in ((1, 2, 3), (1, 2), (2, 3)))
    most = pages * PAGE - 4
    # around a full residual, and where nothing special happens
    around = [m * residual - n for _, residual, _ in sides for m in (1, 2) for n in (0, 1, 2, 3)]
    lengths = st.sampled_from([n for n in (*around, 0, 1, 17, 32, 45, 60, most) if 0 <= n <= most])
    kept = st.sampled_from(["all", "all", "some", "ragged"])
    fills = [
        (row, draw(lengths), draw(kept), draw(st.booleans()))
        for row in draw(st.permutations(range(rows)))
        if draw(st.sampled_from([True, True, False]))
    ]
    steps = [
        (draw(st.permutations([*range(rows), -1])), draw(st.booleans()))
        for _ in range(draw(st.sampled_from([0, 1, 2, 3, 4])))
    ]
    dtype, states = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    return sides, rows, heads, pages, head_dim, dtype, states, fills, steps, draw(st.integers(0, 2**20))


@settings(max_examples=30)
@given(data=st.data())
@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_kernels_write_what_the_reference_writes(device, pair, data):
    history = data.draw(histories(pair))
    sides, rows, heads, pages, head_dim, dtype, states, fills, steps, seed = history
    noise = torch.Generator().manual_seed(seed)
    expected = empty(sides, rows, heads, pages, head_dim, dtype, states, noise)
    paged = copied(expected, device)

    def both(name, *arguments):
        getattr(store, name)(expected, *arguments)
        there = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
        getattr(fused, name)(paged, *there)
        wrong = differing(expected, paged)
        assert not wrong, f"{name}: {wrong}"

    for row, length, kept, has_mass in fills:
        k, v = (numbers(noise, heads, length, head_dim, dtype) for _ in range(2))
        index = counts = None
        if kept != "all":
            n = int(torch.randint(length + 1, (), generator=noise))
            index = torch.rand(heads, length, generator=noise).argsort(-1)[:, :n].sort(-1).values
        if kept == "ragged":
            counts = torch.randint(n + 1, (heads,), generator=noise).int()
        both("fill", row, k, v, index, counts, torch.rand(heads, length, generator=noise) if has_mass else None)
    both("flush", torch.arange(rows, dtype=torch.int32))
    for who, frees in steps:
        if frees and not any(residual for _, residual, _ in sides):
            give_up(noise, expected, paged)
        k, v = (numbers(noise, heads, len(who), head_dim, dtype).transpose(0, 1) for _ in range(2))
        at = torch.tensor(who, dtype=torch.int32)
        both("append", k, v, at)
        both("flush", at)
        both("flush", at)


def give_up(noise, *caches):
    """In about every second (row, head) some slot, which the next token must take."""
    used = caches[0].used.cpu()
    slots = (torch.rand(used.shape, generator=noise) * used).int()
    some = (torch.rand(used.shape, generator=noise) < 0.5) & (used > 0) & (caches[0].freed.cpu() < 0)
    for cache in caches:
        there = some.to(cache.used.device)
        cache.freed[there] = slots[some].to(there.device)
        cache.live[there] -= 1


CONFIGURATIONS = {
    "plain": (Format("plain"), 0, False),
    "int8": (Format("token", 8, 32), 0, True),
    "int4": (Format("token", 4, 32), 0, True),
    "fp8": (Format("fp8", 8, scale=1.0), 0, True),
    "fp8 by token": (Format("fp8", 8), 0, True),
    "kivi": None,
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_recorded_step_is_replayed_at_other_lengths(device, name):
    """One step's launches, started again and again as a CUDA graph does it: nothing in them knows how long rows are."""
    kivi = ((Format("channel", 2, 8), 16, False), (Format("token", 2, 16), 16, True))
    sides = kivi if name == "kivi" else (CONFIGURATIONS[name],) * 2
    noise = torch.Generator().manual_seed(0)
    expected = empty(sides, 2, 2, 2, 32, torch.bfloat16, noise=noise)
    prompt = numbers(noise, 2, 14, 32, torch.bfloat16)
    store.fill(expected, 1, prompt, prompt)
    paged = copied(expected, device)
    k, v = (torch.zeros(2, 2, 32, dtype=torch.bfloat16, device=device) for _ in range(2))
    rows = torch.full((2,), -1, dtype=torch.int32, device=device)

    def step():
        fused.append(paged, k, v, rows)
        fused.flush(paged, rows)

    if device.type == "cuda":
        step()  # compiles; both are idle
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        replay = graph.replay
    else:
        with recording() as launches:
            step()

        def replay():
            for one in launches:
                one.run()

    # rows reach the ring's end at different steps
    for who in [(0, 1)] * 4 + [(1, -1)] * 3 + [(-1, 0), (1, 0)] + [(0, 1)] * 16:
        new = [numbers(noise, 2, 2, 32, torch.bfloat16) for _ in range(2)]
        at = torch.tensor(who, dtype=torch.int32)
        store.append(expected, *new, at)
        store.flush(expected, at)
        for buffer, x in zip((k, v, rows), (*new, at), strict=True):
            buffer.copy_(x)
        replay()
        assert not differing(expected, paged)


def test_every_float16_becomes_the_nearest_e4m3(device):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).view(1, -1, 32)
    limits = torch.finfo(torch.float32)
    x = torch.cat([x.float(), torch.tensor([limits.max, limits.tiny, 464.0, 2**-10] * 8).view(1, 1, 32)], 1)
    sides = ((Format("fp8", 8, scale=1.0), 0, True), (Format("plain"), 0, False))
    paged = copied(empty(sides, 1, 1, 65, 32, torch.float32), device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy speaks up about NaN
        fused.fill(paged, 0, x.to(device), x.to(device))
    codes = paged.k.fields[0][paged.table[0, 0].long()].view(-1, 32)[: x.shape[1]].cpu()
    nan = x[0].isnan()
    assert torch.equal(codes[~nan], to_e4m3(x, 1.0)[0][~nan])
    assert (codes[nan] & 0x7F == 0x7F).all()


def test_pages_and_prompts_may_lie_beyond_two_billion_elements(device):
    """Where an offset were kept in 32 bits it would be negative here. Next to nothing of this memory is touched."""
    far, heads, head_dim = 2**31, 3, 32
    noise = torch.Generator().manual_seed(0)
    prompt = torch.empty(far + 2**16, dtype=torch.float16, device=device)
    prompt = prompt.as_strided((heads, 40, head_dim), (far // 2, head_dim, 1))  # a stride by itself fits into 32 bits
    prompt.copy_(numbers(noise, heads, 40, head_dim, torch.float16))
    last = far // (PAGE * head_dim)
    pools = tuple(torch.empty(last + 16, PAGE, head_dim, dtype=torch.uint8, device=device) for _ in range(2))
    small = empty(((Format("fp8", 8, scale=1.0), 0, True),) * 2, 1, heads, 2, head_dim, torch.float16, noise=noise)
    paged = copied(small, device)
    paged.table.add_(last)
    paged = replace(paged, k=replace(paged.k, fields=pools[:1]), v=replace(paged.v, fields=pools[1:]))
    token = prompt[:, 0][None]
    rows = torch.zeros(1, dtype=torch.int32, device=device)
    store.fill(small, 0, prompt.cpu(), prompt.cpu())
    store.append(small, token.cpu(), token.cpu(), rows.cpu())
    fused.fill(paged, 0, prompt, prompt)
    fused.append(paged, token, token, rows)
    for side, other in ((small.k, paged.k), (small.v, paged.v)):
        for head in range(heads):
            expected, found = (
                x.fields[0][t[0, head].long()].view(-1, head_dim)[:41].cpu()
                for x, t in ((side, small.table), (other, paged.table))
            )
            assert torch.equal(expected, found)


METHODS = (
    "full",
    "int8",
    "int4",
    "fp8",
    "fp8:per=token",
    "fp8:k_scale=0.3,v_scale=2.5",
    "kivi:bits=4,group=16,residual=32",
    "kivi:bits=2,group=8,residual=16",
    "kivi:bits=2,group=8,residual=40",
    "h2o:budget=16",
    "h2o:budget=16 + int8",
    "h2o:budget=16 + kivi:bits=4,group=16,residual=32",
    "random:budget=20 + fp8:per=token",
)


@settings(max_examples=8)
@given(data=st.data())
@pytest.mark.parametrize("text", METHODS)
def test_the_reference_writes_what_the_cache_writes(device, text, data):
    method, rows, heads, head_dim = parse(text), 2, 2, 32
    dtype = data.draw(st.sampled_from(DTYPES))
    noise = torch.Generator().manual_seed(data.draw(st.integers(0, 2**20)))
    evictor = method.selector.evictor(16) if method.selector else None
    layer = LayerContext(0, heads, heads, head_dim, dtype, dtype, device)
    caches = [LayerCache(layer, method.codec.sides(layer), rows, 3 * PAGE, evictor, selects=True) for _ in range(2)]
    for cache in caches:
        for x in (*cache.k.pools, *cache.v.pools, cache.k.residual, cache.v.residual):
            x.view(torch.uint8).fill_(0xAB)
    cache, paged = caches[0], over(caches[1], heads)
    for row in range(rows):
        length = data.draw(st.integers(1, 80) | st.sampled_from([16, 32, 40, 64, 80]))
        k, v = (numbers(noise, heads, length, head_dim, dtype).to(device) for _ in range(2))
        scores = torch.rand(heads, length, generator=noise).to(device)
        keep = index = counts = None
        if data.draw(st.booleans()):
            counts = torch.randint(1, length + 1, (heads,), generator=noise).int().to(device)
            n = int(counts.max())
            index = torch.rand(heads, length, generator=noise).argsort(-1)[:, :n].to(device)
            keep = [index[head, :m].sort().values for head, m in enumerate(counts.tolist())]
            index = torch.stack([torch.cat([x, x.new_full((n - len(x),), 10**6)]) for x in keep])
        cache.load(row, k, v, keep, scores, evictor)
        store.fill(paged, row, k, v, index, counts, scores)
        agree(cache, paged)
    steps = data.draw(st.integers(1, 36))
    note(f"{steps} steps")
    for _ in range(steps):
        who = data.draw(st.sampled_from([(0, 1), (1, 0), (None, 1), (0, None)]))
        if max(max(cache._slots[row]) for row in range(rows)) == cache._capacity:
            break
        k, v = (numbers(noise, heads, len(who), head_dim, dtype).transpose(0, 1).to(device) for _ in range(2))
        at = torch.tensor([-1 if row is None else row for row in who], dtype=torch.int32, device=device)
        cache.append(k[:, :, None], v[:, :, None], who)
        store.append(paged, k, v, at)
        store.flush(paged, at)
        agree(cache, paged)
        if evictor:
            cache.attend(k[:, :, None], 0.2, who)
            gives_up(cache, paged)


def over(cache, heads):
    """A view of a cache's tensors, with counters of its own."""
    counters = [torch.zeros_like(cache.table[:, :, 0]) for _ in range(3)]
    freed = torch.full_like(counters[0], -1)
    sides = [Side(s.codec.format, s.pools, s.residual, s.codec.rolling) for s in (cache.k, cache.v)]
    return Paged(*sides, cache.table, *counters, freed, cache.positions, cache.scores)


def agree(cache, paged):
    """Everything a reader could read, and what nobody wrote."""
    for one, other in ((cache.k, paged.k), (cache.v, paged.v)):
        for pool, field in zip(one.pools, other.fields, strict=True):
            assert torch.equal(pool.view(torch.uint8), field.view(torch.uint8))
        for row, heads in enumerate(one.encoded):
            for head, done in enumerate(heads):
                slots = torch.arange(done, int(cache._slots[row, head])) % max(1, one.residual.shape[2])
                assert torch.equal(one.residual[row, head, slots], other.residual[row, head, slots])
    for x, y in ((cache.positions, paged.positions), (cache.scores, paged.mass)):
        assert (x is None and y is None) or torch.equal(x, y)
    assert paged.used.tolist() == cache._slots.tolist()
    assert paged.live.tolist() == cache._live.tolist()
    assert paged.seen.tolist() == [[n] * paged.seen.shape[1] for n in cache._seen]


def gives_up(cache, paged):
    """Bring over what attention did to the cache: mass, and a slot given up."""
    paged.positions.copy_(cache.positions)
    if paged.mass is not None:
        paged.mass.copy_(cache.scores)
    paged.live.copy_(torch.tensor(cache._live))
    if cache._reusable:
        paged.freed.copy_(torch.where(paged.live < paged.used, cache._freed.int(), -1))
