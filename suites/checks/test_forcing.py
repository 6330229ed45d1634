"""Forced documents: every arm reads the same tokens, and is held against the baseline at the same positions."""

import math
import time

import numpy as np
import pytest
import torch

from kvsuite.cache import adapter
from kvsuite.engines import forcing
from kvsuite.engines.decoder import Decoder
from kvsuite.engines.forcing import Continued, Forcing
from kvsuite.engines.request import Request
from kvsuite.engines.worker import MethodWorker
from kvsuite.methods import parse_all
from suites.checks.test_engine import engine_of

METHODS = "full,jitter,int8,kivi:bits=4,residual=32,h2o:budget=24"
JITTER, INT8, KIVI, H2O = (method.name for method in parse_all([METHODS])[1:])


@pytest.fixture(scope="module")
def engine(tiny_llama):
    return engine_of(tiny_llama)


def documents(count=5, forced=40):
    draw = np.random.default_rng(7)
    sizes = draw.integers(50, 120, count)
    return [
        Continued(
            Request(f"d{i}", "", "", 1), draw.integers(1, 128, n).tolist(), draw.integers(1, 128, forced).tolist()
        )
        for i, n in enumerate(sizes)
    ]


def read(engine, methods=METHODS, count=5, **how):
    asked, arms = documents(count), parse_all([methods])
    wanted = {(d.request.id, m.name) for d in asked for m in arms}
    found = {(r.response.id, r.response.method): r for r in Forcing(engine, arms, asked, **how).run(wanted)}
    assert found.keys() == wanted
    return found


def figures(found):
    return {key: (r.kl, r.flips, r.logs, r.response.nbytes, r.response.nbytes_end) for key, r in found.items()}


def test_full_against_itself_is_nothing_and_methods_differ_in_order(engine):
    found = read(engine)
    assert {r.response.error for r in found.values()} == {""}
    assert all(len(r.kl) == len(r.flips) == len(r.logs) == 39 for r in found.values())
    means = {method: np.mean([r.kl for (_, m), r in found.items() if m == method]) for method in {m for _, m in found}}
    assert {x for (_, m), r in found.items() if m == "full" for x in (*r.kl, *r.flips)} == {0}
    assert 0 < means[JITTER] < means[INT8] < means[KIVI] < means[H2O]


def test_what_arms_share_and_what_each_took_adds_up(engine):
    start = time.perf_counter()
    found = read(engine)
    wall, own = time.perf_counter() - start, dict.fromkeys((d for d, _ in found), 0.0)
    for (document, _), r in found.items():
        assert 0 < r.response.shared_seconds < r.response.prefill_seconds
        own[document] += r.response.prefill_seconds + r.response.decode_share - r.response.shared_seconds
    assert len({(d, r.response.shared_seconds) for (d, _), r in found.items()}) == len(own), "alike for all arms"
    shared = sum(found[document, "full"].response.shared_seconds for document in own)
    assert 0.5 * wall < sum(own.values()) + shared <= wall


def test_log_probabilities_are_the_models(engine):
    """Those of one pass over document and continuation, by transformers' own cache."""
    found = read(engine, "full")
    engine.model.set_attn_implementation("sdpa")
    try:
        for d in documents():
            with torch.inference_mode():
                logits = engine.model(torch.tensor([d.context + d.forced])).logits[0]
            expected = logits.float().log_softmax(-1)[len(d.context) : -1]  # after the first forced token
            ours = torch.tensor(found[d.request.id, "full"].logs)
            assert torch.allclose(ours, expected[range(39), d.forced[1:]], atol=1e-4)
    finally:
        engine.model.set_attn_implementation(adapter.NAME)


@pytest.mark.parametrize("method", ["full", "int8", "int4", "fp8"])
def test_chunks_and_single_tokens_agree(engine, method):
    """Where nothing is evicted and each token is encoded by itself, a continuation that is fed at once ends in the same
    distribution."""
    found = read(engine, f"full,{method}" if method != "full" else "full")
    (chosen,) = parse_all([method])
    for d in documents()[:2]:
        for size in (1, 7, 39):
            worker = engine.worker(chosen, 1, [(len(d.context), 40)])
            decoder = Decoder(engine.model, [worker], 1)
            prompt = engine.prefill(d.request, d.context, d.forced[:size])
            with torch.inference_mode():
                logits = decoder._feed_suffix(worker, worker.compress(prompt), prompt)
            after = logits.float().log_softmax(-1)[d.forced[size]]
            assert math.isclose(float(after), found[d.request.id, method].logs[size - 1], abs_tol=2e-3)


def test_an_arm_is_the_same_whoever_reads_beside_it_and_however_many(engine, monkeypatch):
    whole, few = figures(read(engine)), figures(read(engine, "full,int8"))
    assert {key: whole[key] for key in few} == few
    assert figures(read(engine, memory=1)) == whole, "a document at a time"
    some = Forcing(engine, parse_all([METHODS]), documents())
    only = list(some.run({("d3", "int8")}))
    assert [(r.response.id, r.response.method) for r in only] == [("d3", "int8")]
    assert figures({("d3", "int8"): only[0]}) == {("d3", "int8"): whole["d3", "int8"]}


def failing(monkeypatch, name, when):
    own = MethodWorker.compress

    def compress(self, prompt):
        if self.method.name == name and prompt.request.id == when:
            raise RuntimeError("no room")
        return own(self, prompt)

    monkeypatch.setattr(MethodWorker, "compress", compress)


def test_an_arm_that_fails_costs_itself(engine, monkeypatch):
    whole = figures(read(engine))
    monkeypatch.setattr(forcing, "TOGETHER", 10)  # two documents at a time
    apart = figures(read(engine))
    failing(monkeypatch, "int8", "d3")
    found = read(engine)
    errors = {key: r.response.error for key, r in found.items() if r.response.error}
    assert errors == {(f"d{i}", "int8"): "RuntimeError: no room" for i in (2, 3, 4)}
    assert {k: x for k, x in figures(found).items() if k not in errors} == {
        k: x for k, x in apart.items() if k not in errors
    }
    assert whole.keys() == apart.keys()


def test_without_a_baseline_nothing_is_compared(engine, monkeypatch):
    failing(monkeypatch, "full", "d0")
    errors = {(m, r.response.error) for (_, m), r in read(engine).items()}
    assert ("full", "RuntimeError: no room") in errors
    assert {said for m, said in errors if m != "full"} == {"the baseline failed"}


def test_an_arm_that_takes_too_long(engine, monkeypatch):
    monkeypatch.setattr(forcing, "PATIENCE", 0)
    found = read(engine, timeout=0)
    assert {r.response.error for (_, m), r in found.items() if m == "full"} == {""}
    assert all("took more than" in r.response.error for (_, m), r in found.items() if m != "full")
