"""What a plug-in may bring: a selector that compacts, a reader of pages, a codec that must be calibrated. Through the
engine."""

from dataclasses import dataclass

import pytest
import torch

from kvsuite.cache.checker import AttentionChecker
from kvsuite.cache.layer import LayerCache
from kvsuite.cache.observations import NewestAttention
from kvsuite.engines.request import Request
from kvsuite.engines.transformers import TransformersEngine
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
    found = list(engine(tiny_llama).generate(REQUESTS, methods, width=2))
    assert len(found) == 5 * len(REQUESTS)
    assert not any(r.error for r in found)
    by = {(r.method, r.id): r for r in found}
    for r in REQUESTS:
        full, some = by["full", r.id], by["top-pages:top=1", r.id]
        assert full.read_end == full.nbytes_end
        assert some.nbytes_end > full.nbytes_end, "it keeps everything, and what it knows of pages"
        assert some.read_end < some.nbytes_end / 2, "and reads a page or two of five"
        assert by["redundant:budget=40,every=16", r.id].nbytes_end < full.nbytes_end / 2
        assert all(by[m.name, r.id].path == f"{m.codec.name}/reference" for m in methods)
        assert all(by[m.name, r.id].refusal == "triton: no GPU" for m in methods)


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


@pytest.mark.parametrize("text", ["top-pages:top=1", "h2o:budget=40 + int8 + top-pages:top=1", "redundant + top-pages"])
def test_what_a_reader_knows_of_a_page_is_true_after_every_step(text):
    cache = loaded(parse(text), [context(80, 0)], 60)
    for n in range(60):
        q, k, v = (x[None] for x in tokens(1, n))
        cache.append(k, v)
        cache.attend(q, SCALE)
        for g, held in enumerate(cache.read()):
            for column in set((held.slots // PAGE).tolist()):
                keys = held.k[held.slots // PAGE == column]
                page = int(cache.kv.table[0, g, column])
                low, high = cache.kv.summaries[0][page]
                assert torch.equal(low, keys.amin(0))
                assert torch.equal(high, keys.amax(0))


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


def test_the_newest_querys_attention_decides_where_a_method_asks_for_it():
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
