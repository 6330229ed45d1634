"""Which pages quest and rocketkv read, against their formulas in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.kernels.quantspec import PAGE
from kvsuite.methods import parse
from suites.checks.table import DIM, HEADS, KV_HEADS, SCALE, context, layer, loaded, tokens

GROUP = HEADS // KV_HEADS


def quest(q, pages):
    """Σ_d max(q_d · min_d, q_d · max_d), the mean over the group: q (GROUP, DIM), pages of (n, DIM) each."""
    worth = []
    for k in pages:
        bounds = [torch.maximum(own * k.amin(0), own * k.amax(0)).sum() for own in q]
        worth.append(sum(bounds) / GROUP)
    return torch.stack(worth)


def rocketkv(q, pages, channels=8):
    """TensorRT-LLM's _rocketkv_selection, channel by channel."""
    used = q.abs().mean(0).topk(channels).indices.tolist()
    weights = []
    for own in q:
        logits = []
        for k in pages:
            ends = [k[:, d].max() if q[:, d].sum() > 0 else k[:, d].min() for d in used]
            logits.append(sum(own[d] * end for d, end in zip(used, ends, strict=True)))
        scale = (DIM * own[used].abs().sum() / own.abs().sum()) ** 0.5
        weights.append((torch.stack(logits) / scale).softmax(0))
    return sum(weights) / GROUP


@pytest.mark.parametrize(
    ("text", "worth"), [("quest:budget=96,dense=0", quest), ("rocketkv:budget=96,channels=8", rocketkv)]
)
@settings(max_examples=5)
@given(length=st.integers(150, 400), seed=st.integers(0, 99))
def test_the_pages_with_the_highest_worth_are_read(text, worth, length, seed):
    cache = loaded(parse(text), [context(length, seed, torch.float32)], 10, torch.float32)
    for n in range(10):
        q, k, v = tokens(1, 1000 * seed + n, torch.float32)
        cache.append(k[None], v[None])
        held = cache.read()
        cache.attend(q[None], SCALE)
        for head, own in enumerate(held):
            parts = [own.k[own.slots // PAGE == column].double() for column in range(-(-len(own.slots) // PAGE))]
            found = worth(q[head * GROUP : (head + 1) * GROUP, 0].double(), parts)
            lowest = found.topk(3).values[-1]
            read = set(cache.pages_read[0][head].tolist())
            newest = len(parts) - 1
            assert newest in read
            assert 3 <= len(read) <= 4
            assert all(found[column] >= lowest - 1e-5 for column in read - {newest})
            assert all(found[column] <= lowest + 1e-5 for column in set(range(len(parts))) - read)


@pytest.mark.parametrize(("budget", "read"), [("96", 3), ("0.25", 3), ("31", 1), ("9999", 13)])
def test_a_budget_is_tokens_or_a_share_of_the_pages(budget, read):
    cache = loaded(parse(f"quest:budget={budget},dense=0"), [context(13 * PAGE - 1, 0)], 1)
    q, k, v = tokens(1, 1)
    cache.append(k[None], v[None])
    cache.attend(q[None], SCALE)
    assert all(read <= len(own) <= read + 1 for own in cache.pages_read[0])


def test_the_first_layers_read_everything():
    method = parse("quest:budget=32")
    caches = [method.cache(layer(index=at), 1, 128) for at in range(3)]
    assert [cache.reader is None for cache in caches] == [True, True, False]
    assert [cache.stepwise for cache in caches] == [False, False, True]
    assert not parse("rocketkv").reader.reads_all(0)


def test_a_page_without_a_token_is_not_read():
    """KIVI's pages stay until they are looked for; what is in none of them has no worth."""
    evicting = "streaming-llm:budget=40,positions=absolute + kivi:bits=4,group=16,residual=32"
    method = parse(f"{evicting} + quest:budget=32,dense=0")
    cache = loaded(method, [context(60, 0)], 120)
    empty = 0
    for n in range(120):
        q, k, v = tokens(1, n)
        cache.append(k[None], v[None])
        held = [set((own.slots // PAGE).tolist()) for own in cache.read()]
        cache.attend(q[None], SCALE)
        for own, read in zip(held, cache.pages_read[0], strict=True):
            assert set(read.tolist()) <= own
            empty += int(cache.kv.host.columns[0, 0] - cache.kv.host.gaps[0, 0]) > len(own)
    assert empty, "there were such pages"


def test_what_was_never_written_is_not_decoded():
    """A plug-in's codec may have no number for such bits: codebook has 16 codes."""
    method = parse("codebook + quest:budget=32,dense=0")
    cache = method.cache(layer(torch.float32), 1, 60)
    for store in (cache.kv.k, cache.kv.v):
        store.pools[0].fill_(255)
    method.compress(0, [context(40, 0, torch.float32)], [cache])
    q, k, v = tokens(1, 1, torch.float32)
    cache.append(k[None], v[None])
    assert cache.attend(q[None], SCALE).isfinite().all()
