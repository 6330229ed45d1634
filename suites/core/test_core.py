"""pytest -m "throughput and nightly" suites/core: what kvsuite promises of itself, measured on this machine; no part of
an evaluation. Both sides alternate in one session. The figures are shown in the report. None fails a run, since they
are this machine's as much as ours."""

import statistics
import time

import pytest

from kvsuite.engines.request import Request
from kvsuite.methods import parse, parse_all
from kvsuite.records import Timing

pytestmark = [pytest.mark.throughput, pytest.mark.nightly]

LENGTH = 512
EIGHT = parse_all(
    ["full,jitter,int8,kivi:bits=4,kivi:bits=2,streaming-llm:budget=256,random:budget=256,random:budget=128+int8"]
)


def timed(run):
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def record(kv_local, cells, method, **rest):
    worker, worst = cells[-1].worker, max(cell.checked for cell in cells)
    where = {"cache": worker.provenance, "path": worker.path, "checked": worst, "length": LENGTH}
    kv_local.record(Timing(method, **where, **rest))


def not_yet(kv_local, method, phase, width):
    kv_local.skip_recorded(Timing(method, phase=phase, width=width, length=LENGTH).job)


def checked(engine, methods, prompt, width, steps):
    from kvsuite.engines import timing

    cells = [timing.DecodeCell(engine, method, prompt, width, steps) for method in methods]
    for cell in cells:
        cell.check()
    return cells


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_many_methods_cost_one_prefill(kv_local, benchmark, count):
    name = f"{count} methods" if count > 1 else "1 method"
    not_yet(kv_local, name, "shared prefill", 1)
    engine, ids, alone, together = kv_local.engine, kv_local.text(LENGTH), [], []
    cells = checked(engine, EIGHT[:count], kv_local.prompt(LENGTH), 1, 2)

    def prefill():
        return engine.prefill(Request("prefill", "", "", 1), ids, [], frozenset())

    def answer():
        ready = prefill()
        for cell in cells:
            cell.compress(ready)

    def turn():
        alone.append(timed(prefill))

    benchmark.pedantic(lambda: together.append(timed(answer)), setup=turn, rounds=5, warmup_rounds=1)
    rounds = {"seconds": together[1:], "baseline_seconds": alone[1:]}
    record(kv_local, cells, name, phase="shared prefill", tokens=LENGTH, **rounds)


def test_what_width_8_is_worth(kv_local, benchmark):
    not_yet(kv_local, "full", "width", 8)
    rounds, prompt = 24, kv_local.prompt(LENGTH)
    one, eight = (checked(kv_local.engine, [parse("full")], prompt, width, rounds)[0] for width in (1, 8))
    before, after = [], []
    benchmark.pedantic(lambda: after.append(eight.round()), setup=lambda: before.append(one.round()), rounds=rounds)
    seconds = {"seconds": after, "baseline_seconds": before}
    record(kv_local, [one, eight], "full", phase="width", width=8, tokens=8, **seconds)


def test_what_the_suite_adds_to_a_step(kv_local):
    """A timed step against the model and the choice of a token alone: what is around them is ours. Printed (-s)."""
    from kvsuite.engines import timing

    cell = timing.DecodeCell(kv_local.engine, parse("full"), kv_local.prompt(min(kv_local.options.length)), 8, 30)
    cell.check()
    inside, forward = [], cell.decoder._logits

    def timed(*inputs):
        start = time.perf_counter()
        logits = forward(*inputs)
        logits.argmax(-1).tolist()
        inside.append(time.perf_counter() - start)
        return logits

    cell.decoder._logits = timed
    whole = [cell.round() for _ in range(25)]
    share = statistics.median(1 - a / b for a, b in zip(inside, whole, strict=True))
    print(f"the suite's share of a decode step: {share:.1%} (median of 25)")
