"""Writing: the kernels against the reference, byte for byte."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.kernels import reference
from kvsuite.kernels import triton as fused
from kvsuite.kernels.allocator import PageAllocator
from kvsuite.kernels.context import LayerContext, Needs
from kvsuite.kernels.paged import NULL_PAGE, PagedKV
from kvsuite.kernels.quantize import to_e4m3
from kvsuite.kernels.quantspec import PAGE
from kvsuite.kernels.triton.launch import recording
from kvsuite.kernels.triton.store import flush
from kvsuite.methods.codecs.fp8 import E4M3
from kvsuite.methods.codecs.full import Plain
from kvsuite.methods.codecs.int8 import PerToken
from kvsuite.methods.codecs.kivi import PerChannel
from kvsuite.methods.codecs.nvfp4 import E2M1Blocks
from kvsuite.methods.codecs.q8_0 import Symmetric8
from kvsuite.methods.codecs.turboquant import LloydMax
from suites.checks.depth import depth

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
STATES = Needs(positions=True, evicts=True, accumulated_attention=True)
"""What a method that evicts by attention keeps."""


def poison(x):
    """Bytes that nobody writes: what is left out and what is overwritten shows."""
    x.view(torch.uint8).fill_(0xAB)


def with_residual(spec, residual, rolling):
    """The same specification with other newest tokens."""
    own = {**vars(spec), **({"residual": residual} if "residual" in vars(spec) else {})}
    return type(type(spec).__name__, (type(spec),), {"residual": residual, "rolling": rolling})(**own)


def empty(specs, rows, heads, pages, head_dim, dtype, needs=STATES, seed=0, device=CPU):
    """A cache with nothing in it but poison, its free pages in no order."""
    layer = LayerContext(0, heads, heads, head_dim, dtype, dtype, device)
    kv = PagedKV.empty(layer, specs, rows, pages * PAGE, needs, pages=heads * pages + 1, arena=False)
    first = int(needs.positions)
    free = first + np.random.default_rng(seed).permutation(rows * kv.pages_per_row)
    kv.allocator = PageAllocator(free.tolist())
    for x in (*kv.k.pools, *kv.v.pools, kv.accumulated_attention):
        if x is not None:
            poison(x[first:])
    for store in (kv.k, kv.v):
        poison(store.residual)
    return kv


def tensors(kv):
    found = {"page_table": kv.page_table, "positions": kv.positions, "accumulated": kv.accumulated_attention}
    found |= {f"{name}.pools[{i}]": x for name, one in (("k", kv.k), ("v", kv.v)) for i, x in enumerate(one.pools)}
    return {name: x for name, x in found.items() if x is not None}


def bytes_of(x):
    return x.cpu().contiguous().view(torch.uint8)


def differing(expected, kv):
    """Names of what is not the same to the last bit: pages, table, the residual's slots in use, and lengths."""
    pairs = zip(tensors(expected).items(), tensors(kv).values(), strict=True)
    found = [name for (name, a), b in pairs if not torch.equal(bytes_of(a), bytes_of(b))]
    host = kv.host
    for name, one, other in (("k", expected.k, kv.k), ("v", expected.v, kv.v)):
        for row, head in np.ndindex(host.slots.shape):
            n, r = int(expected.host.slots[row, head]), one.spec.residual
            ring = torch.arange(one.spec.num_encoded(n), n) % max(1, r)
            a, b = (bytes_of(x.residual[row, head].cpu()[ring]) for x in (one, other))
            found += [f"{name}.residual"] * (not torch.equal(a, b))
    seen = np.repeat(host.seen[:, None], host.slots.shape[1], 1)
    of_host = {"num_slots": host.slots, "num_tokens": host.tokens, "num_seen": seen}
    found += [name for name, x in of_host.items() if getattr(kv, name).tolist() != x.tolist()]
    if kv.by_token:
        again = np.where(host.tokens < host.slots, expected.host.free_slot, -1)
        found += ["free_slot"] * (kv.free_slot.tolist() != again.tolist())
    return found


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
STORES = {
    # layouts of K and V, and their residuals: how many, and whether rolling
    "no residual": (("plain", "token", "fp8", "levels", "symmetric", "e2m1"), ((0, True), (0, False))),
    "channel": (("channel",), ()),
    "token": (("token",), RINGS),
    "plain or fp8": (("plain", "fp8"), RINGS),
}
PAIRS = ("no residual", "no residual"), ("channel", "token"), ("token", "plain or fp8"), ("plain or fp8", "channel")


def a_spec(draw, head_dim, layouts, residuals):
    layout = draw(st.sampled_from(layouts))
    if layout == "channel":
        group = draw(st.sampled_from([8, 16, 32]))
        return PerChannel(draw(st.sampled_from([4, 2])), group, group * draw(st.sampled_from([1, 2, 3])))
    residual, rolling = draw(st.sampled_from(residuals))
    rotation = "" if residual else draw(st.sampled_from(["", "hadamard"]))
    if layout in ("levels", "symmetric"):
        return LloydMax(4, corrected=True) if layout == "levels" else Symmetric8(rotation)
    if layout == "e2m1":
        return E2M1Blocks(draw(st.sampled_from([1.0, 0.3])), draw(st.booleans()), rotation)
    if layout == "plain":
        return with_residual(Plain(), residual, rolling)
    if layout == "fp8":
        return with_residual(E4M3(draw(st.sampled_from([None, 1.0, 0.3]))), residual, rolling)
    group = draw(st.sampled_from([g for g in (8, 16, 32, head_dim) if head_dim % g == 0]))
    return with_residual(PerToken(draw(st.sampled_from([8, 4, 2])), group, rotation=rotation), residual, rolling)


@st.composite
def histories(draw, pair):
    """A cache and what happens to it."""
    head_dim = draw(st.sampled_from([32, 64, 96, 256]))
    specs = tuple(a_spec(draw, head_dim, *STORES[name]) for name in pair)
    rows, heads, pages = (draw(st.sampled_from(n)) for n in ((1, 2, 3), (1, 2), (2, 3)))
    most = pages * PAGE - 4
    # around a full residual, and where nothing special happens
    around = [m * spec.residual - n for spec in specs for m in (1, 2) for n in (0, 1, 2, 3)]
    lengths = st.sampled_from([n for n in (*around, 0, 1, 17, 32, 45, 60, most) if 0 <= n <= most])
    kept = st.sampled_from(["all", "all", "some", "ragged"])
    fills = [
        ("fill", row, draw(lengths), draw(kept), draw(st.booleans()))
        for row in draw(st.permutations(range(rows)))
        if draw(st.sampled_from([True, True, False]))
    ]
    steps = [
        ("step", draw(st.permutations([*range(rows), None])), draw(st.booleans()))
        for _ in range(draw(st.sampled_from([0, 1, 2, 3, 4])))
    ]
    again = draw(st.sampled_from([[], [], [("fill", draw(st.integers(0, rows - 1)), draw(lengths), draw(kept), True)]]))
    several = draw(st.sampled_from([[], [], [("several", draw(st.integers(0, rows - 1)), draw(st.integers(2, 4)))]]))
    compacts = draw(st.sampled_from([[], [], [("compact", draw(st.integers(0, rows - 1)))]]))
    after = [*steps, *again, *several, *compacts]
    events = [*fills, *(after if draw(st.booleans()) else [*several, *compacts, *again, *steps])]
    dtype, states = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    return specs, rows, heads, pages, head_dim, dtype, states, events, draw(st.integers(0, 2**20))


class Both:
    """The same done to a cache by the reference and to one by kernels. ``expected``, ``kv``: the two."""

    def __init__(self, expected, kv):
        self.expected, self.kv = expected, kv
        self.noise = torch.Generator().manual_seed(0)

    def do(self, name, *arguments, touches):
        """``touches``: the rows whose residual may change."""
        others = [row for row in range(len(self.kv.host.seen)) if row not in touches]
        before = [store.residual[others].clone() for store in (self.kv.k, self.kv.v)]
        getattr(reference, name)(self.expected, *arguments)
        there = self.kv.page_table.device

        def move(x):
            return [move(y) for y in x] if isinstance(x, list) else x.to(there) if isinstance(x, torch.Tensor) else x

        getattr(fused, name)(self.kv, *[move(x) for x in arguments])
        for store, x in zip((self.kv.k, self.kv.v), before, strict=True):
            assert torch.equal(bytes_of(store.residual[others]), bytes_of(x)), f"{name}: another row's residual"
        self.agree(name)

    def agree(self, what):
        wrong = differing(self.expected, self.kv)
        assert not wrong, f"{what}: {wrong}"

    def each(self):
        return self.expected, self.kv

    def rand(self, *shape):
        return torch.rand(shape, generator=self.noise)

    def below(self, n):
        return int(torch.randint(n, (), generator=self.noise))

    def numbers(self, n):
        layer = self.expected.layer
        return numbers(self.noise, layer.kv_heads, n, layer.head_dim, layer.dtype)

    def fill(self, row, length, kept, observed):
        for kv in self.each():
            kv.release(row)
        self.agree("release")
        heads, keep = self.expected.layer.kv_heads, None
        if kept != "all":
            n = self.below(length + 1)
            counts = [self.below(n + 1) if kept == "ragged" else n for _ in range(heads)]
            keep = [self.rand(length).argsort()[:m].sort().values for m in counts]
        mass = self.rand(heads, length) if observed else None
        self.do("fill", row, self.numbers(length), self.numbers(length), keep, mass, touches=[row])

    def step(self, who, evicts):
        """A token for each; then some go, and pages without any."""
        at = [row for row in who if row is not None]
        if self.full(at, 1):
            return
        k, v = (self.numbers(len(who)).transpose(0, 1)[:, :, None] for _ in range(2))
        for kv in self.each():
            kv.advance(at)
        self.do("append", k, v, tuple(who), touches=at)
        flush(self.kv, tuple(who))  # where nothing is full, and again where something was
        self.agree("flush")
        if evicts and self.kv.budget is not None:
            self.evict(at)
            if not self.kv.by_token:
                self.do("release_empty", at, touches=[])

    def evict(self, at):
        """In about every second (row, head) a slot that holds a token."""
        host, heads = self.expected.host, self.expected.layer.kv_heads
        free = (self.rand(*host.slots.shape).numpy() < 0.5) & (host.tokens > 0)
        free &= (host.tokens == host.slots) | (not self.kv.by_token)
        slots = torch.zeros(len(at), heads, dtype=torch.int64)
        for i, row in enumerate(at):
            for head in range(heads):
                places = self.expected.places(row, head, np.arange(host.slots[row, head]))
                held = np.flatnonzero(self.expected.positions.view(-1)[places] >= 0)
                if len(held):
                    slots[i, head] = int(held[self.below(len(held))])
        for kv in self.each():
            kv.host.budget[:] = np.where(free, host.tokens - 1, 10**6)
            kv.budget.copy_(torch.from_numpy(kv.host.budget))
        before = host.tokens.copy()
        reference.evict(self.expected, at, slots)
        fused.evict(self.kv, at, slots.to(self.kv.budget.device))
        for kv in self.each():
            kv.host.tokens[at] -= before[at] > kv.host.budget[at]
        self.agree("evict")

    def several(self, row, n):
        if self.full([row], n) or (self.expected.host.tokens[row] < self.expected.host.slots[row]).any():
            return
        k, v = (self.numbers(n)[None] for _ in range(2))
        for kv in self.each():
            kv.advance([row], n)
        self.do("append", k, v, (row,), touches=[row])

    def compact(self, row):
        if self.kv.positions is None:
            return
        keep = []
        for head, n in enumerate(self.expected.host.slots[row]):
            places = self.expected.places(row, head, np.arange(n))
            held = (self.expected.positions.view(-1)[places] >= 0).nonzero()[:, 0]
            keep.append(held[self.rand(len(held)) < 0.4])
        self.do("compact", row, keep, touches=[])

    def full(self, rows, n):
        return (self.expected.host.slots[rows] + n > self.expected.host.limit[rows]).any()


@settings(max_examples=depth(8, 30))
@given(data=st.data())
@pytest.mark.parametrize("pair", PAIRS, ids=" and ".join)
def test_kernels_write_what_the_reference_writes(device, pair, data):
    specs, rows, heads, pages, head_dim, dtype, states, events, seed = data.draw(histories(pair))
    how = specs, rows, heads, pages, head_dim, dtype, STATES if states else Needs(), seed
    both = Both(empty(*how), empty(*how, device))
    both.noise.manual_seed(seed)
    for name, *what in events:
        getattr(both, name)(*what)
    for kv in both.each():
        if kv.needs.positions:
            assert (kv.positions[NULL_PAGE] == -1).all()
            assert not any(pool[NULL_PAGE].view(torch.uint8).any() for pool in (*kv.k.pools, *kv.v.pools))
        for row in range(rows):
            kv.release(row)
        assert len(kv.allocator) == rows * kv.pages_per_row
        assert kv.positions is None or (kv.positions == -1).all()


CONFIGURATIONS = {
    "plain": (Plain(),) * 2,
    "int8": (PerToken(8, 32),) * 2,
    "int4": (PerToken(4, 32),) * 2,
    "fp8": (E4M3(1.0),) * 2,
    "fp8 by token": (E4M3(None),) * 2,
    "kivi": (PerChannel(2, 8, 16), PerToken(2, 16, 16)),
}


@pytest.mark.parametrize("name", depth(["plain", "int4", "fp8 by token", "kivi"], [*CONFIGURATIONS]))
def test_a_recorded_step_is_replayed_at_other_lengths(device, name):
    """One step's launches, started again and again as a CUDA graph does it: nothing in them knows how long rows are, or
    which pages they have."""
    noise = torch.Generator().manual_seed(0)
    how = CONFIGURATIONS[name], 2, 2, 2, 32, torch.bfloat16, STATES, 0
    expected, kv = empty(*how), empty(*how, device)
    prompt = numbers(noise, 2, 14, 32, torch.bfloat16)
    reference.fill(expected, 1, prompt, prompt)
    fused.fill(kv, 1, prompt.to(device), prompt.to(device))
    k, v = (torch.zeros(2, 2, 1, 32, dtype=torch.bfloat16, device=device) for _ in range(2))
    rows = torch.full((2,), -1, dtype=torch.int32, device=device)

    def step():
        kv.bound, kv.encodes = ((None, None), rows), True
        fused.append(kv, k, v, (None, None))

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

    # rows reach the ring's and the page's end at different steps
    for who in [(0, 1)] * 4 + [(1, None)] * 3 + [(None, 0), (1, 0)] + [(0, 1)] * 16:
        new = [numbers(noise, 2, 2, 32, torch.bfloat16)[:, :, None] for _ in range(2)]
        at = [row for row in who if row is not None]
        for one in (expected, kv):
            one.advance(at)
        reference.append(expected, *new, who)
        for buffer, x in zip((k, v), new, strict=True):
            buffer.copy_(x)
        rows.copy_(torch.tensor([-1 if row is None else row for row in who], dtype=torch.int32))
        replay()
        assert not differing(expected, kv)


def test_every_float16_becomes_the_nearest_e4m3(device):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).view(1, -1, 32)
    limits = torch.finfo(torch.float32)
    x = torch.cat([x.float(), torch.tensor([limits.max, limits.tiny, 464.0, 2**-10] * 8).view(1, 1, 32)], 1)
    kv = empty((E4M3(1.0), Plain()), 1, 1, 65, 32, torch.float32, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy speaks up about NaN
        fused.fill(kv, 0, x.to(device), x.to(device))
    codes = kv.k.pools[0][kv.page_table[0, 0].long()].view(-1, 32)[: x.shape[1]].cpu()
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
    pools = [torch.empty(last + 16, PAGE, head_dim, dtype=torch.uint8, device=device) for _ in range(2)]
    how = (E4M3(1.0),) * 2, 1, heads, 2, head_dim, torch.float16, Needs(), 0
    small, kv = empty(*how), empty(*how, device)
    kv.k, kv.v = (replace(store, pools=(pool,)) for store, pool in zip((kv.k, kv.v), pools, strict=True))
    kv.allocator = PageAllocator(range(last, last + 2 * heads))
    token = prompt[:, :1][None]
    reference.fill(small, 0, prompt.cpu(), prompt.cpu())
    fused.fill(kv, 0, prompt, prompt)
    for one in (small, kv):
        one.advance([0])
    reference.append(small, token.cpu(), token.cpu(), (0,))
    fused.append(kv, token, token, (0,))
    assert (kv.table >= last).all()
    for store, other in ((small.k, kv.k), (small.v, kv.v)):
        for head in range(heads):
            expected, found = (
                x.pools[0][of.page_table[0, head].long()].view(-1, head_dim)[:41].cpu()
                for x, of in ((store, small), (other, kv))
            )
            assert torch.equal(expected, found)
