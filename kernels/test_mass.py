"""The fused attention mass against dense float64, within what float32 arithmetic may be off by."""

import inspect
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.kernels.reference import mass as reference
from kvsuite.kernels.triton import mass as fused
from suites.checks import naive
from suites.checks.depth import depth

SINGLE = torch.finfo(torch.float32).eps / 2
EMPTY = torch.empty


FENCE = 4096


def poisoned(*shape, **kwargs):
    """A tensor of nan with nan before and behind it."""
    size = math.prod(shape)
    return EMPTY(size + 2 * FENCE, **kwargs).fill_(math.nan)[FENCE : FENCE + size].view(shape)


def run(function, *args, tiles=None, **kwargs):
    """Outputs start as nan; blocks of keys and queries are small enough for a short prompt to have several."""
    sizes = fused._tiles if tiles is None else lambda dim, itemsize: (*tiles, 4, 2)
    with mock.patch.object(torch, "empty", poisoned), mock.patch.object(fused, "_tiles", sizes):
        return function(*args, **kwargs).cpu()


def tokens(heads, length, dim, dtype, device, seed, rows_first):
    """(heads, length, dim) among nan; ``rows_first`` as models hold them, (length, heads, more) transposed."""
    wide = poisoned(length, heads, dim + 16, dtype=dtype, device=device).transpose(0, 1)[..., :dim]
    made = wide if rows_first else poisoned(heads, length, dim, dtype=dtype, device=device)
    return made.copy_(torch.randn(made.shape, generator=torch.Generator().manual_seed(seed)))


def dense(q, k, scale, window, softcap, sink_logits, last):
    """Per head, float64: the weights (queries, T) and the base-2 logarithm of their denominator (queries,)."""
    q, k = q.cpu().double(), k.cpu().double()
    heads, length, _ = q.shape
    start = 0 if last is None else max(0, length - last)
    queries, keys = torch.arange(start, length), torch.arange(length)
    allowed = naive.causal(queries, keys, window)
    for head in range(heads):
        mine, theirs = q[head, start:], k[head * k.shape[0] // heads]
        sink = None if sink_logits is None else float(sink_logits[head])
        weights = naive.weights(mine, theirs, scale, allowed, softcap, sink)
        own = scale * (mine * theirs[start:]).sum(
            -1
        )  # a query reads itself: its own weight is exp(score) / denominator
        own = own if softcap is None else softcap * torch.tanh(own / softcap)
        yield weights, (own - weights[queries - start, queries].log()) / math.log(2)


def slack(q, k, scale, softcap, sink_logits):
    """How far float32 may carry a natural-log score and log-sum-exp; in units of ``SINGLE``, for all queries.

    A dot product of D terms is off by 2 D units of the sum of their sizes (tensor cores cut where others round), the
    scale, its change of base and the product by one each. ``tanh = (1 - e) / (1 + e)``: e is off by 4 units (exp2 of a
    GPU: 2 ulp), which weigh at most double, both sums and the quotient (2 ulp) by 4, the cap and its product by 2.
    A log-sum-exp: each addend by an exp2 (4) and by the rounding of its exponent (the size of a score); each of up to
    T / 16 + 2 blocks rescales the sum (5) and adds to it; T additions; its log2 (4) and the sum with it.
    """
    length, dim = k.shape[1], k.shape[2]
    grouped = k.cpu().double().abs().repeat_interleave(q.shape[0] // k.shape[0], 0)
    size = scale * float((q.cpu().double().abs() @ grouped.mT).max())
    score = size * (2 * dim + 4)
    if softcap is not None:
        score, size = score + 16 * softcap, min(size, softcap)
    if sink_logits is not None:
        size = max(size, float(sink_logits.abs().max()))
    log = size + math.log(length + 1)
    return score, score + 2 * log + 6 * (length / 16 + 2) + length + 10, log


@st.composite
def problems(draw):
    length, group, kv_heads = draw(st.integers(1, 140)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    sinks = draw(st.none() | st.lists(st.floats(-3, 6, width=32), min_size=group * kv_heads, max_size=group * kv_heads))
    return {
        "heads": group * kv_heads,
        "kv_heads": kv_heads,
        "length": length,
        "dim": draw(st.sampled_from([64, 64, 64, 96, 128])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "seed": draw(st.integers(0, 999)),
        "rows_first": draw(st.booleans()),
        "tiles": draw(st.sampled_from([(32, 16), (16, 32), (32, 32)])),
        "window": draw(st.none() | st.integers(1, 40) | st.integers(1, length + 20)),
        "softcap": draw(st.sampled_from([None, None, 0.5, 3.0, 50.0])),
        "sink_logits": None if sinks is None else torch.tensor(sinks),
        "last": draw(st.none() | st.integers(1, 40) | st.integers(1, length + 20)),
    }


def check(device, heads, kv_heads, length, dim, dtype, seed, rows_first, tiles, **asked):
    q = tokens(heads, length, dim, dtype, device, seed, rows_first)
    k = tokens(kv_heads, length, dim, dtype, device, seed + 1, rows_first)
    scale, sinks = dim**-0.5, asked["sink_logits"]
    given_sinks = None if sinks is None else sinks.to(device)
    lse = run(fused.log_sum_exp, q, k, scale, tiles=tiles, **asked | {"sink_logits": given_sinks})
    mass = run(fused.column_mass, q, k, scale, tiles=tiles, **asked | {"sink_logits": given_sinks})
    queries = length if asked["last"] is None else min(length, asked["last"])
    assert lse.shape == (heads, queries)
    assert mass.shape == (kv_heads, length)
    assert lse.dtype == mass.dtype == torch.float32

    score_off, log_off, size = slack(q, k, scale, asked["softcap"], sinks)
    expected = torch.zeros(kv_heads, length, dtype=torch.float64)
    for head, (weights, logarithm) in enumerate(dense(q, k, scale, **asked)):
        assert ((lse[head] - logarithm).abs() <= log_off * SINGLE / math.log(2)).all()
        expected[head * kv_heads // heads] += weights.sum(0) * kv_heads / heads
    # a weight: its score, its log-sum-exp, their difference, its exp2; then sums over all queries of the group
    relative = (score_off + log_off + 2 * size + 4 + queries * heads / kv_heads + 2) * SINGLE
    assert ((mass - expected).abs() <= expected * relative + torch.finfo(torch.float32).tiny * queries).all()
    if sinks is None:
        assert ((mass.double().sum(-1) - queries).abs() <= relative * queries).all()


def test_mass_and_log_sum_exp_are_those_of_dense_attention(device):
    @settings(max_examples=depth(5, 100))
    @given(problem=problems())
    def examples(problem):
        check(device, **problem)

    examples()


@pytest.mark.parametrize(
    ("window", "dtype"),
    [(None, torch.float32), (150, torch.bfloat16), *depth([], [(None, torch.bfloat16), (150, torch.float32)])],
    ids=str,
)
def test_blocks_of_the_size_a_gpu_is_given(device, window, dtype):
    shape = {
        "heads": 4,
        "kv_heads": 2,
        "length": depth(200, 333),
        "dim": 64,
        "seed": 0,
        "rows_first": True,
        "tiles": None,
    }
    check(device, **shape, dtype=dtype, window=window, softcap=None, sink_logits=None, last=None)


def test_a_wide_head_and_its_last_queries(device):
    shape = {"heads": 3, "kv_heads": 1, "length": 130, "dim": 256, "seed": 0, "rows_first": True, "tiles": None}
    sinks = torch.tensor([0.0, 1.0, 9.0])
    check(device, **shape, dtype=torch.float16, window=100, softcap=20.0, sink_logits=sinks, last=70)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_scores_far_from_zero_stay_finite(device, softcap):
    """Scores of hundreds: exp overflows without the subtraction of a largest, exp(2 x) in tanh without |x|."""
    signs = torch.where(torch.arange(50) % 3 == 0, -1.0, 1.0)
    q = torch.full((1, 50, 64), 8.0, device=device)
    k = (8.0 * signs).to(device)[None, :, None].expand(1, 50, 64).contiguous()
    mass = run(fused.column_mass, q, k, 0.125, softcap=softcap, tiles=(16, 16))
    assert mass.isfinite().all()
    assert mass.sum() == pytest.approx(50, rel=1e-4)


def test_the_same_prompt_has_the_same_mass_and_few_last_queries_are_all_of_a_shorter_one(device):
    q = tokens(4, 100, 64, torch.float32, device, 0, True)
    k = tokens(2, 100, 64, torch.float32, device, 1, True)
    mass = run(fused.column_mass, q, k, 0.125, tiles=(32, 16))
    assert torch.equal(mass, run(fused.column_mass, q, k, 0.125, tiles=(32, 16)))
    assert torch.equal(mass, run(fused.column_mass, q, k, 0.125, tiles=(32, 16), last=500))
    none = run(fused.column_mass, q, k, 0.125, tiles=(32, 16), last=0)
    assert torch.equal(none, torch.zeros(2, 100))


@pytest.mark.parametrize("last", [None, 1, 30, 64, 90, 500])
@pytest.mark.parametrize("window", [None, 20])
def test_the_reference_counts_the_same_queries(device, window, last):
    q = tokens(4, 100, 64, torch.float32, device, 0, True)
    k = tokens(2, 100, 64, torch.float32, device, 1, True)
    asked = {"window": window, "softcap": 4.0, "sink_logits": torch.tensor([-1.0, 0.5, 2.0, 4.0]), "last": last}
    expected = torch.zeros(2, 100, dtype=torch.float64)
    for head, (weights, _) in enumerate(dense(q, k, 0.125, **asked)):
        expected[head // 2] += weights.sum(0) / 2
    score_off, log_off, size = slack(q, k, 0.125, asked["softcap"], asked["sink_logits"])
    relative = (score_off + log_off + 2 * size + 206) * SINGLE
    sinks = asked["sink_logits"].to(device)
    for block in (16, 64):
        mass = reference.column_mass(q, k, 0.125, **asked | {"sink_logits": sinks}, block=block).cpu()
        assert ((mass - expected).abs() <= expected * relative + torch.finfo(torch.float32).tiny * 100).all()


def test_rows_that_are_not_contiguous_are_refused(device):
    q = torch.zeros(1, 64, 8, device=device).mT
    with pytest.raises(ValueError, match="contiguous"):
        fused.column_mass(q, q, 1.0)


def test_the_fused_kernel_is_called_like_the_reference():
    ours, theirs = (inspect.signature(module.column_mass).parameters for module in (fused, reference))
    assert list(ours.values()) == [parameter for name, parameter in theirs.items() if name != "block"]
