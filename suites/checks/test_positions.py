"""StreamingLLM's positions=cache: keys stand where the cache has them, by one rotation from what the model gave."""

import pytest
import torch

from kvsuite.errors import UsageError
from kvsuite.methods import parse
from suites.checks import naive
from suites.checks.table import DIM, HEADS, KV_HEADS, SCALE, context, layer, loaded, plain, tokens

PROMPT, STEPS, SINKS = 40, 300, 4
GROUP = HEADS // KV_HEADS
FREQUENCY = layer().rope.inverse_frequency.double()
SINGLE = torch.finfo(torch.float32).eps / 2


def turned(x, positions):
    """x (..., n, DIM) before RoPE, each at its position, float64."""
    plane = torch.complex(x[..., : DIM // 2].double(), x[..., DIM // 2 :].double())
    angle = torch.as_tensor(positions, dtype=torch.float64)[:, None] * FREQUENCY
    plane = plane * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([plane.real, plane.imag], dim=-1)


def streamed(method, dtype, steps=STEPS, prompt=PROMPT):
    """A conversation's q and k before RoPE (float32) and its v, and, step by step, the cache that was fed with them
    rotated to where the text has them, and the output."""
    total = prompt + steps
    q, k, v = tokens(total, 7, torch.float32)
    v = v.to(dtype)
    where = torch.arange(total)
    rotated_q, rotated_k = turned(q, where).to(dtype), turned(k, where).to(dtype)
    cache = loaded(method, [plain(rotated_k[:, :prompt], v[:, :prompt])], steps, dtype)
    for n in range(prompt, total):
        cache.append(rotated_k[None, :, n : n + 1], v[None, :, n : n + 1])
        held = cache.read()
        yield q, k, v, n, held, cache.attend(rotated_q[None, :, n : n + 1], SCALE)[0]


def in_cache(q, k, v, n, head, budget):
    """Attention of query n over sinks and window, every key before RoPE turned to its index in the cache, all in
    float64: the output, the weights, and the keys and values."""
    kept = [*range(SINKS), *range(n - (budget - SINKS), n + 1)] if n >= budget else list(range(n + 1))
    keys = turned(k[head // GROUP, kept], torch.arange(len(kept)))
    p = naive.weights(turned(q[head, n : n + 1], [len(kept) - 1]), keys, SCALE)
    values = v[head // GROUP, kept].double()
    return p @ values, p, keys, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_is_that_of_keys_rotated_from_scratch(dtype):
    unit = torch.finfo(dtype).eps / 2
    for q, k, v, n, _, out in streamed(parse("streaming-llm:budget=24"), dtype):
        for head in range(HEADS):
            expected, p, keys, values = in_cache(q, k, v, n, head, 24)
            length = float(q[head, n].double().norm() * keys.norm(dim=-1).max()) * SCALE
            score = length * (3 * unit + 2 * n * SINGLE)  # q and k rounded, sinks once more, and their angle's rounding
            bound = naive.rounding(q[head, n : n + 1].to(dtype), keys, values, SCALE, p)
            assert ((out[head] - expected).abs() <= bound + 2 * score * (p @ values.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sink_after_300_steps_is_one_rotation_from_its_original(dtype):
    unit = torch.finfo(dtype).eps / 2
    *_, (_, k, _, n, held, _) = streamed(parse("streaming-llm:budget=24"), dtype)
    gap = n + 1 - 25
    for g, own in enumerate(held):
        assert own.positions[:SINKS].tolist() == list(range(SINKS))
        original = turned(k[g, :SINKS], torch.arange(SINKS)).to(dtype)
        expected = turned(original, torch.full((SINKS,), gap))
        size = original.double().unflatten(-1, (2, -1)).norm(dim=-2).repeat(1, 2)
        error = (own.k[:SINKS].double() - expected).abs()
        assert (error <= expected.abs() * unit + size * (gap * SINGLE + 6 * SINGLE)).all()


def test_only_sinks_move():
    for _, k, v, n, held, _ in streamed(parse("streaming-llm:budget=24"), torch.bfloat16, steps=30):
        for g, own in enumerate(held):
            where = own.positions.long()
            assert torch.equal(own.k[SINKS:], turned(k[g], torch.arange(k.shape[1])).bfloat16()[where[SINKS:]])
            assert torch.equal(own.v, v[g, where])
            assert where[-1] == n


@pytest.mark.parametrize("prompt", [1, 3, 10, 24])
def test_short_prompts_move_nothing_before_something_is_given_up(prompt):
    for q, k, v, n, held, out in streamed(parse("streaming-llm:budget=24"), torch.float32, 40, prompt):
        for g, own in enumerate(held):
            if n < 24:
                assert torch.equal(own.k, turned(k[g, : n + 1], torch.arange(n + 1)).float())
        for head in range(HEADS):
            assert (out[head] - in_cache(q, k, v, n, head, 24)[0]).abs().max() < 1e-4


@pytest.mark.parametrize("budget", [24, 31, 36])
@pytest.mark.parametrize("bits", [2, 4])
def test_a_quantized_sink_is_turned_with_its_own_error(bits, budget):
    """A rotation keeps lengths: pair by pair a sink stays as far from the truth as its stored original."""
    method = parse(f"streaming-llm:budget={budget} + kivi:bits={bits},group=16,residual=32")
    kept = torch.tensor([*range(SINKS), *range(PROMPT - budget + SINKS, PROMPT)])[:16]  # quantized with the sinks
    for _, k, _, n, held, _ in streamed(method, torch.float32, steps=60):
        for g, own in enumerate(held):
            group = turned(k[g, kept], kept)
            largest = group.abs().amax(0)
            step = (group.amax(0) - group.amin(0) + largest * 2.0**-10) / (2**bits - 1) * (1 + 2.0**-10)
            pair = (step / 2).unflatten(-1, (2, -1)).norm(dim=0).repeat(2)
            wanted = turned(k[g, :SINKS], torch.arange(SINKS) + n + 1 - len(own.positions))
            rounding = largest.max() * (n + 8) * SINGLE
            assert ((own.k[:SINKS] - wanted).abs() <= pair + rounding).all()


def test_absolute_positions_move_nothing():
    method = parse("streaming-llm:budget=24,positions=absolute")
    for _, k, _, _, held, _ in streamed(method, torch.bfloat16, steps=40):
        for g, own in enumerate(held):
            rotated = turned(k[g], torch.arange(k.shape[1])).bfloat16()
            assert torch.equal(own.k, rotated[own.positions.long()])


def test_a_model_whose_keys_cannot_be_moved_is_refused():
    without = type(layer())(0, HEADS, KV_HEADS, DIM, torch.bfloat16, torch.bfloat16, torch.device("cpu"))
    with pytest.raises(UsageError, match="positions=absolute"):
        parse("streaming-llm:budget=24").cache(without, 1, 40)
    for text in ("streaming-llm:budget=24,positions=absolute", "streaming-llm:budget=24,sinks=0", "h2o:budget=16"):
        parse(text).compress(0, [context(30, 0)], [parse(text).cache(without, 1, 40)])
