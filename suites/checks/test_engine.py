"""The transformers engine: an answer belongs to its prompt alone, whatever is decoded beside it."""

import collections
import time

import numpy as np
import pytest
import torch

from kvsuite.cache.layer import LayerCache
from kvsuite.engines.decoder import Decoder, padded_width
from kvsuite.engines.request import Request
from kvsuite.engines.sampling import Sampling, gumbel
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.engines.worker import MethodWorker
from kvsuite.errors import UsageError
from kvsuite.methods import parse, parse_all

METHODS = (
    "full,jitter,int8,kivi:bits=2,group=16,residual=16,streaming-llm:budget=20,h2o:budget=20,random:budget=20,"
    "h2o:budget=20+kivi:bits=4,residual=32"
)


class Letters:
    """One token per character."""

    chat_template = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) for c in text], "offset_mapping": [(i, i + 1) for i in range(len(text))]}

    def decode(self, ids, **_):
        return "".join(chr(32 + i % 90) for i in ids)


def engine_of(model, dtype=torch.float32, backend="auto"):
    model = type(model)(model.config).to(dtype).eval()
    torch.manual_seed(3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    engine = TransformersEngine(model, Letters(), backend=backend)
    engine.stop = frozenset(range(5, 128, 12))
    return engine


def requests(count=9):
    draw = np.random.default_rng(5)
    texts = ["".join(map(chr, draw.integers(40, 120, size))) for size in draw.integers(30, 120, count)]
    return [Request(f"r{i}", text, "?+?", 6 + 3 * (i % 3)) for i, text in enumerate(texts)]


def answers(engine, asked, **how):
    found = {}
    for r in engine.generate(asked, parse_all([METHODS]), **how):
        assert r.finish != "error", r.error
        found[r.method, r.id] = (r.tokens, r.margins, r.finish, r.nbytes, r.kept)
    assert len(found) == len(asked) * len(parse_all([METHODS]))
    return found


@pytest.mark.parametrize("compress", ["prompt", "context"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_answer_is_bitwise_independent_of_mates_row_and_order(tiny_llama, dtype, compress):
    engine, asked = engine_of(tiny_llama, dtype), requests()
    whole = answers(engine, asked, width=4, compress=compress)
    turned = answers(engine, asked[::-1], width=4, compress=compress)
    assert turned == whole
    alone = answers(engine, asked[4:5], width=4, compress=compress)
    assert alone == {key: value for key, value in whole.items() if key[1] == "r4"}


def test_across_widths_answers_differ_only_at_close_calls(tiny_llama):
    engine, asked = engine_of(tiny_llama), requests()
    one, eight = answers(engine, asked, width=1), answers(engine, asked, width=8)
    for key, (tokens, margins, *_) in one.items():
        other = eight[key][0]
        first = next((i for i, (a, b) in enumerate(zip(tokens, other, strict=False)) if a != b), None)
        assert (tokens == other) if first is None else margins[first] < 1e-3


def test_the_suffix_asks_the_same_question(tiny_llama):
    engine, asked = engine_of(tiny_llama), requests()
    prompt, context = (answers(engine, asked, compress=mode) for mode in ("prompt", "context"))
    for i in range(len(asked)):
        tokens, margins, *_ = prompt["full", f"r{i}"]
        other = context["full", f"r{i}"][0]
        assert tokens == other or min(margins) < 1e-3
    changed = [key for key in prompt if prompt[key][0] != context[key][0] and key[0] != "full"]
    assert changed, "a compressed context answers some questions otherwise"


def test_stop_tokens_and_the_cap_end_an_answer(tiny_llama):
    engine = engine_of(tiny_llama)
    found = list(engine.generate(requests(), [parse("full")], width=2))
    caps = {r.id: r.max_new_tokens for r in requests()}
    for r in found:
        assert (r.finish == "stop") == (r.tokens[-1] in engine.stop)
        assert not engine.stop.intersection(r.tokens[:-1])
        assert len(r.tokens) <= caps[r.id]
        assert r.finish == "stop" or len(r.tokens) == caps[r.id]
    assert {r.finish for r in found} == {"stop", "length"}


def test_a_failing_method_costs_itself_only(tiny_llama, monkeypatch):
    engine, asked = engine_of(tiny_llama, backend="reference"), requests(5)  # which encodes in Python
    from kvsuite.methods.codecs import int8

    expected = {r.id: r.tokens for r in engine.generate(asked, [parse("full")], width=2)}
    calls = collections.Counter()
    encode = int8.PerToken.encode

    def breaks(self, x, fitted):
        calls["encode"] += 1
        if calls["encode"] > 20:
            raise RuntimeError("out of memory")
        return encode(self, x, fitted)

    monkeypatch.setattr(int8.PerToken, "encode", breaks)
    found = list(engine.generate(asked, parse_all(["full,int8"]), width=2))
    assert {r.id: r.tokens for r in found if r.method == "full"} == expected
    broken = [r for r in found if r.method == "int8" and r.finish == "error"]
    assert len([r for r in found if r.method == "int8"]) == 5
    assert broken
    assert all("out of memory" in r.error for r in broken)


def test_a_prompt_that_cannot_be_prefilled_costs_its_own_answers(tiny_llama, monkeypatch):
    engine, asked, prefill = engine_of(tiny_llama), requests(4), TransformersEngine.prefill

    def breaks(self, request, *rest):
        if request.id == "r1":
            raise MemoryError("no room for this prompt")
        return prefill(self, request, *rest)

    monkeypatch.setattr(TransformersEngine, "prefill", breaks)
    found = list(engine.generate(asked, parse_all(["full,int8"]), width=2))
    assert {(r.id, r.method) for r in found if r.finish == "error"} == {("r1", "full"), ("r1", "int8")}
    assert len(found) == 8


def test_logits_that_are_not_finite_are_an_error(tiny_llama, monkeypatch):
    engine = engine_of(tiny_llama)
    engine.stop = frozenset()
    from kvsuite.methods.codecs import full

    monkeypatch.setattr(full.Plain, "verbatim", False)
    monkeypatch.setattr(full.Plain, "encode", lambda self, x, fitted: (x[:, :, 0] * float("nan"),))
    found = list(engine.generate(requests(3), [parse("full")], width=2))
    assert [r.finish for r in found] == ["error"] * 3
    assert all("not finite" in r.error for r in found)


def test_a_prompt_beyond_the_context_is_refused_before_anything_runs(tiny_llama):
    engine = engine_of(tiny_llama)
    engine.model.config.max_position_embeddings = 100
    with pytest.raises(UsageError, match="sample r long needs"):
        list(engine.generate([Request("r long", "x" * 95, "?", 10)], [parse("full")]))
    engine.model.config.max_position_embeddings = 4096


def test_many_methods_prefill_once(tiny_llama, monkeypatch):
    engine, calls = engine_of(tiny_llama), []
    prefill = TransformersEngine.prefill
    monkeypatch.setattr(TransformersEngine, "prefill", lambda *a: calls.append(a[1].id) or prefill(*a))
    answers(engine, requests(5), width=2)
    assert calls == [r.id for r in requests(5)]


def test_rows_are_freed_and_reused(tiny_llama):
    engine = engine_of(tiny_llama)
    with torch.inference_mode():
        worker = MethodWorker(parse("full"), engine.layers, 2, [(100, 100)])
        decoder = Decoder(engine.model, [worker], 2)
        for request in requests(2):
            list(decoder.admit(worker, engine.prefill(request, *engine.encode(request, "prompt"))))
        assert worker.full
        ended = []
        while decoder.active:
            ended += decoder.step()
    assert sorted(r.id for r in ended) == ["r0", "r1"]
    assert all(cache.nbytes == 0 for cache in worker.caches)


@pytest.mark.parametrize(("asked", "runs"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16)])
def test_width_is_padded_to_a_power_of_two(asked, runs):
    assert padded_width(asked) == runs


def test_sampling_follows_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    draws = collections.Counter(Sampling(0.7, seed=1).pick(logits, f"s{i}", 0) for i in range(4000))
    expected = torch.softmax(logits.double() / 0.7, 0)
    statistic = sum((draws[i] - 4000 * p) ** 2 / (4000 * p) for i, p in enumerate(expected.tolist()))
    assert statistic < 16.27, "χ² with 3 degrees of freedom at 0.1 %"


def test_noise_is_keyed_by_everything_that_should_matter():
    keys = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    noise = [gumbel(key, 500) for key in keys]
    for i, a in enumerate(noise):
        assert np.array_equal(a, gumbel(keys[i], 500))
        assert np.array_equal(a[:100], gumbel(keys[i], 100)), "a token's noise does not depend on the vocabulary"
        assert all(abs(np.corrcoef(a, b)[0, 1]) < 0.2 for b in noise[i + 1 :])


def test_sampled_answers_do_not_depend_on_mates(tiny_llama):
    engine, asked = engine_of(tiny_llama), requests()
    how = {"width": 4, "sampling": Sampling(1.0, seed=2)}
    whole = answers(engine, asked, **how)
    assert answers(engine, asked[::-1], **how) == whole
    assert answers(engine, asked, width=4, sampling=Sampling(1.0, seed=3)) != whole
    assert answers(engine, asked, width=4) != whole


def breaking(monkeypatch, method, after):
    """One method's attention raises after as many calls."""
    calls = []
    attend = LayerCache.attend

    def broken(self, *args, **more):
        if type(self.kv.k.spec).__name__ == method:
            calls.append(1)
            if len(calls) > after:
                raise RuntimeError("this cache is broken")
        return attend(self, *args, **more)

    monkeypatch.setattr(LayerCache, "attend", broken)


@pytest.mark.parametrize("after", [0, 7])
@pytest.mark.parametrize("compress", ["prompt", "context"])
def test_a_method_that_fails_costs_itself_in_a_shared_step(tiny_llama, monkeypatch, after, compress):
    engine, asked = engine_of(tiny_llama), requests(5)
    methods = parse_all(["full,int8,h2o:budget=20"])
    whole = {(r.method, r.id): r.tokens for r in engine.generate(asked, methods, width=2, compress=compress)}
    breaking(monkeypatch, "PerToken", after)
    found = {(r.method, r.id): r for r in engine.generate(asked, methods, width=2, compress=compress)}
    assert found.keys() == whole.keys(), "every method answers every request once, failed or not"
    failed = {key for key, r in found.items() if r.error}
    assert failed
    assert {method for method, _ in failed} == {"int8"}
    assert {found[key].error for key in failed} == {"RuntimeError: this cache is broken"}
    for key in found.keys() - failed:  # an answer of one token never attends
        assert found[key].tokens == whole[key]


def test_a_model_that_fails_is_told_by_all(tiny_llama, monkeypatch):
    engine = engine_of(tiny_llama)
    monkeypatch.setattr(Decoder, "_forward", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    found = list(engine.generate(requests(3), parse_all(["full,int8"]), width=2))
    assert sorted((r.method, r.id) for r in found) == sorted((m, f"r{i}") for m in ("full", "int8") for i in range(3))
    assert {r.error for r in found} == {"MemoryError: no room"}


@pytest.mark.parametrize("compress", ["prompt", "context"])
def test_an_answer_does_not_depend_on_other_methods_nor_on_memory(tiny_llama, compress):
    engine, asked = engine_of(tiny_llama), requests()
    how = {"width": 2, "compress": compress}
    whole = answers(engine, asked, **how)
    assert answers(engine, asked, **how, memory=1) == whole, "one sequence at a time"
    for method in ("full", "h2o:budget=20", "streaming-llm:budget=20"):
        alone = {(r.method, r.id): (r.tokens, r.margins) for r in engine.generate(asked, parse_all([method]), **how)}
        assert alone == {key: value[:2] for key, value in whole.items() if key[0] == method}


def test_seconds_of_a_shared_step_are_shared_out(tiny_llama, monkeypatch):
    attend = LayerCache.attend

    def slow(self, *args, **more):
        if type(self.kv.k.spec).__name__ == "PerToken":
            time.sleep(0.01)
        return attend(self, *args, **more)

    monkeypatch.setattr(LayerCache, "attend", slow)
    start = time.perf_counter()
    found = list(engine_of(tiny_llama).generate(requests(4), parse_all(["full,int8"]), width=4))
    wall = time.perf_counter() - start
    own = {name: sum(r.decode_share for r in found if r.method == name) for name in ("full", "int8")}
    assert sum(own.values()) <= wall
    steps = max(len(r.tokens) for r in found if r.method == "int8") - 1
    assert own["int8"] >= steps * 2 * 0.01, "two layers"
    assert own["int8"] > 2 * own["full"]


@pytest.mark.parametrize("text", ["h2o:budget=2000", "streaming-llm:budget=2000", "h2o:budget=2000+int8"])
def test_a_question_fed_with_the_steps_is_the_question_fed_at_once(tiny_llama, text):
    """A budget that keeps everything: an evicting method then is what it stores in, its question a token at a step."""
    plain = text.partition("+")[2] or "full"
    asked = [Request(r.id, r.context, "".join(map(chr, range(60 + i, 70 + i))), 9) for i, r in enumerate(requests(5))]
    found = {}
    for r in engine_of(tiny_llama).generate(asked, parse_all([f"{plain},{text}"]), width=2, compress="context"):
        assert r.prompt_tokens == r.context_tokens + 10
        found[r.method, r.id] = r
    for request in asked:
        one, other = found[plain, request.id], found[parse(text).name, request.id]
        assert one.tokens == other.tokens
        assert one.kept == other.kept
        assert one.margins == pytest.approx(other.margins, abs=1e-3)
