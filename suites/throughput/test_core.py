"""pytest -m throughput: two promises of the core, on the default model. Both sides alternate in one session."""

import statistics
import time

import pytest
import torch

from kvsuite.engines.decoder import Decoder
from kvsuite.engines.request import Request
from kvsuite.engines.sampling import Sampling
from kvsuite.methods import parse, parse_all

pytestmark = pytest.mark.throughput

LENGTH = 512
EIGHT = parse_all(
    ["full,jitter,int8,kivi:bits=4,kivi:bits=2,streaming-llm:budget=256,random:budget=256,random:budget=128+int8"]
)


@pytest.fixture(scope="module")
def engine(kv_session):
    return kv_session.engine


@pytest.fixture(scope="module")
def prompt(engine):
    torch.manual_seed(0)
    return torch.randint(100, engine.model.config.vocab_size, (LENGTH,)).tolist()


def timed(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def pairs(benchmark, baseline, run, rounds):
    """Both sides in turn: the baseline in the set-up of each round. Returns the ratio of medians and both medians."""
    before, after = [], []
    benchmark.pedantic(
        lambda: after.append(timed(run)), setup=lambda: before.append(timed(baseline)), rounds=rounds, warmup_rounds=1
    )
    a, b = statistics.median(before[1:]), statistics.median(after[1:])
    return b / a, a, b


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_many_methods_cost_one_prefill(engine, prompt, benchmark, record_property, count):
    request = Request("prefill", "", "", 1)
    methods = EIGHT[:count]
    decoders = []
    with torch.inference_mode():
        for method in methods:
            capacity = method.capacity(LENGTH, 1)
            decoders.append(Decoder(engine.model, method, engine.layers, 1, capacity, Sampling(), frozenset()))

    def prefill():
        return engine.prefill(request, prompt, [], frozenset())

    def answer():
        ready = prefill()
        with torch.inference_mode():
            for decoder in decoders:
                assert len(list(decoder.admit(ready))) == 1

    ratio, alone, together = pairs(benchmark, prefill, answer, rounds=6)
    fact = {"kind": "cost", "what": f"prefill {LENGTH} tokens for {count} methods", "of": "the prefill alone"}
    record_property("kvsuite", fact | {"baseline": alone, "seconds": together, "ratio": ratio})
    benchmark.extra_info["ratio"] = ratio
    assert ratio < 1 + 0.5 * count, "a method costs its compression, far less than another prefill"


def test_decoding_at_width_8_is_worth_4_times_width_1(engine, prompt, benchmark, record_property):
    rounds, method = 24, parse("full")
    ready = engine.prefill(Request("decode", "", "", 1000), prompt, [], frozenset())
    decoders = {}
    with torch.inference_mode():
        for width in (1, 8):
            capacity = method.capacity(LENGTH, 2 * rounds)
            decoders[width] = Decoder(engine.model, method, engine.layers, width, capacity, Sampling(), frozenset())
            for _ in range(width):
                assert list(decoders[width].admit(ready)) == []

    def step(width):
        with torch.inference_mode():
            assert list(decoders[width].step()) == []

    ratio, one, eight = pairs(benchmark, lambda: step(1), lambda: step(8), rounds)
    gain = 8 / ratio
    fact = {"kind": "cost", "what": f"decode step at width 8, {LENGTH} tokens", "of": "a step at width 1"}
    record_property("kvsuite", fact | {"baseline": one, "seconds": eight, "ratio": ratio})
    benchmark.extra_info["tokens_per_second_gain"] = gain
    assert gain >= 4
