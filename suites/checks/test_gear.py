"""gear and gear-l against an independent writing in float64, and against the authors' own power iteration."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.errors import UsageError
from kvsuite.kernels.quantize import unpack
from kvsuite.methods import parse
from kvsuite.methods.codecs.gear_l import row_space
from suites.checks import naive
from suites.checks.table import DIM, KV_HEADS, layer, loaded, plain, tokens

SIDES = ["K", "V"]


def coded(text, side, x):
    """One head's x (T, head_dim), T whole pages: what is read of it, and the stored fields with T units or pages."""
    spec = parse(text).codec.specs(layer())[side]
    fitted = spec.fit(x[None], None)
    fields = spec.encode(x[None].unflatten(1, (-1, spec.block)), fitted)
    return spec.decode(fields, torch.float32, fitted).flatten(1, 2)[0], [field[0] for field in fields], fitted[0][0]


def kinds(seed):
    """(64, DIM) bfloat16: K with channels of unlike size, outliers of 1e4, a constant channel, zeros."""
    noise = torch.Generator().manual_seed(seed)
    x = torch.randn(64, DIM, generator=noise) * torch.linspace(0.2, 4, DIM)
    x[torch.randint(64, (3,), generator=noise), torch.randint(DIM, (3,), generator=noise)] = 1e4
    x[:, 3], x[:, 7] = 5.0, 0.0
    return x.bfloat16()


def vectors_of(x, side):
    """x (T, head_dim) as what is quantized together: (…, n)."""
    return x.unflatten(0, (-1, 32)).transpose(1, 2) if side == 0 else x


@pytest.mark.parametrize("side", [0, 1], ids=SIDES)
@settings(max_examples=15)
@given(seed=st.integers(0, 999))
def test_the_ends_of_every_vector_are_exact(side, seed):
    x = kinds(seed)
    read = vectors_of(coded("gear:bits=2,residual=32", side, x)[0], side)
    own = vectors_of(x.float(), side)
    for end in (own.amax(-1, keepdim=True), own.amin(-1, keepdim=True)):
        at_end = own == end
        assert ((read == own) & at_end).any(-1).all(), "one of those that are as far out is exact"


@pytest.mark.parametrize("side", [0, 1], ids=SIDES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@settings(max_examples=15)
@given(seed=st.integers(0, 999))
def test_what_is_not_corrected_is_the_formulas_codes_of_the_range_without_outliers(bits, side, seed):
    """S are the lowest and the highest of a vector, as they were; Q has the others, S put to their ends."""
    x = kinds(seed)
    spec = parse(f"gear:bits={bits},residual=32").codec.specs(layer())[side]
    none = (torch.zeros(1, DIM, spec.rank, dtype=torch.float16),)
    fields = spec.encode(x[None].unflatten(1, (-1, spec.block)), none)
    read = vectors_of(spec.decode(fields, torch.float32, none).flatten(1, 2)[0].double(), side)
    codes, scale, zero, exact, places, left = (field[0] for field in fields)
    assert not left.any()
    own = vectors_of(x.double(), side)
    in_order, places = own.sort(-1).values, places.view(*own.shape[:-1], 2).long()
    assert torch.equal(exact.view(places.shape).double(), in_order[..., [0, -1]])
    assert torch.equal(own.gather(-1, places), in_order[..., [0, -1]])
    numbers = own.clamp(in_order[..., 1, None], in_order[..., -2, None]).unflatten(-1, (-1, spec.group))
    stored = unpack(codes, bits).view(numbers.shape), *(z.view(*numbers.shape[:-1], 1) for z in (scale, zero))
    expected = naive.check_codes(numbers, bits, stored).float().double().flatten(-2)
    assert torch.equal(read, expected.scatter(-1, places, in_order[..., [0, -1]]))


def authors(error, rank, start):
    """fake_poweriteration_group of opengear-project/GEAR, float64, for one head: the error ≈ q pᵀ."""
    p = start.clone()
    for i in range(3):
        if i == 2:
            p = torch.linalg.qr(p).Q
        q = error @ p
        if i == 2:
            q = torch.linalg.qr(q).Q
        p = error.T @ q
    return q, p


@pytest.mark.parametrize("side", [0, 1], ids=SIDES)
@pytest.mark.parametrize("text", ["gear:bits=2,residual=32", "gear-l:bits=2,residual=32,rank=2"])
@settings(max_examples=10)
@given(seed=st.integers(0, 999))
def test_the_correction_leaves_no_more_than_the_authors_and_no_less_than_is_possible(text, side, seed):
    x = kinds(seed)
    spec = parse(text).codec.specs(layer())[side]
    none = (torch.zeros(1, DIM, spec.rank, dtype=torch.float16),)
    quantized = spec.decode(spec.encode(x[None].unflatten(1, (-1, spec.block)), none), torch.float32, none)
    error = x.double() - quantized.flatten(1, 2)[0].double()
    basis = row_space(error, spec.rank)
    assert torch.allclose(basis.T @ basis, torch.eye(spec.rank).double(), atol=1e-9)
    start = torch.rand(DIM, spec.rank, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, p = authors(error, spec.rank, start)
    left, theirs = (error - error @ basis @ basis.T).norm(), (error - q @ p.T).norm()
    rows = torch.linalg.qr(p).Q
    assert torch.allclose(basis @ basis.T, rows @ rows.T, atol=1e-6), "theirs, orthonormal on the other side"
    least = torch.linalg.svdvals(error)[spec.rank :].norm()
    assert least * (1 - 1e-9) <= left <= theirs * (1 + 1e-9)

    read, fields, stored = coded(text, side, x)
    assert ((stored.double() - basis).abs() <= 2.0**-11).all()
    exact = error @ stored.double()
    rounded = 2.0**-11 * exact.abs() + 2.0**-25 + 1e-6 * error.norm(dim=-1, keepdim=True)
    assert ((fields[-1].flatten(0, 1).double() - exact).abs() <= rounded).all()
    corrected = fields[-1].flatten(0, 1).double() @ stored.double().T
    assert ((corrected - error @ basis @ basis.T).norm() <= 2e-3 * error.norm()).all()
    expected = quantized.flatten(1, 2)[0].double() + corrected
    differs = (read.double() - expected).abs() > 1e-5 * (1 + expected.abs())
    exact = read.double() == x.double()
    assert (exact | ~differs).all(), "only outliers are as they were instead"


@pytest.mark.parametrize("text", ["gear:bits=2,residual=32", "gear-l:bits=2,residual=32"])
def test_an_error_in_low_rank_is_corrected(text):
    """Values that are alike but for their size leave errors that are alike."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(DIM, generator=noise) * (1 + torch.rand(256, 1, generator=noise) / 50)
    read = coded(text, 1, x)[0]
    spec = parse(text).codec.specs(layer())[1]
    none = (torch.zeros(1, DIM, spec.rank, dtype=torch.float16),)
    quantized = spec.decode(spec.encode(x[None, :, None], none), torch.float32, none)[0, :, 0]
    assert (read - x).norm() < (quantized - x).norm() / 2


@pytest.mark.parametrize("length", [1, 31, 32, 33, 95])
def test_what_a_prompt_of_any_length_teaches_is_used_for_what_follows(length):
    _, k, v = tokens(length + 64, 0)
    cache = loaded(parse("gear:bits=4,residual=32"), [plain(k[:, :length], v[:, :length])], 64)
    for i in range(length, length + 64):
        cache.append(k[None, :, i : i + 1], v[None, :, i : i + 1])
    for own, given_k, given_v in zip(cache.read(), k, v, strict=True):
        assert (own.k.float() - given_k.float()).norm() <= 0.08 * given_k.float().norm()
        assert (own.v.float() - given_v.float()).norm() <= 0.08 * given_v.float().norm()
    assert cache.kept(0) == KV_HEADS * (length + 64)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("gear:outliers=0.5", "outliers=0.5 must be a share above 0 and below 0.5"),
        ("gear:rank=0", "rank=0 must be a whole number above 0 or a share"),
        ("gear-l:rank=2.5", "rank=2.5 must be a whole number"),
        ("gear-l:residual=48", "residual=48 must be a multiple of 32"),
        ("gear-l:outliers=0.1", "unknown parameter of gear-l 'outliers'"),
    ],
)
def test_what_is_wrong_is_said(text, sentence):
    with pytest.raises(UsageError, match=sentence):
        parse(text)


@pytest.mark.parametrize("text", ["gear:rank=40", "gear:group=16"])
def test_what_does_not_fit_the_layer_is_said(text):
    with pytest.raises(UsageError, match=r"above the head dimension|does not divide"):
        parse(text).codec.specs(replace(layer(), head_dim=32 if "rank" in text else 40))
