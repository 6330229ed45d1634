"""pytest -m throughput: speed of every method against `full`, which runs in turn with it; each cell is one record."""

import time

import pytest

from kvsuite.methods import parse
from kvsuite.records import Timing

pytestmark = pytest.mark.throughput


def run_cell(kv_local, benchmark, cell, make):
    """Check both sides, time them in turn, record what came out, whatever came out; raise what went wrong."""
    from kvsuite.engines.pool import PATIENCE

    o, found, before, after = kv_local.options, {}, [], []
    kv_local.skip_recorded(Timing(**cell).job)
    try:
        baseline, mine, found = make()
        start = time.perf_counter()

        def turn():
            before.append(baseline.round())
            limit = o.timeout + PATIENCE * sum(before)
            if time.perf_counter() - start > limit:
                raise TimeoutError(f"took more than {limit:.3g} s")

        rounds = o.rounds if cell["phase"] == "decode" else max(3, o.rounds // 3)
        warm = 1 if cell["phase"] == "decode" else 0
        with kv_local.progress.over(f"{cell['phase']} {cell['method']}", rounds + warm) as done:

            def timed():
                after.append(mine.round())
                done(found["tokens"])

            benchmark.pedantic(timed, setup=turn, rounds=rounds, warmup_rounds=warm)
        record = Timing(**cell, **found, seconds=after[warm:], baseline_seconds=before[warm:])
    except Exception as error:
        kv_local.record(Timing(**cell, **found, status="failed", error=f"{type(error).__name__}: {error}"))
        if cell["method"] == "full":
            kv_local.baseline(str(error))
        raise
    kv_local.record(record)
    kv_local.baseline("")
    benchmark.extra_info["record"] = {"method": record.method, "path": record.path, "nbytes": record.nbytes}


def ours(worker):
    """Where a timing comes from: the very attributes an answer's record has."""
    names = {"cache": worker.provenance, "path": worker.path, "refusal": worker.refusal, "artifact": worker.artifact}
    return names | {"nbytes": worker.nbytes, "nbytes_read": worker.read_nbytes}


def test_decode(kv_local, timing, benchmark, kv_method, kv_batch, kv_length):
    def make():
        prompt = kv_local.prompt(kv_length)
        steps = kv_local.options.rounds + 2
        cells = [timing.DecodeCell(kv_local.engine, m, prompt, kv_batch, steps) for m in (parse("full"), kv_method)]
        for cell in cells:
            cell.check()
        worker = cells[1].worker
        return *cells, ours(worker) | {"checked": cells[1].checked, "tokens": kv_batch}

    cell = {"method": kv_method.name, "phase": "decode", "width": kv_batch, "length": kv_length}
    run_cell(kv_local, benchmark, cell, make)


def test_prefill(kv_local, timing, benchmark, kv_method, kv_prefill):
    def make():
        ids = kv_local.text(kv_prefill)
        cells = [timing.PrefillCell(kv_local.engine, m, ids) for m in (parse("full"), kv_method)]
        for cell in cells:
            cell.check()
        worker = cells[1].inner.worker
        return *cells, ours(worker) | {"checked": cells[1].checked, "tokens": kv_prefill}

    cell = {"method": kv_method.name, "phase": "prefill", "width": 1, "length": kv_prefill}
    run_cell(kv_local, benchmark, cell, make)


def test_transformers(kv_local, timing, benchmark, kv_batch, kv_length):
    def make():
        steps = kv_local.options.rounds + 2
        full = timing.DecodeCell(kv_local.engine, parse("full"), kv_local.prompt(kv_length), kv_batch, steps)
        full.check()
        other = timing.TransformersCell(kv_local.engine, kv_local.text(kv_length), kv_batch)
        found = {"cache": "transformers.cache_utils.DynamicCache", "path": "sdpa"}
        return full, other, found | {"nbytes": other.nbytes, "tokens": kv_batch}

    cell = {"method": "transformers", "phase": "decode", "width": kv_batch, "length": kv_length}
    run_cell(kv_local, benchmark, cell, make)


def test_a_cache_nobody_checked_is_not_timed(kv_local, timing):
    cell = timing.DecodeCell(kv_local.engine, parse("full"), kv_local.prompt(min(kv_local.options.length)), 1, 2)
    with pytest.raises(timing.Unchecked, match="only after its output was checked"):
        cell.round()
