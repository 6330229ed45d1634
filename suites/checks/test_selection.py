"""Property 4: a selector keeps as many tokens as its budget says, and the ones it promises."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvsuite.cache.layer import highest
from kvsuite.methods import parse
from kvsuite.methods.budgets.uniform import Uniform
from suites.checks import naive
from suites.checks.table import (
    COMPACTING,
    DECIDED,
    DIM,
    EVERY_STEP,
    HEADS,
    KV_HEADS,
    KVZAP,
    RAGGED,
    READING,
    SCALE,
    SELECTING,
    context,
    loaded,
    plain,
    tokens,
)

GROUP = HEADS // KV_HEADS
lengths = st.sampled_from([1, 3, 15, 40]) | st.integers(1, 90)


def positions(cache):
    """What each head holds: a list of positions per head, which must be ascending and its own count."""
    found = [held.positions.tolist() for held in cache.read()]
    assert all(own == sorted(set(own)) for own in found)
    assert cache.kept(0) == sum(map(len, found))
    return found


def decoded(cache, steps, seed=1):
    """Feed tokens one by one; yields the number seen before each has been attended, and after."""
    q, k, v = tokens(steps, seed, cache.layer.dtype)
    for i in range(steps):
        cache.append(k[None, :, i : i + 1], v[None, :, i : i + 1])
        yield "appended", q[:, i : i + 1]
        cache.attend(q[None, :, i : i + 1], SCALE)
        yield "attended", None


@pytest.mark.parametrize("text", [text for text in SELECTING if text not in DECIDED])
@settings(max_examples=6)
@given(length=lengths)
def test_as_many_stay_as_the_budget_says_at_every_step(text, length):
    method = parse(text)
    budget = 999 if method.budget.whole(0, 1) else method.selector.tokens(length)
    drops_newest = method.selector.name in ("tova", "triattention") and not method.selector.protects[0]
    cache = loaded(method, [context(length, 0)], 30)
    off = sum(len(own) for own in positions(cache)) - min(length, budget) * KV_HEADS
    rounds = method.budget.name == "ada" and method.budget.rule == "authors" and length > budget
    assert abs(off) < (2 * KV_HEADS if rounds else 1)
    seen = length
    for phase, _ in decoded(cache, 30):
        seen += phase == "appended"
        expected = min(length, budget) + seen - length
        if text in EVERY_STEP:
            expected = min(seen, budget + (phase == "appended"))
        if text in COMPACTING:
            since = (seen - length) % method.selector.every if phase == "attended" else (seen - length - 1) % 16 + 1
            expected = min(seen, (min(length + seen - length - since, budget)) + since)
        held = positions(cache)
        if text in RAGGED:
            assert sum(map(len, held)) == expected * KV_HEADS + off
        else:
            assert [len(own) for own in held] == [expected] * KV_HEADS
        assert drops_newest or all(own[-1] == seen - 1 for own in held)


@pytest.mark.parametrize("text", [text for text in EVERY_STEP if "streaming" in text])
@settings(max_examples=6)
@given(length=lengths)
def test_streaming_keeps_its_sinks_and_its_window(text, length):
    method = parse(text)
    sinks, budget = 4, method.selector.budget
    cache = loaded(method, [context(length, 0)], 40)
    seen = length
    expected = [p for p in range(length) if p < sinks or p >= length - (budget - sinks)]
    assert positions(cache) == [expected] * KV_HEADS
    for phase, _ in decoded(cache, 40):
        seen += phase == "appended"
        first = seen - (budget - sinks) - (phase == "appended")
        assert positions(cache) == [[p for p in range(seen) if p < sinks or p >= first]] * KV_HEADS


@pytest.mark.parametrize("sinks", [0, 1, 7])
@pytest.mark.parametrize("codec", ["full", "kivi:bits=4,group=8,residual=8"])
def test_streaming_with_any_number_of_sinks(codec, sinks):
    cache = loaded(parse(f"streaming-llm:budget=10,sinks={sinks} + {codec}"), [context(30, 0)], 20)
    for _ in decoded(cache, 20):
        pass
    assert positions(cache) == [[*range(sinks), *range(50 - (10 - sinks), 50)]] * KV_HEADS


def heaviest_stay(cache, seen, recent):
    """The mass each key of a prompt got from all of its queries, in float64, and whether the heaviest stay: for each
    head a dictionary from position to mass of what does."""
    q, k, _ = tokens(seen.k.shape[1], 0, cache.layer.dtype)
    where = torch.arange(k.shape[1])
    full = [naive.weights(q[h], k[h // GROUP], SCALE, naive.causal(where, where)).sum(0) for h in range(HEADS)]
    prompt = [(full[GROUP * g] + full[GROUP * g + 1]) / GROUP for g in range(KV_HEADS)]
    held = positions(cache)
    for g, own in enumerate(held):
        others = [p for p in range(k.shape[1] - recent) if p not in own]
        heavy = [p for p in own if p < k.shape[1] - recent]
        if others and heavy:
            assert max(prompt[g][others]) <= min(prompt[g][heavy]) + 1e-4
    return [{p: float(prompt[g][p]) for p in own} for g, own in enumerate(held)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("text", [text for text in EVERY_STEP if "h2o" in text and text not in (*RAGGED, *READING)])
@pytest.mark.parametrize("length", [5, 20, 80])
def test_h2o_gives_up_the_least_mass_that_is_not_recent(length, text, dtype):
    method = parse(text)
    budget = method.selector.tokens(length)
    recent = 9 if "recent" in text else budget // 2
    seen = context(length, 0, dtype)
    cache = loaded(method, [seen], 30, dtype)
    mass = heaviest_stay(cache, seen, recent)
    count = length
    for phase, q in decoded(cache, 30):
        held = cache.read()
        if phase == "appended":
            count += 1
            for g, own in enumerate(held):
                mass[g][count - 1] = 0.0
                assert own.positions.tolist() == sorted(mass[g])
                heads = [naive.weights(q[GROUP * g + i], own.k, SCALE)[0] for i in range(GROUP)]
                for p, more in zip(own.positions.tolist(), (sum(heads) / GROUP).tolist(), strict=True):
                    mass[g][p] += more
            continue
        for g, own in enumerate(held):
            gone = set(mass[g]) - set(own.positions.tolist())
            assert len(gone) == (len(mass[g]) > budget)
            candidates = [m for p, m in mass[g].items() if p < count - recent]
            for victim in gone:  # ties within float32's sums may go either way
                assert victim < count - recent
                assert mass[g].pop(victim) <= min(candidates) + 1e-4
            assert set(range(max(0, count - recent), count)) <= set(own.positions.tolist())


shares = st.integers(1, 60).map(lambda percent: percent / 100) | st.integers(1, 12)


@settings(max_examples=100)
@given(length=st.integers(20, 4000), heavy=shares, recent=shares)
@example(length=36, heavy=0.01, recent=0.03)
@example(length=225, heavy=0.02, recent=0.3)
def test_h2o_protects_its_recent_share_and_leaves_its_heavy_one(length, heavy, recent):
    selector = parse(f"h2o:heavy={heavy},recent={recent}").selector
    expected = [max(1, round(x * length)) if x < 1 else x for x in (heavy, recent)]
    assert selector.tokens(length) == sum(expected)
    if sum(expected) < length:
        mass = torch.zeros(KV_HEADS, length)
        protected = selector.score(plain(mass, mass, mass), sum(expected)).isinf()
        assert protected.sum(-1).tolist() == [expected[1]] * KV_HEADS
        assert protected[:, -expected[1] :].all()


@pytest.mark.parametrize("text", ["h2o", "h2o:heavy=7,recent=0.1", "h2o:heavy=0.1,recent=7", "h2o:budget=0.2"])
@pytest.mark.parametrize("length", [1, 2, 15, 37, 90])
def test_h2os_newest_stay_while_decoding(text, length):
    selector = parse(text).selector
    parts = [max(1, round(x * length)) if x < 1 else int(x) for x in (selector.heavy, selector.recent)]
    if selector.budget:
        parts[1] = max(2, round(selector.budget * length)) // 2
    cache = loaded(parse(text), [context(length, 0)], 20)
    for phase, _ in decoded(cache, 20):
        if phase == "attended":
            newest = set(range(max(0, cache.seen(0) - parts[1]), cache.seen(0)))
            assert all(newest <= set(own) for own in positions(cache))


@pytest.mark.parametrize("heads", [1, 2])
def test_heads_choose_for_themselves(heads):
    for text in ("h2o:budget=16", "random:budget=20"):
        found = positions(loaded(parse(text), [context(80, heads)], 0))
        assert found[0] != found[1]


ONE_SHOT = ["streaming-llm", "h2o", "random", "knorm", "keydiff", "tova", "observed-attention"]


@pytest.mark.parametrize(
    "text",
    [
        *(f"{name}:budget={{}}" for name in ONE_SHOT),
        "lagkv:budget={},sinks=2,lag=8",
        "kvzip:budget={},sinks=2",
        "kvzip-plus:budget={},sinks=2",
        "triattention:budget={}",
        f"kvzap:weights={KVZAP},budget={{}},recent=3",
        "expected-attention:budget={},future=64",
        "leverage:budget={},sketch=16",
        "compactor:budget={},chunk=16,sketch=16,sinks=2,recent=3,blend=0.3",  # without: the budget is in the scores
    ],
)
@given(budgets=st.lists(st.integers(6, 60), min_size=2, max_size=2, unique=True).map(sorted), seed=st.integers(0, 99))
def test_a_larger_budget_keeps_a_superset(text, budgets, seed):
    seen = context(60, seed)
    fewer, more = (positions(loaded(parse(text.format(n)), [seen], 0)) for n in budgets)
    assert all(set(a) < set(b) for a, b in zip(fewer, more, strict=True))


@given(order=st.lists(st.permutations(range(30)), min_size=4, max_size=4), n=st.integers(1, 30))
def test_uniform_keeps_the_highest_scores_in_order(order, n):
    scores = torch.tensor(order, dtype=torch.float32).view(2, 2, 30)  # two layers of two heads
    counts = Uniform().allot(list(scores), n)
    assert counts.tolist() == [[n, n]] * 2
    for layer, own in zip(scores, counts.tolist(), strict=True):
        kept = torch.stack(list(highest(layer, own)))
        assert torch.equal(kept, kept.sort(dim=-1).values)
        assert kept.shape == (2, n)
        assert (layer.gather(1, kept) >= 30 - n).all()


def test_random_is_uniform_and_seeded_and_of_the_key_alone():
    _, k, v = tokens(40, 0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(40)
    draws = set()
    for seed in range(400):
        selector = parse(f"random:budget=10,seed={seed}").selector
        scores = selector.score(plain(k, v), 10)
        kept = torch.stack(list(highest(scores, [10] * KV_HEADS)))
        counts += torch.bincount(kept.flatten(), minlength=40)
        draws.add(tuple(kept[0].tolist()))
        assert torch.equal(selector.score(plain(k[:, order], v), 10), scores[:, order])
        assert not torch.equal(selector.score(plain(k, v, index=1), 10), scores)
    assert len(draws) == 400
    share = counts / (400 * KV_HEADS)
    assert (share - 0.25).abs().max() < 5 * (0.25 * 0.75 / (400 * KV_HEADS)) ** 0.5
    assert scores.shape == (KV_HEADS, 40)
    assert k.shape[-1] == DIM


def test_each_layer_gets_its_own_scores():
    method = parse("h2o:budget=16")
    seen = [context(60, 0), context(60, 5, index=1)]
    caches = [method.cache(loaded(method, seen[:1], 0).layer, 1, 16) for _ in seen]
    method.compress(0, seen, caches)
    for one, cache in zip(seen, caches, strict=True):
        assert positions(cache) == positions(loaded(method, [one], 0))
        held = cache.read()
        assert all(torch.equal(held[g].k, one.k[g, held[g].positions]) for g in range(KV_HEADS))
