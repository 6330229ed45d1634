"""ThinK stores fewer channels of keys: which ones, of which tokens, and how many bytes that takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvsuite.cache.observations import LastQueries
from kvsuite.methods import parse
from suites.checks.table import DIM, HEADS, KV_HEADS, SCALE, context, loaded, plain, prefilled, tokens

GROUP = HEADS // KV_HEADS


def kept_channels(q, k, kept):
    """The authors' key_pruner_query_driven, mean over the query group, of all the prompt's keys: sets of channels."""
    found = []
    for head in range(KV_HEADS):
        asked = (q[head * GROUP : (head + 1) * GROUP, -32:].double() ** 2).mean((0, 1))
        worth = asked * (k[head].double() ** 2).mean(0)
        found.append(set(worth.argsort(descending=True)[:kept].tolist()))
    return found


@pytest.mark.parametrize(("prune", "kept"), [("0.4", 20), ("0.5", 16), ("0.9", 4)])
@settings(max_examples=8)
@given(length=st.integers(2, 140), steps=st.integers(0, 50), seed=st.integers(0, 99))
def test_the_channels_that_queries_use_least_are_gone_but_for_the_newest_keys(prune, kept, length, steps, seed):
    q, k, v = tokens(length, seed)
    cache = loaded(parse(f"think:prune={prune}"), [prefilled(q, k, v)], steps)
    more = tokens(steps, seed + 1) if steps else (q[:, :0], k[:, :0], v[:, :0])
    for i in range(steps):
        cache.append(more[1][None, :, i : i + 1], more[2][None, :, i : i + 1])
    keys, values = torch.cat([k, more[1]], 1), torch.cat([v, more[2]], 1)
    old = max(0, length + steps - 32)
    for head, (held, channels) in enumerate(zip(cache.read(), kept_channels(q, k, kept), strict=True)):
        gone = [d for d in range(DIM) if d not in channels]
        assert len(gone) == DIM - kept
        expected = keys[head].clone()
        expected[:old, gone] = 0
        assert torch.equal(held.k, expected)
        assert torch.equal(held.v, values[head])


def test_what_is_evicted_does_not_choose_channels_again():
    seen = context(90, 0)
    for text in ("snapkv:budget=50,window=8 + think:recent=8", "think:recent=8"):
        cache = loaded(parse(text), [seen], 0)
        channels = cache.kv.k.fitted[0][0].sort().values.tolist()
        q = seen[LastQueries(32)]
        assert [set(own) for own in channels] == kept_channels(q, seen.k, 20)


def test_a_key_takes_as_many_bytes_as_it_has_channels():
    sizes = []
    for length in (256, 1024):
        _, k, v = tokens(length, 0)
        sizes.append(loaded(parse("think"), [plain(k, v)], 0).nbytes)
    table = 4 * KV_HEADS * (1024 - 256) // 32
    assert sizes[1] - sizes[0] - table == KV_HEADS * (1024 - 256) * 2 * (20 + DIM)
    cache = loaded(parse("think"), [plain(k, v)], 0)
    assert cache.kv.k.pools[0].shape[-1] == 20


def test_a_channel_that_is_gone_does_not_count():
    """Attention is that over keys with zeros in it, however large the query is there."""
    q, k, v = tokens(80, 0, torch.float32)
    cache = loaded(parse("think:recent=0"), [prefilled(q, k, v)], 1, torch.float32)
    new = tokens(1, 1, torch.float32)
    cache.append(new[1][None], new[2][None])
    out = cache.attend(new[0][None], SCALE)
    channels = cache.kv.k.fitted[0][0].long()
    other = new[0].clone()
    for head in range(HEADS):
        gone = torch.ones(DIM, dtype=torch.bool)
        gone[channels[head // GROUP]] = False
        other[head, :, gone] = 1e4
    assert torch.equal(cache.attend(other[None], SCALE), out)
