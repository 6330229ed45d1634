"""The control's noise: half an ulp on average, either way, of a vector's own making."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvsuite.kernels.cpu import noise as native
from kvsuite.kernels.noise import FINER, content_hash, half_ulp, top, ulp
from kvsuite.methods import parse
from suites.checks.table import loaded, plain, tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
N = 512 * 64


def sample(dtype, seed=0, dim=64):
    return torch.randn(N // dim, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def moves(x, y):
    """By how many ulp of bfloat16 each element went away from zero (negative: towards it)."""
    whole = torch.int32 if x.dtype == torch.float32 else torch.int16
    assert y.dtype == x.dtype
    assert torch.equal(x.signbit(), y.signbit())
    finer = y.abs().view(whole).long() - x.abs().view(whole).long()
    assert not (finer % (1 << FINER[x.dtype])).any()
    return finer >> FINER[x.dtype]


def chance(share):
    """Five standard deviations of a count out of N."""
    return 5 * (share * (1 - share) / N) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_half_of_the_elements_move_one_ulp_as_many_up_as_down(dtype, seed):
    move = moves(sample(dtype), half_ulp(sample(dtype), seed)).double()
    assert set(move.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert abs((move != 0).double().mean() - 0.5) < chance(0.5)
    assert abs((move > 0).double().mean() - 0.25) < chance(0.25)
    assert abs((move < 0).double().mean() - 0.25) < chance(0.25)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_channel_and_no_sign_is_favoured(dtype):
    x = sample(dtype)
    move = moves(x, half_ulp(x, 3)).double()
    rows = x.shape[0]
    per_channel = (0.5 / rows) ** 0.5  # a move has variance 1/2
    assert (move.mean(0).abs() < 5 * per_channel).all()
    assert ((move != 0).double().mean(0) - 0.5).abs().max() < 5 * (0.25 / rows) ** 0.5
    raised = move * x.sign()  # up and down on the number line
    assert abs(raised.mean()) < 5 * (0.5 / N) ** 0.5


@pytest.mark.parametrize("other", [1, 2, 3, 1_000_003])
def test_moves_of_channels_and_seeds_are_unrelated(other):
    x = sample(torch.float32, dim=128)
    move = moves(x, half_ulp(x, 0)).double()
    pairs = {
        "seeds": (move, moves(x, half_ulp(x, other)).double()),
        "neighbours": (move[:, :-other], move[:, other:]) if other < 128 else (move, move.flip(0)),
        "words": (move[:, :32], move[:, 32 * min(other, 3) :][:, :32]),
    }
    for name, (one, two) in pairs.items():
        deviation = 0.5 / one.numel() ** 0.5  # of a mean of products of two moves of variance 1/2
        assert abs((one * two).mean()) < 5 * deviation, name


@given(seed=st.integers(0, 2**40), data=st.data())
def test_noise_depends_on_a_vector_alone(seed, data):
    x = sample(torch.bfloat16, seed % 7)[:12]
    order = data.draw(st.permutations(range(12)))
    whole = half_ulp(x, seed)
    assert torch.equal(half_ulp(x, seed), whole)
    assert torch.equal(half_ulp(x[order], seed), whole[order])
    assert torch.equal(half_ulp(x[:, None, None], seed).flatten(0, 2), whole)
    assert torch.equal(torch.cat([half_ulp(row[None], seed) for row in x]), whole)


def mixed(z):
    """splitmix64's finalizer on Python's whole numbers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 2**40), row=st.integers(0, 99))
def test_noise_is_the_same_on_every_machine(dtype, seed, row):
    """Drawn here in Python's arithmetic: the hash, and from it two bits for each channel."""
    golden, x = 0x9E3779B97F4A7C15, sample(dtype)[row]
    bits = x.view(torch.int32 if dtype == torch.float32 else torch.int16).tolist()
    summed = sum(mixed((i * golden + seed) % 2**64) * (b + 1) for i, b in enumerate(bits, start=1))
    own = mixed(summed % 2**64)
    assert int(content_hash(x, seed)) % 2**64 == own
    draws = [mixed((own + i // 32 * golden) % 2**64) >> (2 * (i % 32)) & 3 for i in range(64)]
    assert moves(x, half_ulp(x, seed)).tolist() == [(draw == 3) - (draw == 0) for draw in draws]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bit_anywhere_draws_all_anew(dtype):
    x = sample(dtype)[:1].repeat(64, 1)
    whole = torch.int32 if dtype == torch.float32 else torch.int16
    x[torch.arange(64), torch.arange(64)] = (x.diagonal().view(whole) ^ 1).view(dtype)
    assert len(content_hash(x, 0).unique()) == 64
    assert len(content_hash(torch.stack([x[0], x[0].flip(0), x[0].roll(1)]), 0).unique()) == 3
    assert len(moves(x, half_ulp(x, 0)).unique(dim=0)) == 64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_the_ends_of_the_range_stay(dtype):
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps  # the smallest subnormal
    edge = torch.tensor([0.0, -0.0, tiny, -tiny, info.max, info.min, torch.inf, -torch.inf], dtype=dtype)
    x = torch.cat([edge.repeat(200, 1), sample(dtype)[:200, :8]], dim=1)
    y = half_ulp(x, 5)
    assert torch.equal(y[:, :8], x[:, :8])
    assert torch.equal(y[:, :8].signbit(), x[:, :8].signbit())
    assert not torch.equal(y[:, 8:], x[:, 8:])


def test_the_codec_moves_k_and_v_and_layers_and_seeds_apart():
    _, k, _ = tokens(64, 0)
    found = []
    for seed in range(3):
        for index in range(3):
            cache = loaded(parse(f"jitter:seed={seed}"), [plain(k, k, index=index)], 0, index=index)
            for side in ("k", "v"):
                move = moves(k, torch.stack([getattr(held, side) for held in cache.read()]))
                assert set(move.unique().tolist()) == {-1, 0, 1}
                found.append(move)
    assert len(torch.stack(found).unique(dim=0)) == 18
    again = loaded(parse("jitter:seed=2"), [plain(k, k, index=2)], 0, index=2)
    assert torch.equal(moves(k, torch.stack([held.k for held in again.read()])), found[-2])


@pytest.mark.parametrize("dtype", list(FINER), ids=str)
@pytest.mark.parametrize("dim", [1, 31, 32, 64, 80, 256])
def test_the_cpu_makes_the_same_noise(dtype, dim):
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    ends = torch.iinfo(bits)
    dice = torch.Generator().manual_seed(dim)
    drawn = torch.randint(ends.min, ends.max, (20, dim), generator=dice, dtype=bits)  # every kind of number
    one, largest = ulp(dtype), top(dtype)
    edges = torch.tensor(
        [0, 1, ends.max, ends.min, one, one + 1, largest, largest - one, largest - one - 1], dtype=bits
    )
    x = torch.cat([drawn, edges[:, None].expand(-1, dim)]).view(dtype)
    for seed in (0, 7, 2_000_006, 2**62 + 3):
        assert torch.equal(native.half_ulp(x, seed).view(bits), half_ulp(x, seed).view(bits))
    apart = x[::2]
    assert torch.equal(native.half_ulp(apart, 1).view(bits), half_ulp(apart, 1).view(bits))
    assert native.half_ulp(x[:0], 1).shape == (0, dim)
