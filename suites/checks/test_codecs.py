"""nvfp4, mxfp4, q8_0, q4_0 and the Hadamard rotation against independent writings: float64, gguf's, torch's dtypes."""

import math
from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.errors import UsageError
from kvsuite.kernels.fp4 import E2M1, from_e2m1, to_e2m1
from kvsuite.kernels.hadamard import hadamard
from kvsuite.kernels.quantize import unpack
from kvsuite.methods import parse
from suites.checks import naive
from suites.checks.table import layer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POSITIVE = E2M1[:8]


@st.composite
def vectors(draw):
    """(5, 64) float32 of every kind: spread, constant, zeros, an outlier of 1e4, on the edges between codes, tiny."""
    noise = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(5, 64, generator=noise)
    kind = draw(st.sampled_from(["spread", "constant", "zero", "outlier", "edges", "tiny", "magnitudes"]))
    if kind in ("constant", "zero"):
        x = x[:, :1].expand(5, 64) * (kind == "constant")
    elif kind == "outlier":
        x[:, draw(st.integers(0, 63))] = 1e4
    elif kind == "edges":
        x = torch.randint(-24, 25, x.shape, generator=noise) / 4
    elif kind == "magnitudes":
        x = x * 10.0 ** torch.randint(-6, 4, x.shape, generator=noise)
    elif kind == "tiny":
        x = x * 2.0 ** draw(st.integers(-140, -100))
    return x.clone()


def encoded(text, x, side=0):
    """The fields of x (n, head_dim), and what is read of them as float32."""
    spec = parse(text).codec.specs(replace(layer(), head_dim=x.shape[-1]))[side]
    fields = spec.encode(x[:, None, None], ())
    return [field[:, 0] for field in fields], spec.decode(fields, torch.float32, ())[:, 0, 0]


def nearest(value, numbers):
    """The nearest of ascending numbers ≥ 0 to |value|, with its sign; of two the one at an even place."""
    size = abs(value)
    place = min(range(len(numbers)), key=lambda at: (abs(numbers[at] - size), at % 2))
    return math.copysign(numbers[place], value)


E4M3 = sorted(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().tolist())


def nvfp4(x, tensor_scale, fulls):
    """One block of 16 numbers in float64: what is read, for each full scale, and the one with the smallest error."""
    best = None
    for full in fulls:
        scale = nearest(min(max(map(abs, x)) / full / tensor_scale, 448.0), E4M3) * tensor_scale
        read = [nearest(min(max(value / scale, -6.0), 6.0), POSITIVE) * scale if scale else 0.0 for value in x]
        error = math.fsum((a - b) ** 2 for a, b in zip(read, x, strict=True))
        if best is None or error < best[0]:
            best = error, read
    return best[1]


@pytest.mark.parametrize(
    ("text", "tensor_scale", "fulls"),
    [("nvfp4", 1.0, (6,)), ("nvfp4:scale=4over6", 1.0, (6, 4)), ("nvfp4:k_scale=0.25", 0.25, (6,))],
)
@settings(max_examples=40)
@given(x=vectors())
def test_nvfp4_is_its_formula(text, tensor_scale, fulls, x):
    x = x.bfloat16()
    read = encoded(text, x)[1].unflatten(-1, (-1, 16))
    for own, block in zip(read.flatten(0, 1).tolist(), x.unflatten(-1, (-1, 16)).flatten(0, 1).tolist(), strict=True):
        expected = nvfp4(block, tensor_scale, fulls)
        # a quotient may be rounded onto an edge between two codes
        step = max(map(abs, expected)) or 1.0
        off = [abs(a - b) for a, b in zip(own, expected, strict=True)]
        error = [abs(abs(a - x) - abs(b - x)) for a, b, x in zip(own, expected, block, strict=True)]
        assert all(d == 0 or e < 1e-6 * step for d, e in zip(off, error, strict=True))


@pytest.mark.parametrize(
    ("text", "scales"), [("fp8", (1.0, 1.0)), ("fp8:k_scale=0.3,v_scale=7.1", (0.3, 7.1)), ("fp8:per=token", None)]
)
@settings(max_examples=20)
@given(x=vectors())
def test_fp8_is_its_formula(text, scales, x):
    """The e4m3 number that is nearest to x / s, and that times s. A quotient may be rounded onto a half."""
    x[x.abs() < 1e-30] = 0  # so that float32 keeps all digits
    for side in (0, 1):
        fields, read = encoded(text, x, side)
        for at, vector in enumerate(x.double().tolist()):
            largest = max(map(abs, vector))
            scale = scales[side] if scales else largest / 448 or 1.0
            if not scales:
                assert float(fields[1][at]) == pytest.approx(scale, rel=2.0**-24)
            for channel, value in enumerate(vector):
                exact = min(max(value / scale, -448.0), 448.0)
                code = float(fields[0][at, channel].view(torch.float8_e4m3fn))
                if code != nearest(exact, E4M3):
                    assert abs(abs(code - exact) - abs(nearest(exact, E4M3) - exact)) <= 2.0**-22 * abs(exact)
                assert float(read[at, channel]) == pytest.approx(code * scale, rel=2.0**-22, abs=0)


@settings(max_examples=40)
@given(x=vectors())
def test_four_over_six_errs_no_more_than_six(x):
    errors = []
    for text in ("nvfp4:scale=4over6", "nvfp4"):
        read = encoded(text, x)[1]
        errors.append((read - x).double().square().unflatten(-1, (-1, 16)).sum(-1))
    assert (errors[0] <= errors[1] * (1 + 1e-12)).all()


def test_four_over_six_chooses_four_where_codes_are_coarse():
    x = torch.tensor([[4.0, 3.0, 3.0, 3.0] * 16])  # 4 as full: 1, 0.75 of it are codes 4 and 3
    read = encoded("nvfp4:scale=4over6", x)[1]
    assert torch.equal(read, x)
    assert not torch.equal(encoded("nvfp4", x)[1], x)


@settings(max_examples=40)
@given(x=vectors())
def test_mxfp4_is_its_formula_and_gguf_reads_the_same(x):
    (codes, scales), read = encoded("mxfp4", x)
    for own, block in zip(
        read.unflatten(-1, (-1, 32)).flatten(0, 1).tolist(),
        x.unflatten(-1, (-1, 32)).flatten(0, 1).tolist(),
        strict=True,
    ):
        largest = max(map(abs, block))
        scale = 2.0 ** max(math.floor(math.log2(largest)) - 2, -127) if largest else 1.0
        assert own == [nearest(min(max(value / scale, -6.0), 6.0), POSITIVE) * scale for value in block]
    assert torch.equal(scales.view(torch.float8_e8m0fnu).double(), 2.0 ** (scales.double() - 127))
    nibbles = unpack(codes, 4).unflatten(-1, (-1, 2, 16))  # ggml's order in a block
    blocks = torch.cat([scales[..., None], nibbles[..., 0, :] | nibbles[..., 1, :] << 4], -1).flatten(1)
    theirs = dequantize(blocks.numpy(), GGMLQuantizationType.MXFP4)
    assert torch.equal(torch.from_numpy(theirs), read)


@pytest.mark.parametrize(("text", "kind"), [("q8_0", GGMLQuantizationType.Q8_0), ("q4_0", GGMLQuantizationType.Q4_0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40)
@given(x=vectors())
def test_ggml_blocks_are_ggufs_own(text, kind, dtype, x):
    x = x.to(dtype)
    x[x.abs() < 1e-30] = 0  # whose inverse is infinite: gguf's codes are then of no meaning
    (codes, scales), read = encoded(text, x)
    theirs = quantize(x.float().numpy(), kind)
    size = 2 + (32 if text == "q8_0" else 16)
    blocks = torch.from_numpy(theirs).unflatten(-1, (-1, size))
    assert torch.equal(blocks[..., :2].contiguous().view(torch.float16), scales)
    assert torch.equal(blocks[..., 2:].flatten(1), codes.view(torch.uint8).flatten(1))
    assert torch.equal(torch.from_numpy(dequantize(theirs, kind)), read)


def test_codes_are_the_numbers_of_e2m1():
    """Sign, two bits of exponent with a bias of 1, one of mantissa."""
    for code, number in enumerate(E2M1):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        size = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
        assert (number, math.copysign(1, number)) == ((-1) ** sign * size, (-1) ** sign)
    every = torch.tensor(E2M1)
    assert torch.equal(to_e2m1(every), torch.arange(16, dtype=torch.uint8))
    assert torch.equal(from_e2m1(to_e2m1(every)), every)


EDGES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]


@given(value=st.sampled_from([sign * edge for edge in EDGES for sign in (1, -1)]) | st.floats(-8, 8, width=32))
def test_numbers_go_to_the_nearest_code_and_halves_to_the_even_one(value):
    assert float(from_e2m1(to_e2m1(torch.tensor([value])))) == nearest(value, POSITIVE)


@pytest.mark.parametrize(
    "text",
    ["nvfp4", "mxfp4", "q8_0", "q4_0", "q8_0:rotate=hadamard", "nvfp4:rotate=hadamard", "int8:rotate=hadamard",
     "int4:rotate=hadamard", "turboquant:bits=k4v4", "turboquant:bits=k4v2"],
)  # fmt: skip
def test_what_is_no_number_stays_none(text):
    x = torch.ones(1, 64)
    x[0, 5] = torch.nan
    assert encoded(text, x)[1].isnan().any()


@pytest.mark.parametrize("dim", [16, 64, 96, 128])
def test_the_rotation_is_orthonormal_and_its_own_inverse(dim):
    matrix = hadamard(torch.eye(dim).double())
    block = dim & -dim
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(dim), atol=1e-5, rtol=0)
    torch.testing.assert_close(matrix @ matrix, torch.eye(dim), atol=1e-5, rtol=0)
    kept = torch.block_diag(*[torch.ones(block, block)] * (dim // block)) / block**0.5
    torch.testing.assert_close(matrix.abs(), kept, atol=1e-6, rtol=0)


def matrix(dim):
    """The orthonormal Hadamard matrix, float64."""
    made = torch.ones(1, 1).double()
    while len(made) < dim:
        made = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), made) / 2**0.5
    return made


@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=30)
@given(x=vectors())
def test_rotated_integers_are_those_of_the_rotated_numbers(bits, x):
    """The formula's codes of numbers that float64 has rotated, and what is read is their code · scale + zero, turned
    back; float32 rotates 64 channels to a few millionths of a vector."""
    x[x.abs() < 1e-30] = 0  # so that float32 keeps all digits
    (codes, *rest), read = encoded(f"int{bits}:rotate=hadamard", x)
    off = 4e-7 * x.double().norm(dim=-1, keepdim=True)
    stored = unpack(codes, bits), *(part[:, 0] for part in rest)
    expected = naive.check_codes(x.double() @ matrix(64), bits, stored, off)
    assert ((read - expected @ matrix(64)).abs() <= 4e-7 * expected.norm(dim=-1, keepdim=True)).all()


@pytest.mark.parametrize("text", ["q8_0", "q4_0", "mxfp4", "nvfp4", "nvfp4:scale=4over6"])
@settings(max_examples=30)
@given(x=vectors())
def test_rotated_blocks_are_those_of_the_rotated_numbers(text, x):
    """Their own checks are above, and what is read is turned back."""
    rotated = f"{text}{',' if ':' in text else ':'}rotate=hadamard"
    (fields, read), (expected, turned) = encoded(rotated, x), encoded(text, hadamard(x))
    for mine, theirs in zip(fields, expected, strict=True):
        assert torch.equal(mine, theirs)
    back = turned.double() @ matrix(64)
    assert ((read - back).abs() <= 4e-7 * back.norm(dim=-1, keepdim=True)).all()


@pytest.mark.parametrize(("text", "times"), [("int4", 1.5), ("q4_0", 1.3), ("mxfp4", 1.2)])
def test_a_rotation_spreads_an_outlier(text, times):
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0))
    x[:, 7] = 30.0
    errors = [(encoded(name, x)[1] - x).norm() for name in (f"{text}:rotate=hadamard", text)]
    assert errors[0] < errors[1] / times


@pytest.mark.parametrize("text", ["nvfp4", "mxfp4", "q8_0", "q4_0"])
def test_a_head_dimension_that_blocks_do_not_divide_is_refused(text):
    with pytest.raises(UsageError, match=f"{text}: blocks of (16|32) channels do not divide the head dimension 72"):
        parse(text).codec.specs(replace(layer(), head_dim=72))


@pytest.mark.parametrize(
    "text",
    ["mxfp4", "q4_0", "turboquant:bits=k3v3", "turboquant:bits=k4v4,seed=1", "turboquant:bits=k4v2",
     "kvarn", "gear", "gear-l", "kivi:order=after"],
)  # fmt: skip
def test_the_reference_computes_and_says_why(text):
    cache = parse(text).cache(layer(), 1, 32)
    assert cache.backend.NAME == "reference"
    assert "cpu: no kernel for" in cache.refusal
