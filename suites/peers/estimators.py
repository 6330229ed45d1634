"""The tables behind `kvsuite crossover` and its steps: what the L2 does to the tables, and the steps beside what
aiconfigurator's SDK estimates and beside engines that were measured.

    python -m suites.peers.estimators

Both others come with ``aiconfigurator-core``: the SDK reads the same tables with code of its own;
``silicon_sample.csv`` has mean times per output token of engines that also prefill meanwhile.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator

import numpy as np

from kvsuite.analysis.crossover import Comparison, compare
from kvsuite.readers import aiconfigurator
from kvsuite.shapes import shape

MODEL, HUB = "llama-3.1-8b", "meta-llama/Meta-Llama-3.1-8B"
SHORTEST = 1024
DTYPES = ("bfloat16", "fp8")


def tables(gpu: str, engine: str) -> Comparison:
    return compare(aiconfigurator.measured(aiconfigurator.home(), gpu, engine, shape(MODEL)), MODEL)


def beside_the_sdk(gpu: str, engine: str) -> Iterator[tuple[float, float, float]]:
    """Ours over theirs, of each cell and K/V dtype: attention, products, the whole step."""
    from aiconfigurator_core.sdk import EngineHandle, compile_engine

    found = tables(gpu, engine)
    for at, dtype in enumerate(DTYPES):
        spec = compile_engine(
            HUB, gpu, engine, gemm_quant_mode="bfloat16", kvcache_quant_mode=dtype, fmha_quant_mode="bfloat16"
        )
        theirs = EngineHandle(spec)
        for cell in found.cells(None, None):
            if cell.length < SHORTEST or cell.rest is None or cell.steps is None:
                continue
            parts = {name: ms for name, ms, *_ in theirs.decode_step_per_op(cell.batch, cell.length - 1, 2)}
            products = sum(ms for name, ms in parts.items() if name.endswith("_gemm"))
            attention = (cell.plain, cell.other)[at].ms * cell.layers / parts["generation_attention"]
            yield attention, cell.rest / products, cell.steps[at] / sum(parts.values())


def beside_engines() -> Iterator[tuple[int, int, int, float, float]]:
    """Of TensorRT-LLM on one H100: batch, prompt, answer, ms per token as measured, and ms of our bf16 step halfway."""
    found = tables("h100_sxm", "trtllm")
    with open(aiconfigurator.home() / "silicon_sample.csv", newline="") as file:
        for row in csv.DictReader(file):
            mine = row["model_path"] == "meta-llama/Llama-3.1-8B-Instruct" and row["tp_size"] in ("1", "1.0")
            if mine and (row["system"], row["backend"]) == ("h100_sxm", "trtllm"):
                batch, prompt, answer = (int(float(row[name])) for name in ("batch_size", "isl", "osl"))
                rate = found.rate(found.beyond[0], batch, prompt + answer // 2)
                assert rate is not None
                yield batch, prompt, answer, float(row["silicon_tpot_ms"]), 1000 * batch / rate[0]


def in_the_l2(gpu: str, engine: str) -> tuple[int, int, float, float]:
    """Of both dtypes' cells of this model: those that the L2 holds, all, and the most × the memory's bandwidth that is
    seen in these and in the others."""
    found = tables(gpu, engine)
    rates: dict[bool, list[float]] = {True: [], False: []}
    for grid in found.grids.values():
        for cell, ms in grid.cells.items():
            rates[grid.resident(*cell)].append(grid.footprint(*cell) / ms / found.bandwidth)
    return len(rates[True]), len(rates[True]) + len(rates[False]), max(rates[True]), max(rates[False])


def main() -> None:
    logging.disable(logging.CRITICAL)
    for gpu in ("h100_sxm", "h200_sxm", "b200_sxm", "l40s", "rtx_pro_6000_server"):
        for engine in ("vllm", "trtllm", "sglang"):
            fit, of, inside, outside = in_the_l2(gpu, engine)
            print(f"{gpu} {engine}: {fit} of {of} cells in the L2, up to {inside:.2f} × the memory's bandwidth", end="")
            print(f", the others {outside:.2f} ×")
    for gpu in ("h200_sxm", "b200_sxm", "l40s"):
        for engine in ("vllm", "trtllm", "sglang"):
            columns = zip(*beside_the_sdk(gpu, engine), strict=True)
            said = [f"{np.median(x):.3f} ({min(x):.3f}–{max(x):.3f})" for x in columns]
            print(f"{gpu} {engine}: ours over the SDK's: attention {said[0]}, products {said[1]}, step {said[2]}")
    rows = sorted(beside_engines(), key=lambda row: row[3] / row[4])
    for batch, prompt, answer, measured, ours in rows:
        print(
            f"{batch} × {prompt}, {answer} new: {measured:.2f} ms measured, step {ours:.2f} ms: {measured / ours:.2f} ×"
        )


if __name__ == "__main__":
    main()
