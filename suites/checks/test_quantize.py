"""Property 1: a uniform codec errs by half a step at most, with the smallest step that float16 allows."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from kvsuite.kernels.quantize import dequantize, pack, quantize, unpack
from kvsuite.methods import parse
from suites.checks import naive
from suites.checks.table import layer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = [2, 4, 8]


@st.composite
def vectors(draw):
    """(6, 32) of every kind: any offset over any spread, constants, zeros, one outlier, all magnitudes at once."""
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.rand(6, 32, generator=noise, dtype=torch.float64) * 2 - 1
    kind = draw(st.sampled_from(["spread", "constant", "zero", "outlier", "magnitudes", "few"]))
    if kind in ("constant", "zero"):
        x = x[:, :1].expand(6, 32) * (kind == "constant")
    elif kind == "outlier":
        x[:, draw(st.integers(0, 31))] *= 1000
    elif kind == "magnitudes":
        x = x * 10.0 ** torch.randint(-12, 4, (6, 32), generator=noise)
    elif kind == "few":
        x = x.round()
    spread = 10.0 ** draw(st.integers(-9, 3))
    offset = draw(st.sampled_from([0.0, 0.1, -1.0, 7.3, 100.0, -1000.0, 3e4])) * draw(st.floats(0.5, 1))
    x = x * spread + offset
    assume(x.abs().max() < 6e4)  # float16 ends at 65504
    return x


def half_a_step(scale, value, levels, dtype):
    """scale / 2 as the codec's float32 arithmetic can keep it, and the rounding of the result to ``dtype``."""
    unit, single = torch.finfo(dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    step = scale.double()
    decision = 2 * single * levels * step  # x - zero and its quotient are rounded before the code is
    sums = 2 * single * (value.abs() + levels * step)
    return step / 2 + decision + sums + (value.abs() + step) * unit + torch.finfo(dtype).smallest_normal * unit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [-1, -2])
@settings(max_examples=100)
@given(x=vectors())
def test_error_is_half_a_step_at_most(dim, bits, dtype, x):
    x = x.to(dtype)
    codes, scale, zero = quantize(x, bits, dim)
    assert codes.dtype == torch.uint8
    assert scale.dtype == zero.dtype == torch.float16
    assert scale.shape == zero.shape == x.amax(dim, keepdim=True).shape
    assert int(codes.max()) < 2**bits
    y = dequantize(codes, scale, zero, dtype)
    assert y.dtype == dtype
    assert ((y.double() - x.double()).abs() <= half_a_step(scale, x.double(), 2**bits - 1, dtype)).all()


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=100)
@given(x=vectors())
def test_zero_and_step_are_the_tightest_that_cover(bits, x):
    x = x.float()
    _, scale, zero = quantize(x, bits, -1)
    low, high, levels = x.double().amin(-1, keepdim=True), x.double().amax(-1, keepdim=True), 2**bits - 1
    above = torch.nextafter(zero, torch.tensor(torch.inf, dtype=torch.float16))
    assert (zero.double() <= low).all()
    assert (above.double() > low).all()
    slop = 1 + 2.0**-22  # of the float32 subtraction and division
    assert (zero.double() + levels * scale.double() * slop >= high).all()
    below = torch.nextafter(scale, torch.tensor(-torch.inf, dtype=torch.float16))
    wider = zero.double() + levels * below.double() < high + (high - zero.double()) * 2.0**-22
    assert (wider | (scale == 0)).all()


@pytest.mark.parametrize("bits", BITS)
def test_multiples_of_a_step_are_stored_exactly(bits):
    levels = 2**bits - 1
    x = torch.arange(levels + 1).repeat(2, 1) * torch.tensor([[0.25], [2.0]]) - torch.tensor([[1.0], [64.0]])
    codes, scale, zero = quantize(x, bits, -1)
    assert torch.equal(codes, torch.arange(levels + 1, dtype=torch.uint8).repeat(2, 1))
    assert torch.equal(dequantize(codes, scale, zero, torch.float32), x)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@given(data=st.data())
def test_unpacking_is_the_inverse_of_packing(bits, data):
    width = data.draw(st.integers(1, 8)) * (8 if bits == 3 else 8 // bits)
    seed = data.draw(st.integers(0, 2**32))
    codes = torch.randint(0, 2**bits, (3, 2, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 2, width * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


def test_three_bits_are_packed_as_two_and_one():
    codes = torch.arange(8, dtype=torch.uint8).repeat_interleave(4)[None]
    packed = pack(codes, 3)
    assert packed.shape == (1, 12)
    assert torch.equal(packed[:, :8], pack(codes % 4, 2))
    assert torch.equal(packed[:, 8:], pack(codes // 4, 1))


@pytest.mark.parametrize("bits", [2, 4])
def test_parts_of_a_vector_are_packed_without_interleaving(bits):
    parts = 8 // bits
    codes = torch.arange(4 * parts).reshape(1, -1).remainder(2**bits).to(torch.uint8)
    expected = sum(codes[:, 4 * i : 4 * i + 4].int() << (bits * i) for i in range(parts))
    assert torch.equal(pack(codes, bits).int(), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "text", ["int8", "int4", "kivi:bits=4", "kivi:bits=2", "kivi:bits=4,group=16", "kivi:bits=2,group=8,order=after"]
)
@settings(max_examples=20)
@given(x=vectors())
def test_integers_are_their_formula(text, dtype, x):
    """What is stored of each vector, and of it what is read, bit for bit."""
    x[x.abs() < 1e-30] = 0  # so that float32 keeps all digits
    x, codec = x[:4].to(dtype), parse(text).codec
    bits, group = getattr(codec, "bits", int(text[3]) if text.startswith("int") else 0), getattr(codec, "group", 32)
    keys, values = codec.specs(layer(dtype))
    sides = [(values, x[None, :, None])]
    if not text.startswith("int"):  # channels are the vectors, 32 tokens long
        sides.append((keys, x.T[None].unflatten(1, (-1, group))))
    for spec, units in sides:
        fields = spec.encode(units, ())
        read = spec.decode(fields, dtype, ())[0]
        codes = unpack(fields[0], bits)[0]
        if spec is values:
            stored = codes.unflatten(-1, (-1, group)), fields[1][0], fields[2][0]
            own, read = x.unflatten(-1, (-1, group)), read[:, 0].unflatten(-1, (-1, group))
        else:
            stored = tuple(part.mT for part in (codes, fields[1][0], fields[2][0]))
            own, read = units[0].mT, read.mT
        expected = naive.check_codes(own.double(), bits, stored)
        assert torch.equal(read, expected.float().to(dtype))


@pytest.mark.parametrize("text", ["int8", "kivi:bits=4,group=16", "kivi:bits=2,group=8", "kivi:bits=2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(offset=st.sampled_from([0.0, 5.0, -300.0]), spread=st.sampled_from([0.001, 1.0, 50.0]), seed=st.integers(0, 99))
def test_a_codecs_groups_are_those_it_promises(text, dtype, offset, spread, seed):
    codec = parse(text).codec
    bits, group = getattr(codec, "bits", 8), getattr(codec, "group", 32)
    noise = torch.Generator().manual_seed(seed)
    own = torch.rand(2, 64, 32, generator=noise) * 4 ** torch.randint(0, 4, (2, 64, 32), generator=noise)
    x = (offset + spread * own / 64).to(dtype)
    levels = 2**bits - 1
    for side, per_channel in zip(codec.specs(layer(dtype)), (text != "int8", False), strict=True):
        blocks = x.unflatten(1, (-1, side.block))
        y = side.decode(side.encode(blocks, ()), dtype, ()).flatten(1, 2).double()
        groups = [z.unflatten(1 if per_channel else 2, (-1, group)) for z in (x.double(), y)]
        dim = 2 if per_channel else 3
        span = groups[0].amax(dim, keepdim=True) - groups[0].amin(dim, keepdim=True)
        largest = groups[0].abs().amax(dim, keepdim=True)
        step = (span + largest * 2.0**-10) / levels * (1 + 2.0**-10) + 2.0**-24  # zero and scale rounded to float16
        error = (groups[1] - groups[0]).abs()
        assert (error <= half_a_step(step, largest, levels, dtype)).all()
        for values in groups[1].movedim(dim, -1).reshape(-1, group)[:50]:
            assert len(values.unique()) <= 2**bits
