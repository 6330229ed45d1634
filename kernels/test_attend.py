"""Decode attention over pages: the kernel against its reference, and both against dense float64."""

import inspect
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.kernels import attend as reference
from kvsuite.kernels.fused import attend as fused
from kvsuite.kernels.paged import PAGE, Format, Paged, Side
from suites.checks import naive

FORMATS = {
    "plain": (Format("plain"), Format("plain"), 0),
    "int8": (Format("token", 8, 64), Format("token", 8, 64), 0),
    "int4": (Format("token", 4, 64), Format("token", 4, 64), 0),
    "fp8": (Format("fp8", 8, scale=1.0), Format("fp8", 8, scale=0.5), 0),
    "fp8 per token": (Format("fp8", 8), Format("fp8", 8), 0),
    "kivi-4": (Format("channel", 4, 32), Format("token", 4, 32), 64),
    "kivi-2": (Format("channel", 2, 32), Format("token", 2, 32), 96),
    "kivi-2 in groups of 16": (Format("channel", 2, 16), Format("token", 2, 16), 32),
    "fp8 keys, 4-bit values": (Format("fp8", 8, scale=2.0), Format("token", 4, 16), 0),
}


@dataclass(frozen=True)
class Shape:
    """What a case looks like: tokens per (row, head), and what is asked of them."""

    lengths: list[list[int]]
    dim: int = 64
    group: int = 2
    queries: int = 1
    dtype: torch.dtype = torch.bfloat16
    selects: bool = False
    mass: bool = False
    asked: frozenset = frozenset()
    tile: int | None = None
    splits: int | None = None


def draw(form, dim, residual, rolling, rows, heads, pages, dtype, noise):
    """One side with random contents: any codes, scales and zeros are a valid page."""
    units, total = PAGE // (form.group if form.kind == "channel" else 1), pages * rows * heads

    def codes(*shape):
        return torch.randint(0, 256, shape, generator=noise, dtype=torch.uint8)

    def normal(*shape):
        return torch.randn(shape, generator=noise)

    if form.kind == "plain":
        fields = (normal(total, PAGE, dim).to(dtype),)
    elif form.kind == "fp8":
        x = normal(total, PAGE, dim).clamp(-4, 4).to(torch.float8_e4m3fn).view(torch.uint8)
        fields = (x,) if form.scale else (x, normal(total, PAGE, 1).abs())
    elif form.kind == "token":
        small = (total, PAGE, dim // form.group, 1)
        step = normal(*small).abs() / (1 << form.bits)
        fields = (codes(total, PAGE, dim * form.bits // 8), step.half(), (normal(*small) - 1).half())
    else:
        small = (total, units, 1, dim)
        step = normal(*small).abs() * 3 / (1 << form.bits)
        packed = codes(total, units, form.group, dim * form.bits // 8)
        fields = (packed, step.half(), (normal(*small) - 1.5).half())
    return Side(form, fields, normal(rows, heads, residual, dim).to(dtype), rolling)


def make(name, shape, seed):
    """A cache with random contents in scattered pages, NaN where nothing may be read, and queries."""
    noise = torch.Generator().manual_seed(seed)
    rows, heads = len(shape.lengths), len(shape.lengths[0])
    used = torch.tensor(shape.lengths, dtype=torch.int32)
    if not shape.selects:  # where all tokens stay, all heads have as many
        used[:] = used.amax(1, keepdim=True)
    pages = int(used.max()) // PAGE + 2
    k_form, v_form, residual = FORMATS[name]
    k_form, v_form = (replace(f, group=shape.dim) if f.group == 64 else f for f in (k_form, v_form))
    k = draw(k_form, shape.dim, residual, False, rows, heads, pages, shape.dtype, noise)
    v = draw(v_form, shape.dim, residual, True, rows, heads, pages, shape.dtype, noise)
    table = torch.randperm(rows * heads * pages, generator=noise).to(torch.int32).view(rows, heads, pages)
    seen = (used.amax(1) + (5 if shape.selects else 0))[:, None].expand(-1, heads).contiguous()
    positions = mass = None
    if shape.selects:
        positions = torch.full((rows, heads, pages * PAGE), -1, dtype=torch.int32)
        for row in range(rows):
            for head in range(heads):
                n, last = int(used[row, head]), int(seen[row, head])
                kept = torch.randperm(last - 1, generator=noise)[: n - 1].sort().values
                at = torch.cat([kept, torch.tensor([last - 1])])[:n].int()
                at[: n - 1][torch.rand(n - 1, generator=noise) < 0.2] = -1
                positions[row, head, :n] = at
    if shape.mass:
        mass = torch.rand(rows, heads, pages * PAGE, generator=noise)
    for side in (k, v):
        poison(side, table, used)
    paged = Paged(k, v, table, used, used.clone(), seen, torch.full_like(used, -1), positions, mass)
    q = torch.randn(rows, heads * shape.group, shape.queries, shape.dim, generator=noise).to(shape.dtype)
    return q, paged


def poison(side, table, used):
    """NaN into every unit of the pools that no slot in use lies in."""
    per = PAGE // side.fields[0].shape[1]
    held = torch.zeros(side.fields[0].shape[:2], dtype=torch.bool)
    for row in range(table.shape[0]):
        for head in range(table.shape[1]):
            for unit in range(-(-side.settled(int(used[row, head])) // per)):
                held[table[row, head, unit * per // PAGE], unit % side.fields[0].shape[1]] = True
    for field in side.fields:
        field[~held] = 0x7F if field.dtype == torch.uint8 else float("nan")


def move(thing, device):
    """The same on another device."""
    if isinstance(thing, torch.Tensor):
        return thing.clone().to(device)
    if isinstance(thing, tuple):
        return tuple(move(x, device) for x in thing)
    if isinstance(thing, (Paged, Side)):
        return replace(thing, **{name: move(value, device) for name, value in vars(thing).items()})
    return thing


@contextmanager
def poisoned():
    """Whatever is allocated inside is NaN first: an element that is not written shows."""
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory is its default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def options(shape):
    noise = torch.Generator().manual_seed(1)
    sinks = torch.randn(len(shape.lengths[0]) * shape.group, generator=noise)
    known = {"window": 20, "softcap": 2.5, "sink_logits": sinks}
    return {name: known[name] for name in shape.asked}


def exact(q, paged, row, head, scale, asked):
    """float64 weights (group, Q, n), values (n, D), and the largest error a weight may have, relative (group, Q)."""
    group, queries, dim = q.shape[1] // paged.table.shape[1], q.shape[2], q.shape[3]
    n, seen = int(paged.used[row, head]), int(paged.seen[row, head])
    k, v = (reference.stored(side, paged.table[row, head], row, head, n) for side in (paged.k, paged.v))
    at = torch.arange(n) if paged.positions is None else paged.positions[row, head, :n]
    allowed = naive.causal(torch.arange(seen - queries, seen), at, asked.get("window")) & (at >= 0)
    unit, single = torch.finfo(q.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    size = k.double().abs()
    parts = size + 3 * size.amax(1, keepdim=True)  # codes times scale and zeros are added up apart, and cancel
    rounded = 0 if paged.k.format.kind == "plain" else unit / 3**0.5  # the standard deviation of a rounding
    weights, errors = [], []
    for h in range(head * group, (head + 1) * group):
        sink = None if "sink_logits" not in asked else float(asked["sink_logits"][h])
        weights.append(naive.weights(q[row, h], k, scale, allowed, asked.get("softcap"), sink))
        sums = q[row, h].double().abs() @ ((dim + 16) * single * parts).T
        several = 8 * rounded * (q[row, h].double().square() @ size.square().T).sqrt()  # and they are independent
        errors.append(2 * scale * (sums + several).amax(1) + (n + 16) * single)
    return torch.stack(weights), v.double(), torch.stack(errors)


def check(name, shape, seed, device):
    q, paged = make(name, shape, seed)
    scale, asked = shape.dim**-0.5, options(shape)
    rows = torch.arange(len(shape.lengths), dtype=torch.int32)
    found = {}
    with pytest.MonkeyPatch.context() as patch, poisoned():
        if shape.tile:
            for kind, chosen in fused.TUNED.items():
                patch.setitem(fused.TUNED, kind, replace(chosen, tile=shape.tile))
        if shape.splits:
            patch.setattr(fused, "SPLITS", shape.splits)
        for module in (reference, fused):
            there = device if module is fused else torch.device("cpu")
            state = move(paged, there)
            sinks = {k: v.to(there) if isinstance(v, torch.Tensor) else v for k, v in asked.items()}
            out = module.attend(q.to(there), state, rows.to(there), scale, **sinks)
            found[module] = out.cpu(), None if state.mass is None else state.mass.cpu()
    unit = torch.finfo(q.dtype).eps / 2
    tiny = torch.finfo(q.dtype).smallest_normal * 2 * unit
    for row in range(len(shape.lengths)):
        for head in range(len(shape.lengths[0])):
            p, v, error = exact(q, paged, row, head, scale, asked)
            span = slice(head * shape.group, (head + 1) * shape.group)
            bound = (error + 3 * unit)[..., None] * (p @ v.abs()) + tiny * (1 + v.abs().sum(0))
            for out, mass in found.values():
                assert out.dtype == q.dtype
                assert ((out[row, span].double() - p @ v).abs() <= bound).all()
                if mass is not None:
                    n = v.shape[0]
                    added = (mass - paged.mass)[row, head, :n]
                    half = torch.finfo(torch.float16)
                    few = (error + half.eps)[..., None] * p + half.smallest_normal * half.eps
                    few = few.mean((0, 1)) + 1e-7 * mass[row, head, :n]  # and the addition itself
                    assert ((added - p.mean((0, 1))).abs() <= few).all()
                    assert torch.equal(mass[row, head, n:], paged.mass[row, head, n:])


lengths = st.integers(1, 3).flatmap(
    lambda heads: st.lists(st.lists(st.integers(1, 260), min_size=heads, max_size=heads), min_size=1, max_size=2)
)


@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_and_its_reference_are_attention(name, device):
    @settings(max_examples=12)  # the interpreter takes half a second each
    @given(
        lengths=lengths,
        group=st.sampled_from([1, 3, 4]),
        dtype=st.sampled_from([torch.bfloat16, torch.float16]),
        kind=st.sampled_from(["", "", "selects", "mass"]),
        asked=st.sets(st.sampled_from(["window", "softcap", "sink_logits"]), max_size=2),
        seed=st.integers(0, 999),
        tile=st.sampled_from([None, None, 32, 64]),
    )
    def run(lengths, group, dtype, kind, asked, seed, tile):
        shape = Shape(lengths, 64, group, 1, dtype, kind != "", kind == "mass", frozenset(asked), tile)
        check(name, shape, seed, device)

    run()


@pytest.mark.parametrize(
    ("dim", "dtype"), [(64, torch.float16), (96, torch.bfloat16), (128, torch.float16), (256, torch.bfloat16)]
)
@pytest.mark.parametrize("name", FORMATS)
def test_every_head_dimension(name, dim, dtype, device):
    check(name, Shape([[205, 96]], dim, 4, dtype=dtype), dim, device)


@pytest.mark.parametrize("asked", [(), ("window",), ("sink_logits", "softcap")], ids="+".join)
@pytest.mark.parametrize("splits", [None, 5])
def test_a_long_row_is_many_parts(asked, splits, device):
    check("plain", Shape([[2500]], 64, 2, asked=frozenset(asked), splits=splits), 4, device)


def test_mass_of_a_long_row(device):
    check("plain", Shape([[1500]], 64, 2, selects=True, mass=True), 5, device)
    check("int4", Shape([[700]], 64, 2, selects=True, mass=True, splits=3), 6, device)


@pytest.mark.parametrize("group", [20, 71])
def test_more_query_heads_than_a_tensor_instruction_takes(group, device):
    check("int8", Shape([[150]], 64, group), group, device)


def test_a_window_begins_where_it_begins(device):
    for length in range(100, 132, 5):
        check("plain", Shape([[length]], 64, 1, asked=frozenset({"window"}), tile=32), length, device)


@pytest.mark.parametrize("name", ["plain", "int4", "kivi-4"])
@pytest.mark.parametrize("queries", [5, 30])
@pytest.mark.parametrize("asked", [(), ("window",), ("sink_logits", "softcap")], ids="+".join)
def test_several_queries_are_causal_among_themselves(name, queries, asked, device):
    check(name, Shape([[170, 40], [65, 33]], 64, 3, queries, asked=frozenset(asked)), 1, device)


@pytest.mark.parametrize("name", ["plain", "kivi-2"])
def test_idle_items_are_zero_and_a_row_does_not_depend_on_its_mates(name, device):
    q, paged = make(name, Shape([[300, 40], [65, 333], [7, 129]], 64, 2), 3)
    q, paged = q.to(device), move(paged, device)
    every = fused.attend(q, paged, torch.tensor([0, 1, 2], dtype=torch.int32, device=device), 0.1)
    some = fused.attend(q[[2, 0, 1]], paged, torch.tensor([2, -1, 1], dtype=torch.int32, device=device), 0.1)
    assert torch.equal(some[0], every[2])
    assert torch.equal(some[2], every[1])
    assert (some[1] == 0).all()


def test_queries_may_lie_as_the_model_left_them(device):
    q, paged = make("plain", Shape([[100, 100], [60, 60]], 64, 2, 3), 3)
    paged, rows = move(paged, device), torch.tensor([0, 1], dtype=torch.int32, device=device)
    strided = q.to(device).transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    assert torch.equal(fused.attend(strided, paged, rows, 0.1), fused.attend(q.to(device), paged, rows, 0.1))


def test_nan_is_not_lost(device):
    for name in FORMATS:
        q, paged = make(name, Shape([[100]], 64, 2), 0)
        side = paged.v
        if side.format.kind == "fp8":
            side.fields[0][paged.table[0, 0, 1], 3, 5] = 0xFF
        elif side.format.kind == "plain":
            side.fields[0][paged.table[0, 0, 1], 3, 5] = float("nan")
        else:
            continue
        rows = torch.zeros(1, dtype=torch.int32, device=device)
        out = fused.attend(q.to(device), move(paged, device), rows, 0.1)
        assert out[..., 5].isnan().all()
        assert out[..., 6].isfinite().all()


def test_both_have_one_signature():
    assert inspect.signature(reference.attend) == inspect.signature(fused.attend)


def test_mass_of_several_queries_is_refused(device):
    rows = torch.zeros(1, dtype=torch.int32)
    q, paged = make("plain", Shape([[40]], 64, 4, 2, mass=True), 0)
    for module, there in ((reference, torch.device("cpu")), (fused, device)):
        with pytest.raises(ValueError, match="query by query"):
            module.attend(q.to(there), move(paged, there), rows.to(there), 0.1)
