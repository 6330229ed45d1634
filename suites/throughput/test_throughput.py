"""pytest -m throughput: speed of every method against `full`, which runs in turn with it; each cell is one record."""

import statistics
import time
import traceback
from functools import partial

import pytest

from kvsuite.engines import ranks
from kvsuite.methods import parse
from kvsuite.modes import PAGED, mode_of, phase_of
from kvsuite.records import OUT_OF_MEMORY, Timing

pytestmark = pytest.mark.throughput


STEPS = 2
"""Of a side's turn; a block has two turns of each."""
NO_MEMORY = ("CUDA out of memory", "can't allocate memory")
"""What torch says."""
LOST = "the processes of torchrun have lost each other"
TRANSFORMERS = {PAGED: "sdpa", "eager": "eager", "sdpa": "sdpa", "flash-attn": "flash_attention_2"}
"""The attention that transformers' own cache is timed with in every mode."""


def steps_of(blocks):
    """The steps that either side takes, those of the block that warms up included."""
    return 2 * STEPS * (blocks + 1)


def attended(side):
    """Seconds that the caches of a side have taken so far, where it says so."""
    return getattr(side, "attended", 0.0)


def run_cell(kv_local, benchmark, cell, make):
    """Check both sides, time them in blocks of A B B A, record what came out in any case; raise what went wrong."""
    from kvsuite.engines.pool import PATIENCE

    o, found, before, after, rest, attention = kv_local.options, {}, [], [], [], []
    what, mode = mode_of(cell["phase"])
    steps = 1 if what == "prefill" else STEPS
    try:
        kv_local.skip_recorded(Timing(**cell).job)
        baseline, mine, empty, found = make()
        found = ranks.together(found)
        start = time.perf_counter()

        def turn(side):
            return sum(ranks.at_once(side.round) for _ in range(steps))

        rounds, warm = (o.rounds, 1) if steps > 1 else (max(2, o.rounds // 4), 0)
        with kv_local.progress.over(f"{cell['phase']} {cell['method']}", rounds + warm) as done:

            def block():
                """A B B A: what drifts meanwhile meets both sides alike."""
                start_of = [attended(side) for side in (mine, baseline)]
                first, one = turn(baseline), turn(mine)
                if empty is not None:
                    rest.append(2 * turn(empty))
                other, last = turn(mine), turn(baseline)
                before.append(first + last)
                after.append(one + other)
                attention.append([attended(side) - was for side, was in zip((mine, baseline), start_of, strict=True)])
                done(found["tokens"])
                limit = o.timeout + PATIENCE * sum(before)
                if time.perf_counter() - start > limit:
                    raise TimeoutError(f"took more than {limit:.3g} s")

            benchmark.pedantic(block, rounds=rounds, warmup_rounds=warm)
        if len(after) < rounds + warm:
            raise RuntimeError("pytest-benchmark did not time it: is it switched off?")
        if rest and statistics.median(rest) >= min(*before, *after):
            raise RuntimeError("without any layer it takes as long: run more of them (layers=N)")
        timed = {"seconds": after[warm:], "baseline_seconds": before[warm:], "rest_seconds": rest[warm:]}
        if all(map(all, attention)):
            both = map(list, zip(*attention[warm:], strict=True))
            timed["attention_seconds"], timed["baseline_attention_seconds"] = both
        record = Timing(**cell, **found, **ranks.slowest(timed))
    except Exception as error:
        full = isinstance(error, MemoryError) or any(said in str(error) for said in NO_MEMORY)
        said = f"{OUT_OF_MEMORY}: {error}" if full else f"{type(error).__name__}: {error}"
        said, lost = ranks.failed(error, said)
        full = said.startswith(OUT_OF_MEMORY)
        kv_local.record(Timing(**cell, **found, status="failed", error=said))
        traceback.clear_frames(error.__traceback__)  # they hold caches, which the next cell needs the memory of
        if lost:
            pytest.exit(f"{LOST}: {said}", pytest.ExitCode.INTERRUPTED)
        if full:
            pytest.xfail(said)  # that is what was found out about this size
        if cell["method"] == "full" and mode == PAGED:
            kv_local.baseline(str(error))
        raise
    kv_local.record(record)
    kv_local.baseline("")
    benchmark.extra_info["record"] = {"method": record.method, "path": record.path, "nbytes": record.nbytes}
    if record.seconds and mode == PAGED:  # what kvsuite predict throughput reads of pytest-benchmark's JSON
        benchmark.extra_info |= {
            "model": kv_local.model_name, "method": record.method, "bsz": record.width, "prompt_len": record.length,
            "stage": "prefill" if what == "prefill" else "decoding",
            "thr": record.tokens / statistics.median(record.seconds),
        }  # fmt: skip


def limits(kv_local, asked, turns):
    """What this machine can do, and what a round asks of it."""
    from kvsuite.engines.limits import bandwidth, rate

    layer = kv_local.engine.layers[0]
    now = {"bandwidth": bandwidth(layer.device), "rate": rate(layer.device, layer.dtype)}
    return now | {"moved": turns * asked.moved, "operations": turns * asked.operations}


def rest_of(kv_local, timing, ids):
    """What runs beside the layers, where a shape was asked for with some of its layers; and how many times as many it
    has."""
    scale = kv_local.scale
    return (None, {}) if scale == 1 else (timing.RestCell(kv_local.engine, ids), {"scale": scale})


def ours(worker, peak):
    """Where a timing comes from: the very attributes an answer's record has. Then its memory."""
    names = {"cache": worker.provenance, "path": worker.path, "refusal": worker.refusal, "artifact": worker.artifact}
    held = {"nbytes": worker.nbytes, "nbytes_read": worker.read_nbytes}
    return names | held | {"allocated": worker.allocated, "peak": peak}


def test_decode(kv_local, timing, benchmark, kv_method, kv_batch, kv_length, kv_mode):
    from kvsuite.engines.limits import step

    def make():
        prompt, steps, room = kv_local.prompt(kv_length), steps_of(kv_local.options.rounds), kv_local.room()

        def side(method):
            make = partial(timing.DecodeCell, kv_local.engine, method, prompt, kv_batch, steps, kv_mode, room)
            return timing.measured(make, kv_local.engine.model.device)

        (full, _), (mine, peak) = side(parse("full")), side(kv_method)
        worker, turns = mine.worker, 2 * STEPS
        found = ours(worker, peak) | {"checked": mine.checked, "tokens": turns * kv_batch}
        empty, scaled = rest_of(kv_local, timing, [[5]] * kv_batch)
        return full, mine, empty, found | scaled | limits(kv_local, step(kv_local.engine.model, worker), turns)

    cell = {"method": kv_method.name, "phase": phase_of("decode", kv_mode), "width": kv_batch, "length": kv_length}
    run_cell(kv_local, benchmark, cell, make)


def test_prefill(kv_local, timing, benchmark, kv_method, kv_prefill, kv_mode):
    from kvsuite.engines.limits import prefill

    def make():
        ids, room = kv_local.text(kv_prefill), kv_local.room()

        def side(method):
            make = partial(timing.PrefillCell, kv_local.engine, method, ids, kv_mode, room)
            return timing.measured(make, kv_local.engine.model.device)

        (full, _), (mine, peak) = side(parse("full")), side(kv_method)
        worker = mine.inner.worker
        found = ours(worker, peak) | {"checked": mine.checked, "tokens": 2 * kv_prefill}
        empty, scaled = rest_of(kv_local, timing, [ids])
        asked = prefill(kv_local.engine.model, worker, kv_prefill)
        return full, mine, empty, found | scaled | limits(kv_local, asked, 2)

    cell = {"method": kv_method.name, "phase": phase_of("prefill", kv_mode), "width": 1, "length": kv_prefill}
    run_cell(kv_local, benchmark, cell, make)


def test_transformers(kv_local, timing, benchmark, kv_batch, kv_length, kv_mode):
    def make():
        steps, room, prompt = steps_of(kv_local.options.rounds), kv_local.room(), kv_local.prompt(kv_length)
        full = timing.DecodeCell(kv_local.engine, parse("full"), prompt, kv_batch, steps, kv_mode, room)
        full.check()
        room.take(kv_batch * sum(seen.k.nbytes + seen.v.nbytes for seen in prompt.context))
        plain = TRANSFORMERS[kv_mode]
        other = timing.TransformersCell(kv_local.engine, kv_local.text(kv_length), kv_batch, plain)
        found = {"cache": "transformers.cache_utils.DynamicCache", "path": plain}
        empty, scaled = rest_of(kv_local, timing, [[5]] * kv_batch)
        return full, other, empty, found | scaled | {"nbytes": other.nbytes, "tokens": 2 * STEPS * kv_batch}

    cell = {"method": "transformers", "phase": phase_of("decode", kv_mode), "width": kv_batch, "length": kv_length}
    run_cell(kv_local, benchmark, cell, make)


def test_a_cache_nobody_checked_is_not_timed(kv_local, timing):
    cell = timing.DecodeCell(kv_local.engine, parse("full"), kv_local.prompt(min(kv_local.options.length)), 1, 2)
    with pytest.raises(timing.Unchecked, match="only after its output was checked"):
        cell.round()
