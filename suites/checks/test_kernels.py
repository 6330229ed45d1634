"""The reference kernels of attention, of its mass and of RoPE against dense float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from kvsuite.kernels.reference.attention import (
    attention,
    causal_blocks,
    causal_mask,
    causal_self_attention,
    pack_sinks,
    probabilities,
)
from kvsuite.kernels.reference.mass import column_mass
from kvsuite.kernels.rope import Rope
from suites.checks import naive
from suites.checks.table import DIM, HEADS, KV_HEADS, SCALE, tokens

GROUP = HEADS // KV_HEADS
SINKS = torch.tensor([-1.0, 0.5, 2.0, 4.0])
ASKED = [
    {},
    {"window": 7},
    {"window": 1},
    {"window": 48},
    {"softcap": 1.5},
    {"sink_logits": SINKS},
    {"window": 20, "softcap": 3.0, "sink_logits": SINKS},
]


def dense(q, k, window=None, softcap=None, sink_logits=None):
    """A prompt's attention weights on itself, (T, T) for each head."""
    allowed = naive.causal(*[torch.arange(q.shape[1])] * 2, window)
    sinks = [None] * HEADS if sink_logits is None else sink_logits.tolist()
    return [naive.weights(q[h], k[h // GROUP], SCALE, allowed, softcap, sinks[h]) for h in range(HEADS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block", [16, 512])
@pytest.mark.parametrize("length", [1, 16, 50])
@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: "+".join(asked) + str(asked.get("window", "")))
def test_a_prompts_attention_over_itself_is_dense_attention(asked, length, block, dtype):
    q, k, v = tokens(length, length, dtype)
    actual = causal_self_attention(q, k, v, SCALE, block=block, **asked)
    assert actual.dtype == dtype
    for head, p in enumerate(dense(q, k, **asked)):
        g = head // GROUP
        assert ((actual[head] - p @ v[g].double()).abs() <= naive.rounding(q[head], k[g], v[g], SCALE, p)).all()


@pytest.mark.parametrize("window", [None, 50, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_self_attention_is_the_very_call_of_transformers(dtype, window):
    q, k, v = tokens(50, 0, dtype)
    theirs = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=SCALE, enable_gqa=True)
    assert torch.equal(causal_self_attention(q, k, v, SCALE, window), theirs[0])


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("length", [1, 33, 50])
@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: "+".join(asked) + str(asked.get("window", "")))
def test_column_mass_is_the_column_sum_of_dense_causal_softmax(asked, length, block):
    q, k, _ = tokens(length, length, torch.float32)
    mass = column_mass(q, k, SCALE, block=block, **asked)
    assert mass.dtype == torch.float32
    weights, each = dense(q, k, **asked), torch.eye(length)
    for g in range(KV_HEADS):
        heads = range(g * GROUP, (g + 1) * GROUP)
        expected = sum(weights[head] for head in heads).sum(0) / GROUP
        bound = sum(naive.rounding(q[head], k[g], each, SCALE, weights[head]) for head in heads).sum(0) / GROUP
        assert ((mass[g] - expected).abs() <= bound).all()
    if "sink_logits" in asked:
        assert (mass.sum(-1) < length).all()
    else:
        torch.testing.assert_close(mass.sum(-1), torch.full((KV_HEADS,), float(length)))


def test_column_mass_reads_half_precision_as_it_is():
    q, k, _ = tokens(40, 1, torch.bfloat16)
    assert torch.equal(column_mass(q, k, SCALE), column_mass(q.float(), k.float(), SCALE))


@given(seed=st.integers(0, 999), length=st.integers(1, 40), softcap=st.sampled_from([None, 2.0]), data=st.data())
def test_weights_sum_to_one_or_leave_the_rest_to_the_sink(seed, length, softcap, data):
    q, k, v = tokens(length, seed, torch.float32)
    rows = q[:, -1].view(KV_HEADS, GROUP, DIM)
    readable = data.draw(st.lists(st.booleans(), min_size=length, max_size=length).filter(any))
    mask = torch.tensor(readable).expand(KV_HEADS, GROUP, length)
    p = probabilities(rows, k, SCALE, mask, softcap)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.sum(-1), torch.ones(KV_HEADS, GROUP))
    assert (p[~mask] == 0).all()
    sinks = SINKS.view(KV_HEADS, GROUP)
    part = probabilities(rows, k, SCALE, mask, softcap, sinks)
    out = attention(rows, k, v, SCALE, mask, softcap, sinks)
    for head in range(HEADS):
        g, allowed, i = head // GROUP, torch.tensor([readable]), head % GROUP
        exact = naive.weights(rows[g, i][None], k[g], SCALE, allowed, softcap, float(SINKS[head]))
        for found, value in ((part, torch.eye(length)), (out, v[g])):
            bound = naive.rounding(rows[g, i][None], k[g], value, SCALE, exact)
            assert ((found[g, i] - exact @ value.double()).abs() <= bound).all()


@given(
    queries=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    keys=st.lists(st.integers(-1, 30), min_size=1, max_size=12),
    window=st.sampled_from([None, 1, 5, 31]),
)
def test_causal_mask_reads_what_is_earlier_present_and_in_the_window(queries, keys, window):
    queries, keys = torch.tensor(queries), torch.tensor(keys)
    expected = naive.causal(queries, keys, window) & (keys >= 0)
    assert torch.equal(causal_mask(queries, keys.expand(2, -1), window), expected.expand(2, -1, -1))


@given(length=st.integers(1, 60), window=st.sampled_from([None, 1, 8, 100]), block=st.integers(1, 64))
def test_blocks_of_a_prompt_cover_its_causal_mask_once(length, window, block):
    where = torch.arange(length)
    covered = torch.zeros(length, length, dtype=torch.int)
    for first, last, lowest, mask in causal_blocks(length, window, block, torch.device("cpu")):
        assert last - first <= block
        masked = last - mask.shape[1]
        covered[first:last, lowest:masked] += 1
        covered[first:last, masked:last] += mask.int()
    assert torch.equal(covered, naive.causal(where, where, window).int())


def test_sinks_are_packed_in_the_order_of_a_query_group():
    head_of_row = torch.arange(HEADS).view(HEADS, 1).expand(HEADS, 3).reshape(KV_HEADS, GROUP * 3)
    assert torch.equal(pack_sinks(SINKS, KV_HEADS, 3), SINKS[head_of_row])


@pytest.mark.parametrize("rotary", [DIM, DIM // 2])
@given(position=st.integers(0, 2000), by=st.integers(-2000, 2000), seed=st.integers(0, 999))
def test_rotating_on_is_rotating_to_the_sum(rotary, position, by, seed):
    frequency = 1e4 ** (-torch.arange(0, rotary, 2) / rotary)
    key = torch.randn(3, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plane = torch.complex(key[:, : rotary // 2], key[:, rotary // 2 : rotary])

    def at(where):
        turned = plane * torch.polar(torch.ones(rotary // 2).double(), where * frequency.double())
        return torch.cat([turned.real, turned.imag, key[:, rotary:]], dim=-1)

    start = at(position).float()
    turned = Rope(frequency).rotate(start, by)
    size = plane.abs().repeat(1, 2)
    single = torch.finfo(torch.float32).eps / 2
    angle = abs(by) * single  # the product's rounding, of frequencies up to 1
    assert ((turned - at(position + by))[:, :rotary].abs() <= size * (angle + 6 * single)).all()
    assert torch.equal(turned[:, rotary:], start[:, rotary:])
    assert Rope(frequency).rotate(start.bfloat16(), by).dtype == torch.bfloat16
