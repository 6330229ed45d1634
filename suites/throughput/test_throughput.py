"""pytest -m throughput: speed of every method against `full`, which runs in turn with it; each cell is one record."""

import statistics
import time

import pytest

from kvsuite.methods import parse
from kvsuite.records import Timing

pytestmark = pytest.mark.throughput


STEPS = 2
"""Of a side's turn; a block has two turns of each."""


def steps_of(blocks):
    """The steps that either side takes, those of the block that warms up included."""
    return 2 * STEPS * (blocks + 1)


def run_cell(kv_local, benchmark, cell, make):
    """Check both sides, time them in blocks of A B B A, record what came out in any case; raise what went wrong."""
    from kvsuite.engines.pool import PATIENCE

    o, found, before, after = kv_local.options, {}, [], []
    decodes = cell["phase"] == "decode"
    kv_local.skip_recorded(Timing(**cell).job)
    try:
        baseline, mine, found = make()
        start = time.perf_counter()

        def turn(side):
            return sum(side.round() for _ in range(STEPS if decodes else 1))

        rounds, warm = (o.rounds, 1) if decodes else (max(2, o.rounds // 4), 0)
        with kv_local.progress.over(f"{cell['phase']} {cell['method']}", rounds + warm) as done:

            def block():
                """A B B A: what drifts meanwhile meets both sides alike."""
                first, one, other, last = (turn(side) for side in (baseline, mine, mine, baseline))
                before.append(first + last)
                after.append(one + other)
                done(found["tokens"])
                limit = o.timeout + PATIENCE * sum(before)
                if time.perf_counter() - start > limit:
                    raise TimeoutError(f"took more than {limit:.3g} s")

            benchmark.pedantic(block, rounds=rounds, warmup_rounds=warm)
        record = Timing(**cell, **found, seconds=after[warm:], baseline_seconds=before[warm:])
    except Exception as error:
        kv_local.record(Timing(**cell, **found, status="failed", error=f"{type(error).__name__}: {error}"))
        if cell["method"] == "full":
            kv_local.baseline(str(error))
        raise
    kv_local.record(record)
    kv_local.baseline("")
    benchmark.extra_info["record"] = {"method": record.method, "path": record.path, "nbytes": record.nbytes}
    if record.seconds:  # what kvsuite predict throughput reads of pytest-benchmark's JSON
        benchmark.extra_info |= {
            "model": kv_local.model_name, "method": record.method, "bsz": record.width, "prompt_len": record.length,
            "stage": "prefill" if record.phase == "prefill" else "decoding",
            "thr": record.tokens / statistics.median(record.seconds),
        }  # fmt: skip


def ours(worker):
    """Where a timing comes from: the very attributes an answer's record has."""
    names = {"cache": worker.provenance, "path": worker.path, "refusal": worker.refusal, "artifact": worker.artifact}
    return names | {"nbytes": worker.nbytes, "nbytes_read": worker.read_nbytes}


def test_decode(kv_local, timing, benchmark, kv_method, kv_batch, kv_length):
    def make():
        prompt = kv_local.prompt(kv_length)
        steps = steps_of(kv_local.options.rounds)
        cells = [timing.DecodeCell(kv_local.engine, m, prompt, kv_batch, steps) for m in (parse("full"), kv_method)]
        for cell in cells:
            cell.check()
        worker = cells[1].worker
        return *cells, ours(worker) | {"checked": cells[1].checked, "tokens": 2 * STEPS * kv_batch}

    cell = {"method": kv_method.name, "phase": "decode", "width": kv_batch, "length": kv_length}
    run_cell(kv_local, benchmark, cell, make)


def test_prefill(kv_local, timing, benchmark, kv_method, kv_prefill):
    def make():
        ids = kv_local.text(kv_prefill)
        cells = [timing.PrefillCell(kv_local.engine, m, ids) for m in (parse("full"), kv_method)]
        for cell in cells:
            cell.check()
        worker = cells[1].inner.worker
        return *cells, ours(worker) | {"checked": cells[1].checked, "tokens": 2 * kv_prefill}

    cell = {"method": kv_method.name, "phase": "prefill", "width": 1, "length": kv_prefill}
    run_cell(kv_local, benchmark, cell, make)


def test_transformers(kv_local, timing, benchmark, kv_batch, kv_length):
    def make():
        steps = steps_of(kv_local.options.rounds)
        full = timing.DecodeCell(kv_local.engine, parse("full"), kv_local.prompt(kv_length), kv_batch, steps)
        full.check()
        other = timing.TransformersCell(kv_local.engine, kv_local.text(kv_length), kv_batch)
        found = {"cache": "transformers.cache_utils.DynamicCache", "path": "sdpa"}
        return full, other, found | {"nbytes": other.nbytes, "tokens": 2 * STEPS * kv_batch}

    cell = {"method": "transformers", "phase": "decode", "width": kv_batch, "length": kv_length}
    run_cell(kv_local, benchmark, cell, make)


def test_a_cache_nobody_checked_is_not_timed(kv_local, timing):
    cell = timing.DecodeCell(kv_local.engine, parse("full"), kv_local.prompt(min(kv_local.options.length)), 1, 2)
    with pytest.raises(timing.Unchecked, match="only after its output was checked"):
        cell.round()
