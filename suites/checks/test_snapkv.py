"""SnapKV and Ada-KV against independent writings of kvpress's presses and the authors' code, and some cases by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from kvsuite.errors import UsageError
from kvsuite.methods import parse
from kvsuite.methods.budgets.ada import Ada
from suites.checks.table import DIM, HEADS, KV_HEADS, SCALE, context, loaded, tokens

GROUP = HEADS // KV_HEADS


def press(q, k, window, kernel, pool):
    """kvpress snapkv_press.py (0.5.5), with its average or the paper's maximum, written out in float64: (kv_heads,
    T)."""
    length = k.shape[1]
    keys = k.double().repeat_interleave(GROUP, 0)
    scores = q[:, -window:].double() @ keys.transpose(1, 2) / DIM**0.5
    scores = scores + torch.triu(torch.full_like(scores, -torch.inf), diagonal=length - window + 1)
    weights = scores.softmax(-1)[..., :-window].mean(1)
    pooled = (max_pool1d if pool == "max" else avg_pool1d)(weights, kernel, padding=kernel // 2, stride=1)
    pooled = pooled.view(KV_HEADS, GROUP, -1).mean(1)
    return pad(pooled, (0, window), value=pooled.max().item())


def kept(cache):
    return [held.positions.tolist() for held in cache.read()]


@pytest.mark.parametrize("pool", ["max", "avg"])
@settings(max_examples=15)
@given(seed=st.integers(0, 999), length=st.integers(70, 200), window=st.sampled_from([8, 16, 32]))
def test_snapkv_keeps_what_kvpress_keeps(pool, seed, length, window):
    budget, kernel = window + 24, 7
    q, k, _ = tokens(length, seed, torch.float32)
    method = parse(f"snapkv:budget={budget},window={window},kernel={kernel},pool={pool}")
    scores = press(q, k, window, kernel, pool)
    cut = scores[:, :-window].sort(-1, descending=True).values
    for g, own in enumerate(kept(loaded(method, [context(length, seed, torch.float32)], 0, torch.float32))):
        assert own[-window:] == list(range(length - window, length))
        last, next_ = cut[g, budget - window - 1], cut[g, budget - window]
        found = scores[g, own[:-window]]
        assert (found >= last * (1 - 1e-5)).all(), "but for ties, which pooling makes"
        if last > next_ * (1 + 1e-5):
            expected = scores[g, :-window].topk(budget - window).indices.sort().values.tolist()
            assert own[:-window] == expected


@settings(max_examples=15)
@given(seed=st.integers(0, 999), length=st.integers(90, 200), alpha=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
def test_ada_keeps_what_kvpress_keeps(seed, length, alpha):
    """kvpress adakv_press.py: the safeguard of each head, then the highest of all heads of the layer."""
    scores, tokens_ = torch.rand(3, length, generator=torch.Generator().manual_seed(seed)), 40
    raised = scores.clone()
    safe = raised.topk(int(tokens_ * alpha), dim=-1).indices
    raised.scatter_(-1, safe, torch.finfo(raised.dtype).max)
    pruned = torch.topk(-raised.reshape(-1), 3 * (length - tokens_)).indices
    mask = torch.ones(3 * length, dtype=torch.bool)
    mask[pruned] = False
    counts = Ada(alpha, "kvpress").allot([scores], tokens_)
    assert counts.tolist() == [mask.view(3, length).sum(-1).tolist()]
    assert int(counts.sum()) == 3 * tokens_
    assert (counts >= int(tokens_ * alpha)).all()
    if alpha == 1:
        assert (counts == tokens_).all()


@settings(max_examples=15)
@given(
    seed=st.integers(0, 999), length=st.integers(90, 200), window=st.sampled_from([0, 8, 32]),
    alpha=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
)  # fmt: skip
def test_ada_shares_as_its_authors_do(seed, length, window, alpha):
    """AdaKV snapkv_utils.py: the window is set aside; what a head has of the highest of all, and a floor."""
    scores, tokens_, heads = torch.rand(3, length, generator=torch.Generator().manual_seed(seed)), 40, 3
    base = tokens_ - window
    best = sorted(
        ((float(x), head) for head, row in enumerate(scores[:, : length - window]) for x in row), reverse=True
    )
    capacity = [sum(head == own for _, head in best[: heads * base]) for own in range(heads)]
    expected = [round(own * (1 - alpha) + int(base * alpha)) + window for own in capacity]
    scores[:, length - window :] = torch.inf
    counts = Ada(alpha).allot([scores], tokens_)
    assert counts.tolist() == [expected]
    assert abs(int(counts.sum()) - heads * tokens_) < 2 * heads
    assert int(counts.sum()) <= heads * Ada(alpha).most(tokens_, length)[1]


def test_a_window_does_not_make_the_authors_alpha_inert():
    few = torch.zeros(2, 200)
    few[0, :40], few[1, :24] = 0.2, 0.1
    few[:, -32:] = torch.inf
    assert [Ada(alpha).allot([few], 64).tolist() for alpha in (0.0, 0.5)] == [[[72, 56]], [[68, 60]]]
    assert [Ada(alpha, "kvpress").allot([few], 64).tolist() for alpha in (0.0, 0.5)] == [[[72, 56]], [[72, 56]]]


def test_a_prompt_within_its_budget_is_kept_whole():
    assert kept(loaded(parse("snapkv:budget=60,window=16"), [context(50, 0)], 4)) == [list(range(50))] * KV_HEADS


def test_heads_share_by_what_they_attend_to():
    """A head that attends evenly keeps more than one that attends to few tokens."""
    few = torch.zeros(100)
    few[:5] = 0.2
    counts = Ada(0.2).allot([torch.stack([few, torch.full((100,), 0.01)])], 30)[0]
    assert counts.tolist() == [10, 50]
    assert Ada(0.2, "kvpress").allot([torch.stack([few, torch.full((100,), 0.01)])], 30)[0].tolist() == [6, 54]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("snapkv:budget=32", "must be above its window of 32"),
        ("snapkv:kernel=4", "odd"),
        ("snapkv:window=0", "at least 1"),
        ("snapkv + ada:alpha=2", "between 0 and 1"),
    ],
)
def test_what_makes_no_sense_is_refused(text, said):
    with pytest.raises(UsageError, match=said):
        parse(text)


def test_a_share_below_the_window_is_refused():
    with pytest.raises(UsageError, match="51 of 256 tokens and must be above its window of 64"):
        parse("snapkv:window=64").check_context(256)
    assert SCALE == DIM**-0.5
