"""What another package may bring, through the engine: selectors that compact, a reader, a codec to be calibrated."""

import math
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from kvsuite.cache.checker import AttentionChecker
from kvsuite.cache.layer import LayerCache
from kvsuite.cache.observations import HiddenStates, LastQueries, NewestAttention, PreRopeMoments
from kvsuite.engines.decoder import Decoder
from kvsuite.engines.request import Request
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.errors import UsageError
from kvsuite.kernels.backends import choose
from kvsuite.kernels.context import Needs
from kvsuite.kernels.quantspec import PAGE
from kvsuite.methods import parse, parse_all
from suites.checks import naive
from suites.checks.table import KV_HEADS, SCALE, context, layer, loaded, tokens

REQUESTS = [Request(f"r{i}", "".join(chr(40 + (i + j) % 80) for j in range(90)), "", 40) for i in range(3)]


class Letters:
    chat_template = None

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [ord(letter) % 128 for letter in text]}

    def decode(self, tokens, skip_special_tokens):
        return "".join(map(chr, tokens))


def engine(model):
    made = TransformersEngine(model, Letters())
    made.stop = frozenset()
    return made


def test_all_of_them_answer_beside_the_baseline(tiny_llama):
    methods = parse_all(["full", "redundant:budget=40,every=16", "top-pages:top=1", "codebook", "redundant + codebook"])
    made = engine(tiny_llama)
    made.calibrate(methods, lambda: list(range(60)))
    found = list(made.generate(REQUESTS, methods, width=2))
    assert len(found) == 5 * len(REQUESTS)
    assert not any(r.error for r in found)
    by = {(r.method, r.id): r for r in found}
    for r in REQUESTS:
        full, some = by["full", r.id], by["top-pages:top=1", r.id]
        assert full.read_end == full.nbytes_end
        assert some.nbytes_end > full.nbytes_end, "it keeps everything, and what it knows of pages"
        assert some.read_end < some.nbytes_end / 2, "and reads a page or two of five"
        assert by["redundant:budget=40,every=16", r.id].nbytes_end < full.nbytes_end / 2
        assert by["top-pages:top=1", r.id].path == "full/reference"
        assert by["codebook", r.id].path == "codebook/reference"


def test_a_number_of_each_hidden_state_is_kept_and_decides(tiny_llama):
    """The tokens with the largest hidden states stay, of the prompt and of the answer, through two compactions: those
    that the layer's norm in float64 makes of what goes into the layer."""
    made = engine(tiny_llama)
    method = parse("loud:budget=24,every=16,recent=4")
    (observed,) = method.observes
    assert isinstance(observed, HiddenStates)
    block, sizes = made.model.model.layers[1], []
    norm = block.input_layernorm

    def note(module, args):
        x = args[0][0].double()
        x = x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight.double()
        sizes.extend(x.abs().amax(-1).tolist())

    hook = block.register_forward_pre_hook(note)
    prompt = made.prefill(REQUESTS[0], list(range(60)), [], method.observes)
    worker = made.worker(method, 2, [(60, 40)])
    decoder, layer = Decoder(made.model, [worker], 2), worker.caches[1]
    assert not list(decoder.admit(worker, prompt))
    for step in range(35):
        before = [held.positions.tolist() for held in layer.read(0)]
        if step == 0:
            assert before == [[*sorted(sorted(range(56), key=lambda p: -sizes[p])[:20]), *range(56, 60)]] * 2
        list(decoder.step())
        seen = len(sizes)
        assert seen == 61 + step
        for had, held in zip(before, layer.read(0), strict=True):
            expected = [*had, seen - 1]
            if (seen - 60) % 16 == 0:
                order = sorted(expected, key=lambda p: -sizes[p] if p < seen - 4 else -math.inf)
                expected = sorted(order[:24])
            assert held.positions.tolist() == expected
    hook.remove()
    assert worker.backend == "reference"


def test_a_backend_that_refuses_says_why(tiny_llama):
    asked = TransformersEngine(tiny_llama, Letters(), backend="triton")
    worker = asked.worker(parse("top-pages"), 1, [(60, 4)])
    assert worker.path == "full/reference"
    assert worker.refusal.startswith("triton: ")
    assert worker.refusal != "triton: no GPU"


@pytest.mark.parametrize("text", ["top-pages:top=1", "h2o:budget=90 + int8 + top-pages:top=2"])
def test_the_checker_compares_with_what_was_read(text):
    cache = loaded(parse(text), [context(160, 0)], 20)
    for n in range(20):
        q, k, v = (x[None] for x in tokens(1, n))
        checker, all_of_it = AttentionChecker(), AttentionChecker()
        cache.append(k, v)
        for one in (checker, all_of_it):
            one.before(cache)
        out = cache.attend(q, SCALE)
        checker.after(cache, (0,), q, out, SCALE, None, None, None)
        assert checker.worst <= 1
        chosen, cache.pages_read = cache.pages_read, None
        all_of_it.after(cache, (0,), q, out, SCALE, None, None, None)
        assert all_of_it.worst > 1, "it did not read all"
        assert all(len(columns) <= parse(text).reader.top + 1 for columns in chosen[0])
    assert cache.read_nbytes(0) < cache.row_nbytes(0)


MOVING = [
    "redundant:budget=60,every=16 + top-pages:top=1",
    "streaming-llm:budget=40,positions=absolute + kivi:bits=4,group=16,residual=32 + top-pages:top=1",
]


@pytest.mark.parametrize("text", ["top-pages:top=1", "h2o:budget=40 + int8 + top-pages:top=1", *MOVING])
def test_what_a_reader_knows_of_a_page_is_true_after_every_step(text):
    steps = 130 if "kivi" in text else 60
    cache, free = loaded(parse(text), [context(80, 0)], steps), []
    for n in range(steps):
        q, k, v = (x[None] for x in tokens(1, n))
        cache.append(k, v)
        cache.attend(q, SCALE)
        free.append(len(cache.kv.allocator))
        for g, held in enumerate(cache.read()):
            for column in set((held.slots // PAGE).tolist()):
                keys = held.k[held.slots // PAGE == column]
                page = int(cache.kv.table[0, g, column])
                low, high = cache.kv.summaries[0][page]
                assert torch.equal(low, keys.amin(0))
                assert torch.equal(high, keys.amax(0))
    assert (text in MOVING) == any(b > a for a, b in pairwise(free)), "pages went back"


def test_a_calibrated_codec_carries_the_hash_of_what_it_learned(tiny_llama):
    made, hashes = engine(tiny_llama), []
    for text in (list(range(60)), list(range(60, 120)), list(range(60))):
        made.calibrate(parse_all(["full,codebook"]), lambda text=text: text)
        found = {r.method: r for r in made.generate(REQUESTS[:1], parse_all(["full,codebook"]), width=1)}
        assert found["full"].artifact == ""
        hashes.append(found["codebook"].artifact)
    assert len(hashes[0]) == 16
    assert hashes[0] == hashes[2] != hashes[1]


def test_nothing_is_read_where_nothing_must_be_learned(tiny_llama):
    engine(tiny_llama).calibrate(parse_all(["full,int8,h2o:budget=20"]), lambda: pytest.fail("no text is wanted"))


@dataclass(frozen=True)
class Tova:
    """Evicts what the newest query attends to least, the same token in all heads."""

    every: int = 1
    rerotated_sinks: int = 0
    observes: tuple = (NewestAttention(),)

    def parameters(self, length):
        return ()

    def score(self, state):
        return state.newest_attention.mean(-2, keepdim=True).expand_as(state.newest_attention)


def test_the_attention_of_the_newest_query_decides_where_a_method_asks_for_it():
    where = layer(torch.float32)
    cache = LayerCache(where, parse("full").codec.specs(where), 1, 64, eviction=Tova())
    cache.load(0, context(20, 0, torch.float32), None, [20] * KV_HEADS)
    for n in range(30):
        q, k, v = tokens(1, n, torch.float32)
        cache.append(k[None], v[None])
        before = cache.read()
        cache.attend(q[None], SCALE)
        weights = torch.stack([naive.weights(q[h], before[h // 2].k, SCALE)[0] for h in range(4)]).mean(0)
        for own, held in zip(before, cache.read(), strict=True):
            (gone,) = set(own.positions.tolist()) - set(held.positions.tolist())
            assert weights[own.positions.tolist().index(gone)] <= weights.min() + 1e-6
    assert cache.kept(0) == 20 * KV_HEADS


def test_what_cannot_be_is_refused(tiny_llama, monkeypatch):
    found = list(engine(tiny_llama).generate(REQUESTS[:1], parse_all(["full,codebook"]), width=1))
    errors = {r.method: r.error for r in found}
    assert errors == {"full": "", "codebook": "UsageError: codebook must be calibrated before it is used"}
    with pytest.raises(UsageError, match="keys that move"):
        parse("streaming-llm:budget=20 + top-pages").cache(layer(), 1, 64)
    with pytest.raises(UsageError, match="cannot be observed while"):
        LayerCache(layer(), parse("full").codec.specs(layer()), 1, 64, eviction=Tova(observes=(PreRopeMoments(),)))
    from kvsuite.kernels import triton

    assert choose(layer(), *parse("full").codec.specs(layer()), Needs(), "triton")[1] == ""
    monkeypatch.setattr(triton, "interpreting", lambda: False)
    assert choose(layer(), *parse("full").codec.specs(layer()), Needs(), "triton")[1] == "triton: no GPU"


def test_what_an_eviction_must_see_of_the_prompt_is_asked_for():
    """Its ring of queries begins with the prompt's last ones."""
    method = parse("redundant:budget=40,every=16")
    assert method.observes == (LastQueries(8),)
    seen = context(60, 0)
    cache = loaded(method, [seen], 4)
    ring = torch.arange(52, 60) % 8
    assert torch.equal(cache.kv.recent_queries[0][:, ring], seen[LastQueries(8)])


class Sinks:
    """Re-rotates four sinks; evicts or compacts to the newest tokens behind them."""

    rerotated_sinks, observes = 4, ()

    def __init__(self, every):
        self.every = every

    def parameters(self, length):
        return ()

    def score(self, state):
        return state.positions.float().masked_fill(state.positions < 4, float("inf"))


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("budgets", [(12, 12), (40, 12), (12, 40), (22, 30)])
def test_sinks_are_one_rotation_from_their_originals_whatever_the_heads_keep(every, budgets):
    """Each head by itself: complete ones beside ones that lack tokens, through evictions and compactions."""
    where = layer(torch.float32)
    cache = LayerCache(where, parse("full").codec.specs(where), 1, 96, eviction=Sinks(every))
    seen = context(24, 0, torch.float32)
    keep = [torch.tensor([*range(4), *range(28 - n, 24)]) if n < 24 else torch.arange(24) for n in budgets]
    cache.load(0, seen, keep, budgets)
    for n in range(40):
        q, k, v = (x[None] for x in tokens(1, n, torch.float32))
        cache.append(k, v)
        cache.attend(q, SCALE)
        for g, held in enumerate(cache.read()):
            gap = cache.seen(0) - len(held.positions)
            assert held.positions[:4].tolist() == [0, 1, 2, 3]
            torch.testing.assert_close(held.k[:4], where.rope.rotate(seen.k[g, :4], gap), rtol=1e-5, atol=1e-5)
