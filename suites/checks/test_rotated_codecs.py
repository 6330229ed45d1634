"""turboquant and kvarn against independent writings of their formulas in float64."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.integrate import quad
from scipy.stats import norm

from kvsuite.errors import UsageError
from kvsuite.kernels.hadamard import signs
from kvsuite.kernels.lloyd import levels
from kvsuite.kernels.quantize import unpack
from kvsuite.methods import parse
from suites.checks import naive
from suites.checks.table import layer
from suites.checks.test_codecs import encoded, matrix, vectors

MAX = {  # Max 1960, table I: the positive levels
    2: [0.4528, 1.510],
    3: [0.2451, 0.7560, 1.344, 2.152],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733],
}


@pytest.mark.parametrize("bits", MAX)
def test_levels_are_those_of_max_and_means_between_their_edges(bits):
    own = levels(bits)
    assert [-x for x in reversed(own)] == list(own)
    for level, published in zip(own[len(own) // 2 :], MAX[bits], strict=True):
        assert abs(level - published) <= 0.6 * 10 ** (math.floor(math.log10(published)) - 3)
    edges = [-12.0, *((a + b) / 2 for a, b in pairwise(own)), 12.0]
    for level, low, high in zip(own, edges, edges[1:], strict=False):
        mean = quad(lambda x: x * norm.pdf(x), low, high)[0] / quad(norm.pdf, low, high)[0]
        assert abs(level - mean) < 1e-7


def without_subnormals(x):
    """x, whose float32 arithmetic keeps all digits."""
    return torch.where(x.abs() < 1e-30, 0.0, x)


def turned(x, seed=0):
    """x (…, D), signs put on, in float64."""
    return x.double() * (signs(x.shape[-1], seed).double() if seed else 1.0) @ matrix(x.shape[-1])


def nearest_levels(y, bits):
    """Codes of float64 numbers, and how far each is from an edge between two."""
    own = torch.tensor(levels(bits)).double()
    codes = (y[..., None] - own).abs().argmin(-1)
    edges = (own[1:] + own[:-1]) / 2
    return codes, (y[..., None] - edges).abs().amin(-1)


def root_mean_square(x):
    return x.square().mean(-1, keepdim=True).sqrt()


def half(x):
    """As far as float16 may round x."""
    return x.abs() * 2.0**-10.9 + 2.0**-25


def known_codes(stored, y, bits):
    """The codes that were stored, checked but for numbers on an edge."""
    codes, room = nearest_levels(y, bits)
    assert ((codes == stored) | (room < 1e-5)).all()
    return torch.tensor(levels(bits)).double()[stored.long()]


@pytest.mark.parametrize(("text", "side", "bits", "seed"), [
    ("turboquant:bits=k4v4", 0, 4, 0), ("turboquant:bits=k4v4,seed=3", 0, 4, 3), ("turboquant:bits=k3v4", 0, 3, 0),
])  # fmt: skip
@settings(max_examples=40)
@given(x=vectors())
def test_vllms_keys_are_levels_brought_to_their_norm(text, side, bits, seed, x):
    x = without_subnormals(x)
    (codes, scale), read = encoded(text, x, side)
    y, size = turned(x, seed), root_mean_square(x.double())
    spread = torch.where(size == 0, 0.0, y / size)
    chosen = known_codes(unpack(codes, bits), spread, bits)
    expected = size / root_mean_square(chosen)
    assert ((scale.double() - expected).abs() <= half(expected)).all()
    back = turned(chosen * scale.double())
    back = back * (signs(64, seed).double() if seed else 1.0)
    assert ((read - back).abs() <= 1e-5 * size).all()


@settings(max_examples=40)
@given(x=vectors())
def test_lmdeploys_keys_have_a_sign_and_its_values_are_turned(x):
    x = without_subnormals(x)
    (codes, scale, left), read = encoded("turboquant:bits=k4v2", x)
    size, codes = root_mean_square(x.double()), unpack(codes, 4)
    spread = torch.where(size == 0, 0.0, turned(x) / size)
    chosen = known_codes(codes & 7, spread, 3)
    rest = spread - chosen
    assert (((rest >= 0) == (codes >> 3).bool()) | (rest.abs() < 1e-5)).all()
    assert ((scale.double() - size).abs() <= half(size)).all()
    assert ((left.double() - root_mean_square(rest)).abs() <= half(left) + 1e-6).all()
    sign = (codes >> 3).double() * 2 - 1
    assert ((read - turned((chosen + sign * left.double()) * scale.double())).abs() <= 1e-5 * size).all()

    (codes, scale), read = encoded("turboquant:bits=k4v2", x, 1)
    chosen = known_codes(unpack(codes, 2), spread, 2)
    assert ((scale.double() - size).abs() <= half(size)).all()
    assert ((read - turned(chosen * scale.double())).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize(("text", "bits"), [("turboquant:bits=k3v3", 3), ("turboquant:bits=k8v4", 4)])
@settings(max_examples=20)
@given(x=vectors())
def test_vllms_values_are_uniform_over_a_token(text, bits, x):
    x = without_subnormals(x)
    (codes, *rest), read = encoded(text, x, 1)
    expected = naive.check_codes(x.double(), bits, (unpack(codes, bits), *(part[:, 0] for part in rest)))
    assert torch.equal(read, expected.float())


def test_the_8_bit_keys_are_e4m3():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * 100
    assert torch.equal(encoded("turboquant:bits=k8v4", x)[1], x.clamp(-448, 448).to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(("bits", "distortion"), [(4, 0.009497), (3, 0.03454)])
def test_random_vectors_lose_what_max_says(bits, distortion):
    """Max 1960, table I: the mean squared error of N(0, 1)."""
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    read = encoded(f"turboquant:bits=k{bits}v{bits}", x)[1]
    lost = ((read - x).square().sum(-1) / x.square().sum(-1)).mean()
    assert 0.9 < lost / distortion < 1.02  # less, for a vector's own norm is kept


def test_signs_help_where_all_channels_have_something_in_common():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) + 10
    errors = [(encoded(text, x)[1] - x).norm() for text in ("turboquant:bits=k4v4,seed=3", "turboquant:bits=k4v4")]
    assert errors[0] < errors[1] / 2


def balanced(tile, rounds=8):
    """variance_normalize of vllm#46812 in float64: tile (R, C) to the scales of its columns (C,) and rows (R,)."""

    def imbalance(x):
        columns, rows = x.std(0), x.std(1)
        return columns.max() / columns.min().clamp(min=1e-8) + rows.max() / rows.min().clamp(min=1e-8)

    column, row = torch.zeros(tile.shape[1]).double(), torch.zeros(tile.shape[0]).double()
    best, found = imbalance(tile), (column.exp(), row.exp())
    for _ in range(rounds):
        now = tile / column.exp() / row.exp()[:, None]
        column = (column + now.std(0).clamp(1e-3, 1e3).log()).clamp(-0.3, 10)
        now = tile / column.exp() / row.exp()[:, None]
        row = (row + now.std(1).clamp(1e-3, 1e3).log()).clamp(-0.3, 10)
        now = tile / column.exp() / row.exp()[:, None]
        if imbalance(now) <= best:
            best, found = imbalance(now), (column.exp(), row.exp())
    return found


@pytest.mark.parametrize("side", [0, 1], ids=["K", "V"])
@pytest.mark.parametrize("kind", ["spread", "outlier", "unlike"])
def test_kvarn_is_its_formula(kind, side):
    """K's tile has channels as rows, V's has tokens; rows are then quantized with the row's scale taken in."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(side))
    if kind == "outlier":
        x[:, 5] = 1e4
    elif kind == "unlike":
        x = x * torch.linspace(0.1, 30, 32)[:, None] * torch.linspace(0.5, 4, 64)
    bits = (4, 2)[side]
    spec = parse("kvarn:bits=k4v2").codec.specs(layer())[side]
    fields = spec.encode(x[None, None], ())
    _, scale, zero, other = (field[0, 0].double() for field in fields)
    read = spec.decode(fields, torch.float32, ())[0, 0].double()

    tile = turned(x).T if side == 0 else turned(x)
    column, row = balanced(tile)
    assert ((other.flatten() - column).abs() <= 2e-3 * column).all()
    even = tile / other.flatten() / row[:, None]
    low, high = even.amin(1, keepdim=True), even.amax(1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    absorbed = (step.flatten() * row, low.flatten() * row)
    room = (high - low + low.abs()).flatten() * row * 2.0**-9
    assert ((scale.flatten() - absorbed[0]).abs() <= room / (2**bits - 1) + 1e-6).all()
    assert ((zero.flatten() - absorbed[1]).abs() <= room + 1e-6).all()
    codes = unpack(fields[0][0, 0], bits)
    stored = [part.T if side == 0 else part for part in (codes, scale, zero)]
    expected = naive.check_codes(tile / other.flatten(), bits, stored, 1e-6 * float(tile.norm() / other.min()))
    back = expected * other.flatten()
    back = back.T if side == 0 else back
    assert ((read - turned(back)).abs() <= 1e-6 * back.norm(dim=-1, keepdim=True)).all()


def test_kvarn_makes_tokens_alike_that_are_not():
    """Tokens of unlike size share a key channel's scale: 4-bit KIVI loses the small ones."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 32)[:, None]
    errors = []
    for text in ("kvarn:bits=k4v2", "kivi:bits=4"):
        spec = parse(text).codec.specs(layer())[0]
        read = spec.decode(spec.encode(x[None, None], ()), torch.float32, ())[0, 0]
        errors.append(((read - x).norm(dim=-1) / x.norm(dim=-1)).mean())
    assert errors[0] < errors[1] / 3


@pytest.mark.parametrize("text", ["turboquant:bits=k3v3", "kvarn:bits=k4v2"])
def test_a_head_dimension_that_8_does_not_divide_is_refused(text):
    with pytest.raises(UsageError, match="8 does not divide the head dimension 20"):
        parse(text).codec.specs(replace(layer(), head_dim=20))


def test_keys_that_are_not_turned_have_no_signs():
    with pytest.raises(UsageError, match="keys of bits=k8v4 are not turned; leave seed out"):
        parse("turboquant:bits=k8v4,seed=1")


def by_trapezoids(bits, rounds=200):
    """Levels as vllm's turboquant/centroids.py finds them: 200 trapezoids between edges, with ±10.5 at the ends."""
    own = np.linspace(-3.5, 3.5, 2 * 2**bits + 1)[1::2]
    for _ in range(rounds):
        edges = np.concatenate([[-10.5], (own[1:] + own[:-1]) / 2, [10.5]])
        x = np.linspace(edges[:-1], edges[1:], 201)
        own = np.trapezoid(x * norm.pdf(x), x, axis=0) / np.trapezoid(norm.pdf(x), x, axis=0)
    return own


@pytest.mark.parametrize(("bits", "furthest"), [(3, 0.0017), (4, 0.0017)])
def test_vllms_levels_are_the_same_but_for_its_integration(bits, furthest):
    assert np.abs(by_trapezoids(bits) - levels(bits)).max() < furthest


def test_lmdeploys_levels_are_the_same():
    """The positive ones of its turbo_quant.py."""
    for bits, theirs in ((2, [0.4527808, 1.5104176]), (3, [0.2450942, 0.7560052, 1.3439093, 2.1519456])):
        assert np.abs(np.array(levels(bits)[2 ** (bits - 1) :]) - theirs).max() < 1e-6
