"""Selectors and budgets against independent writings of their formulas in float64, and what they do while decoding."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import avg_pool1d, max_pool1d

from kvsuite.engines.request import Request
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.errors import UsageError
from kvsuite.methods import parse, parse_all
from suites.checks import naive
from suites.checks.table import DIM, HEADS, KV_HEADS, SCALE, context, layer, loaded, prefilled, tokens
from suites.checks.test_models import build

GROUP = HEADS // KV_HEADS
FREQUENCY = layer().rope.inverse_frequency.double()


def turned(x, positions):
    """x (..., T, DIM) float64 rotated by ``positions`` (T,), pair by pair as complex numbers."""
    pairs = torch.complex(*x.double().chunk(2, -1)) * torch.exp(1j * positions.double()[:, None] * FREQUENCY)
    return torch.cat([pairs.real, pairs.imag], -1)


def causal(q, k):
    """The weights of a prompt over itself: float64 (HEADS, T, T)."""
    earlier = torch.ones(k.shape[1], k.shape[1], dtype=torch.bool).tril()
    return torch.stack([naive.weights(q[h], k[h // GROUP], SCALE, earlier) for h in range(HEADS)])


def knorm(q, k, v, tokens):
    return -((k.double() ** 2).sum(-1) ** 0.5)


def keydiff(q, k, v, tokens):
    unit = k.double() / k.double().norm(dim=-1, keepdim=True)
    mean = unit.mean(1, keepdim=True)
    return -(unit * mean / mean.norm(dim=-1, keepdim=True)).sum(-1)


def tova(q, k, v, tokens):
    return causal(q, k)[:, -1].mean(0).expand(KV_HEADS, -1)


def observed(q, k, v, tokens):
    weights = causal(q, k)
    seen = torch.ones_like(weights[0]).tril().sum(0)
    return (weights.sum(1) / seen).view(KV_HEADS, GROUP, -1).mean(1)


def expected(q, k, v, tokens, future=64, sinks=4):
    length = k.shape[1]
    before = turned(q, -torch.arange(length))[:, sinks:]
    basis = torch.eye(DIM).double()
    rotation = sum(turned(basis, torch.full((DIM,), length + p)) for p in range(future)) / future  # row vectors
    scores = torch.zeros(KV_HEADS, length).double()
    for head in range(HEADS):
        mean = before[head].mean(0) @ rotation
        spread = rotation.T @ torch.cov(before[head].T, correction=0) @ rotation
        keys = k[head // GROUP, sinks:].double()
        logits = SCALE * keys @ mean + SCALE**2 / 2 * torch.einsum("ni,ij,nj->n", keys, spread, keys)
        scores[head // GROUP, sinks:] += logits.softmax(0) / GROUP
    scores *= v.double().norm(dim=-1)
    scores[:, :sinks] = torch.inf
    return scores


def leverage(q, k, v, tokens, sketch=16, inner=slice(None)):
    random = torch.randn(DIM, sketch, generator=torch.Generator().manual_seed(0)).double() / sketch**0.5
    keys = turned(k, -torch.arange(k.shape[1]))[:, inner]
    x = (keys - keys.mean(1, keepdim=True)) @ random
    inverse = torch.linalg.inv(x.transpose(1, 2) @ x + 0.01 * torch.eye(sketch))
    found = torch.einsum("hni,hij,hnj->hn", x, inverse, x)
    return (found - found.mean()) / found.std()


def compactor(q, k, v, tokens, chunk=16, sketch=16, sinks=2, recent=3):
    length = k.shape[1]
    inner = slice(sinks, length - recent)
    attention = torch.zeros(KV_HEADS, length).double()[:, inner]
    for head in range(HEADS):
        queries, keys = q[head, inner].double(), k[head // GROUP, inner].double()
        for first in range(0, keys.shape[0], chunk):
            own = slice(first, first + chunk)
            attention[head // GROUP, own] += (queries[own] @ keys[own].T).softmax(-1).sum(0) / GROUP
    attention = avg_pool1d(attention * v[:, inner].double().norm(dim=-1), 3, 1, 1)
    attention = (attention - attention.mean()) / attention.std()
    scores = torch.full((KV_HEADS, length), torch.inf).double()
    scores[:, inner] = (1 - tokens / length) * leverage(q, k, v, tokens, sketch, inner) + attention
    return scores


def r_kv(q, k, v, tokens, window=8, kernel=7, mix=0.07):
    scores = torch.full((KV_HEADS, k.shape[1]), torch.inf).double()
    for head in range(KV_HEADS):
        keys = k[head].double()
        logits = torch.stack([q[GROUP * head + i, -window:].double() @ keys[:-window].T for i in range(GROUP)])
        importance = max_pool1d((logits.amax(0) * SCALE).softmax(-1).mean(0)[None], kernel, 1, kernel // 2)[0]
        unit = keys / keys.norm(dim=-1, keepdim=True)
        cosine = unit @ unit.T
        for i, row in enumerate(cosine):
            row[i] = 0
            alike = [j for j in range(len(row)) if row[j] > 0.5]
            row[alike[-1] if alike else 0] = 0
        redundancy = cosine.mean(0).softmax(0)
        scores[head, :-window] = mix * importance - (1 - mix) * redundancy[:-window]
    return scores


def triattention(q, k, v, tokens, seen=None, positions=None):
    """The authors' pruning_utils.py: keys before RoPE, their cosines one by one."""
    positions = torch.arange(k.shape[1]) if positions is None else positions
    seen = k.shape[1] if seen is None else seen
    queries = torch.complex(*turned(q, -torch.arange(q.shape[1])).chunk(2, -1))
    keys = torch.complex(*turned(k, -positions).chunk(2, -1))
    scores = []
    for head in range(HEADS):
        mean, size, own = queries[head].mean(0), queries[head].abs().mean(0), keys[head // GROUP]
        phase = (mean * own.conj()).angle()
        series = 0
        for distance in (2**n for n in range(17)):
            angle = (seen - positions + distance)[:, None] * FREQUENCY + phase
            series = series + (mean.abs() * own.abs() * angle.cos()).sum(1) / 17
        found = series + ((size - mean.abs()) * own.abs()).sum(1)
        scores.append((found - found.mean()) / found.std(correction=0))
    return torch.stack(scores).view(KV_HEADS, GROUP, -1).amax(1)


FORMULAS = {
    "knorm:budget={}": knorm,
    "keydiff:budget={}": keydiff,
    "tova:budget={}": tova,
    "observed-attention:budget={}": observed,
    "expected-attention:budget={},future=64": expected,
    "leverage:budget={},sketch=16": leverage,
    "compactor:budget={},chunk=16,sketch=16,sinks=2,recent=3": compactor,
    "r-kv:budget={},every=16": r_kv,
    "triattention:budget={},every=16": triattention,
}


@pytest.mark.parametrize("text", FORMULAS)
@settings(max_examples=6)
@given(seed=st.integers(0, 999), length=st.integers(60, 150), budget=st.integers(12, 50))
def test_scores_are_those_of_the_formula_and_the_highest_stay(text, seed, length, budget):
    q, k, v = tokens(length, seed, torch.float32)
    scores, method, seen = FORMULAS[text](q, k, v, budget), parse(text.format(budget)), prefilled(q, k, v)
    ours, protected = method.selector.score(seen, budget), scores.isinf()
    assert torch.equal(ours.isinf(), protected)
    finite = [x.double().masked_fill(protected, 0.0) for x in (ours, scores)]
    torch.testing.assert_close(*finite, rtol=1e-3, atol=2e-5)
    for head, own in enumerate(loaded(method, [seen], 0, torch.float32).read()):
        lowest = scores[head].topk(budget).values[-1]
        assert len(own.positions) == budget
        assert (scores[head, own.positions.long()] >= lowest - 1e-5 * lowest.abs() - 1e-7).all(), "but for ties"


@settings(max_examples=10)
@given(seed=st.integers(0, 99), length=st.integers(30, 150), budget=st.integers(12, 60))
def test_lagkv_keeps_the_highest_ranks_of_each_chunk(seed, length, budget):
    """kvpress lagkv_press.py, chunk by chunk, token by token."""
    _, k, v = tokens(length, seed, torch.float32)
    sinks, lag = 2, 8
    whole = (length - sinks) // lag
    ranks = {}
    for head in range(KV_HEADS):
        for chunk in range(whole - 1):
            own, following = (slice(sinks + lag * i, sinks + lag * (i + 1)) for i in (chunk, chunk + 1))
            spread = 0
            for x in (k[head].double(), v[head].double()):
                low, high = x[following].amin(0), x[following].amax(0)
                spread = spread + ((x[own] - low) / (high - low)).std(-1).softmax(0)
            for rank, place in enumerate(spread.argsort().tolist()):
                ranks[head, own.start + place] = rank
    newest = length - (sinks + lag * (whole - 1))
    held = loaded(
        parse(f"lagkv:budget={budget},sinks={sinks},lag={lag}"),
        [context(length, seed, torch.float32)],
        0,
        torch.float32,
    )
    for head, own in enumerate(held.read()):
        kept = own.positions.tolist()
        assert len(kept) == min(length, budget)
        assert kept[:sinks] == list(range(sinks))
        if budget <= sinks + newest:
            assert kept[sinks:] == list(range(length - (budget - sinks), length))
            continue
        assert set(range(length - newest, length)) <= set(kept)
        out = [rank for (h, p), rank in ranks.items() if h == head and p not in kept]
        stays = [rank for (h, p), rank in ranks.items() if h == head and p in kept]
        assert not out or max(out) <= min(stays)


def test_lagkv_takes_constant_channels_and_zeros():
    q, k, v = tokens(80, 0)
    k[:, :, 3] = 1.0
    v[:] = 0
    scores = parse("lagkv:budget=20,sinks=2,lag=8").selector.score(prefilled(q, k, v), 20)
    assert not scores.isnan().any()


@pytest.mark.parametrize("recent", [0, 1, 5])
@pytest.mark.parametrize("length", [9, 60])
def test_tova_evicts_what_the_newest_query_attends_to_least(recent, length):
    method = parse(f"tova:budget=12,recent={recent}")
    cache = loaded(method, [context(length, 0, torch.float32)], 30, torch.float32)
    q, k, v = tokens(30, 1, torch.float32)
    evicted = []
    for i in range(30):
        cache.append(k[None, :, i : i + 1], v[None, :, i : i + 1])
        before = cache.read()
        cache.attend(q[None, :, i : i + 1], SCALE)
        after = [own.positions.tolist() for own in cache.read()]
        assert all(own == after[0] for own in after), "all heads hold the same tokens"
        gone = set(before[0].positions.tolist()) - set(after[0])
        assert len(gone) == (len(before[0].positions) > 12)
        weights = [naive.weights(q[h, i : i + 1], before[h // GROUP].k, SCALE)[0] for h in range(HEADS)]
        mean = dict(zip(before[0].positions.tolist(), (sum(weights) / HEADS).tolist(), strict=True))
        candidates = [w for p, w in mean.items() if p < cache.seen(0) - recent]
        assert all(mean[p] <= min(candidates) + 1e-6 for p in gone)
        assert all(p < cache.seen(0) - recent for p in gone)
        evicted += gone
    assert len(evicted) == 30 - max(0, 12 - length)


def compactions(text, prompt):
    """While 40 tokens are decoded behind a prefilled layer, after every 16th: its number, the queries of all, what the
    heads held before and what they hold."""
    cache, (q, k, v) = loaded(parse(text), [prompt], 40, torch.float32), tokens(40, 1, torch.float32)
    for i in range(40):
        cache.append(k[None, :, i : i + 1], v[None, :, i : i + 1])
        before = cache.read()
        cache.attend(q[None, :, i : i + 1], SCALE)
        if i % 16 == 15:
            yield i, q, before, cache.read()


@pytest.mark.parametrize("codec", ["full", "kivi:bits=4,group=16,residual=32"])
def test_r_kv_compacts_to_what_it_scores_highest(codec):
    """Every 16 steps each head holds what the formula, of what it held and the last queries, keeps."""
    prompt = context(70, 0, torch.float32)
    for i, q, before, after in compactions(f"r-kv:budget=36,every=16 + {codec}", prompt):
        own = torch.stack([held.k for held in before])
        queries = torch.zeros(HEADS, own.shape[1], DIM)
        queries[:, -8:] = q[:, i - 7 : i + 1]
        scores = r_kv(queries, own, None, 36)
        for head, held in enumerate(after):
            kept = torch.isin(before[head].positions, held.positions)
            assert int(kept.sum()) == len(held.positions) == 36
            assert scores[head, kept].min() >= scores[head].topk(36).values[-1] - 1e-6
            assert kept[-8:].all()


@pytest.mark.parametrize("codec", ["full", "kivi:bits=4,group=16,residual=32"])
def test_triattention_compacts_to_what_it_scores_highest(codec):
    """By the prompt's queries, whatever was asked since, and each token's own position."""
    prompt = tokens(70, 0, torch.float32)
    for i, _, before, after in compactions(f"triattention:budget=36,every=16 + {codec}", prefilled(*prompt)):
        for head, held in enumerate(after):
            keys = before[head].k.expand(KV_HEADS, -1, -1)
            scores = triattention(prompt[0], keys, None, 36, 70 + i + 1, before[head].positions)[head]
            kept = torch.isin(before[head].positions, held.positions)
            assert int(kept.sum()) == len(held.positions) == 36
            assert scores[kept].min() >= scores.topk(36).values[-1] - 1e-4


def authors(layers, budget, length, beta=20, window=8):
    """KVCache-Factory's pyramidkv_utils.py: what each layer keeps beside its window."""
    low = (budget - window) // beta
    high = (budget - window) * 2 - low
    if high >= length - window:
        high = length - window
        low = (budget - window) * 2 - high
    if length < (budget - window) * 2:
        return [budget] * layers
    return [high - at * ((high - low) // (layers - 1)) + window for at in range(layers)]


@given(layers=st.integers(2, 80), length=st.integers(40, 5000), share=st.floats(0.05, 0.95))
def test_a_pyramid_falls_by_its_steps(layers, length, share):
    budget = max(10, round(share * length))
    if budget >= length:
        return
    made = parse("pyramid + knorm").budget
    counts = made.counts(layers, budget, length)
    assert counts == authors(layers, budget, length)
    assert counts == sorted(counts, reverse=True)
    assert 0 < counts[-1] <= counts[0] <= min(length, made.most(budget, length)[0])
    assert budget <= sum(counts) / layers <= budget + layers / 2, "steps are rounded down"


@given(layers=st.integers(2, 80), length=st.integers(100, 5000), share=st.floats(0.05, 0.95))
def test_kvpress_pyramid_keeps_the_budget_in_the_mean(layers, length, share):
    budget = round(share * length)
    made = parse("knorm + pyramid:rule=kvpress,window=16").budget
    counts = made.counts(layers, budget, length)
    assert abs(sum(counts) / layers - budget) <= 0.5
    assert max(counts) <= made.most(budget, length)[0]


def test_layers_of_a_pyramid_hold_what_it_allots():
    method = parse("snapkv:budget=40,window=8 + pyramid")
    seen = [context(90, at, index=at) for at in range(4)]
    caches = [method.cache(layer(index=at), 1, method.capacity(90, 4)) for at in range(4)]
    method.compress(0, seen, caches)
    held = [[len(own.positions) for own in cache.read()] for cache in caches]
    assert held == [[n] * KV_HEADS for n in authors(4, 40, 90)]
    assert len({n for n, _ in held}) == 4


@pytest.mark.parametrize("length", [12, 60])
def test_whole_layers_stay_whole_while_decoding(length):
    method = parse("h2o:budget=16 + layers:first=1,last=1")
    caches = [method.cache(layer(index=at), 1, method.capacity(length, 20)) for at in range(3)]
    method.compress(0, [context(length, at, index=at) for at in range(3)], caches)
    q, k, v = tokens(20, 1)
    for i in range(20):
        for cache in caches:
            cache.append(k[None, :, i : i + 1], v[None, :, i : i + 1])
            cache.attend(q[None, :, i : i + 1], SCALE)
    kept = [cache.kept(0) // KV_HEADS for cache in caches]
    assert kept == [length + 20, 16, length + 20]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tova + ada", "all heads of tova keep the same tokens"),
        ("snapkv + pyramid", "window=8 does not cover what snapkv protects, its window of 32 tokens"),
        ("knorm + pyramid:beta=0", "beta must be at least 1"),
        ("knorm + layers:first=0", "one of them above 0"),
        ("tova:budget=3,recent=3", "must be above its 3 newest tokens"),
        ("tova:recent=-1", "must not be negative"),
        ("lagkv:lag=1", "lag at least 2"),
        ("lagkv:budget=4", "must be above its 4 sinks"),
        ("expected-attention:future=0", "future must be at least 1"),
        ("expected-attention:budget=4", "must be above its 4 sinks"),
        ("compactor:budget=12", "must be above its 8 first and 4 last tokens"),
        ("compactor:chunk=0", "chunk and sketch at least 1"),
        ("leverage:sketch=0", "sketch must be at least 1"),
        ("r-kv:kernel=4", "kernel odd"),
        ("r-kv:budget=8", "must be above its window of 8 tokens"),
        ("kvzip:chunk=0", "chunk at least 1"),
        ("kvzip-plus:budget=4", "must be above its 4 sinks"),
        ("triattention:every=1", "every must be at least 2"),
        ("tova + dms", "all heads of tova keep the same tokens"),
        ("knorm:budget=30 + dms:threshold=0", "dms says how many tokens stay; leave knorm's budget out"),
        ("h2o + dms:threshold=0", "h2o has other sizes than a budget"),
        ("knorm + headwise", "name a file with a share for each head"),
        ("knorm + headwise:shares=no", "'no' is no JSON list of lists of numbers"),
        ("quest:dense=-1", "must not be negative"),
        ("quest:budget=0.0", "budget=0 must be at least 1 tokens or a fraction"),
        ("rocketkv:channels=-1", "channels=-1 must be"),
        ("think:prune=1", "below 1"),
    ],
)
def test_what_makes_no_sense_is_refused(text, said):
    with pytest.raises(UsageError, match=said):
        parse(text)


@pytest.mark.parametrize("text", ["expected-attention", "compactor", "triattention"])
def test_a_rotation_that_nobody_can_undo_is_refused_before_a_prompt_is_read(text):
    where = replace(layer(), rope=None)
    with pytest.raises(UsageError, match=f"{text}: cannot undo the rotation of layer 0's queries and keys"):
        parse(text).cache(where, 1, 32)
    parse("snapkv").cache(where, 1, 32)


ANSWERED = [
    "knorm:budget=0.3+layers:first=1",
    "keydiff:budget=0.3+nvfp4",
    "tova:budget=0.3+q8_0",
    "lagkv:budget=0.3,lag=8",
    "observed-attention:budget=0.3+ada+mxfp4",
    "expected-attention:budget=0.3+int4:rotate=hadamard",
    "compactor:budget=0.4,chunk=16",
    "r-kv:budget=0.4,every=4+q4_0",
    "snapkv:budget=0.4,window=8+pyramid",
    "kvzip:budget=0.4,chunk=25+dms",
    "kvzip-plus:budget=0.4,chunk=25+think",
    "kvzip+dms:threshold=0.02",
    "triattention:budget=0.4,every=4+int8",
    "quest:budget=0.3,dense=1",
    "snapkv:budget=0.8,window=8+rocketkv:budget=32",
]


@pytest.mark.parametrize("compress", ["prompt", "context"])
def test_a_model_answers_through_them(compress):
    """From the observation of a real prefill to the last token, all together."""
    model = build("Llama")
    engine = TransformersEngine(model, None)
    engine.encode = lambda request, how: (list(range(1, 61)), [] if how == "prompt" else [3, 4, 5])
    engine.stop = frozenset()
    responses = list(engine.generate([Request("x", "", "", 9)], parse_all([",".join(ANSWERED)]), compress=compress))
    assert {r.error for r in responses} == {""}
    assert sorted(r.method for r in responses) == sorted(ANSWERED)
    assert all(len(r.tokens) == 9 for r in responses)
