"""Decode attention on a CPU, compressed and not: what `python kernels/cpu_attention.py` measures and prints.

All candidates take turns within a round, over layers enough that none stays in a cache; ratios are of the same round.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kvsuite.environment import describe
from kvsuite.kernels import cpu
from kvsuite.kernels.context import AttentionParams, LayerContext, Needs
from kvsuite.kernels.cpu import build, threads
from kvsuite.kernels.cpu.structures import Threads
from kvsuite.kernels.paged import PagedKV
from kvsuite.methods import parse

SHAPES = {"smollm2-135m": (3, 3, 64), "llama-3.1-8b": (8, 4, 128)}
"""kv heads, queries per kv head, head dimension."""
CELLS = ((8, 1024), (8, 4096), (8, 16384), (1, 4096), (1, 32768))
FORMATS = ("full", "int8", "int4", "fp8", "kivi:bits=4", "kivi:bits=2")
BYTES = 500e6
"""Uncompressed K and V that the layers of a cell hold together: far beyond any cache."""


@dataclass
class Candidate:
    """One way to attend: all layers of a cell once."""

    name: str
    nbytes: int
    """Of K and V that one layer reads."""
    layer: Callable[[], Callable[[], object]]
    """Makes one layer's K and V and returns what attends to them."""
    layers: list[Callable[[], object]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Attend to all layers once."""
        for attend in self.layers:
            attend()


def random_cache(text: str, layer: LayerContext, batch: int, length: int, needs: Needs) -> PagedKV:
    """A cache of random codes, or of the same few random numbers."""
    specs = parse(text).codec.specs(layer)
    kv = PagedKV.empty(layer, specs, batch, length + 1, needs)
    for row in range(batch):
        kv.admit(row, np.full(layer.kv_heads, length), length)
    for store in (kv.k, kv.v):
        for pool in (*store.pools, store.residual):
            _scramble(pool)
    if kv.positions is not None:
        for row in range(batch):
            own = kv.places(row, np.arange(layer.kv_heads)[:, None], np.arange(length)[None])
            kv.positions.view(-1)[own] = torch.arange(length, dtype=torch.int32).expand(own.shape)
    if kv.accumulated_attention is not None:
        kv.accumulated_attention.zero_()
    return kv


def _scramble(x: torch.Tensor) -> None:
    if x.dtype.itemsize == 1:
        part = torch.randint(0, 120, (1 << 16,), dtype=x.dtype)  # as e4m3 neither NaN nor huge
    elif x.dtype == torch.float16:
        part = (torch.rand(1 << 16) * 0.1 + 0.05).half()
    else:
        part = torch.randn(1 << 16).to(x.dtype)
    flat = x.view(-1)
    for first in range(0, len(flat), len(part)):
        flat[first : first + len(part)] = part[: len(flat) - first]


def ours(text: str, layer: LayerContext, batch: int, length: int, needs: Needs, name: str) -> Candidate:
    q = torch.randn(batch, layer.heads, 1, layer.head_dim).to(layer.dtype)
    params, rows = AttentionParams(layer.head_dim**-0.5), list(range(batch))
    one = random_cache(text, layer, batch, length, needs)

    def make() -> Callable[[], object]:
        kv = random_cache(text, layer, batch, length, needs)
        return lambda: cpu.attend(kv, q, rows, params)

    return Candidate(name, sum(one.row_nbytes(row) for row in rows), make)


def torchs(layer: LayerContext, batch: int, length: int) -> list[Candidate]:
    """PyTorch's ways. But for enable_gqa the query group are rows, so that K and V are read once. A mask that allows
    everything takes another kernel."""
    heads, group, dim, scale = layer.kv_heads, layer.heads // layer.kv_heads, layer.head_dim, layer.head_dim**-0.5
    part = torch.randn(batch, heads, 1, dim).to(layer.kv_dtype)
    shared: list[list[torch.Tensor]] = []  # all ways read the same
    q, mask = torch.randn(batch, heads, group, dim).to(layer.dtype), torch.zeros(group, length, dtype=layer.dtype)
    sdpa, product = torch.nn.functional.scaled_dot_product_attention, torch.matmul

    def rows(k: torch.Tensor, v: torch.Tensor) -> object:
        return [sdpa(q[b : b + 1], k[b : b + 1], v[b : b + 1], scale=scale) for b in range(batch)]

    ways: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
        "sdpa": lambda k, v: sdpa(q, k, v, scale=scale),
        "sdpa, row by row": rows,
        "sdpa, mask": lambda k, v: sdpa(q, k, v, attn_mask=mask, scale=scale),
        "sdpa, gqa": lambda k, v: sdpa(q.view(batch, -1, 1, dim), k, v, scale=scale, enable_gqa=True),
        "matmul": lambda k, v: product(torch.softmax(scale * product(q, k.mT).float(), -1).to(v.dtype), v),
    }
    nbytes = layer.token_bytes * batch * length

    def maker(way: Callable[[torch.Tensor, torch.Tensor], object]) -> Callable[[], Callable[[], object]]:
        made = itertools.count()

        def make() -> Callable[[], object]:
            at = next(made)
            if at == len(shared):
                shared.append([part.expand(-1, -1, length, -1).contiguous() for _ in range(2)])
            return lambda: way(*shared[at])

        return make

    return [Candidate(f"torch {name}", nbytes, maker(way)) for name, way in ways.items()]


def bandwidth(count: int, nbytes: int = 1 << 29) -> Callable[[], float]:
    """Reads memory with so many threads: bytes per second, each time it is called."""
    memory, library = torch.ones(nbytes, dtype=torch.uint8), build.library("limits.cpp", {})
    call = Threads(threads.parallel(), count)

    def measure() -> float:
        start = time.perf_counter()
        library.read_memory(ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(nbytes), ctypes.byref(call))
        return nbytes / (time.perf_counter() - start)

    return measure


def multiply_adds(count: int, rounds: int = 1 << 20) -> float:
    """Multiply-adds of 16-bit integers per second with so many threads."""
    library, call = build.library("limits.cpp", {}), Threads(threads.parallel(), count)
    library.multiply_add.restype = ctypes.c_int64
    start = time.perf_counter()
    done = library.multiply_add(ctypes.c_int64(rounds), ctypes.byref(call))
    return float(done) / (time.perf_counter() - start)


def measure(candidates: list[Candidate], read: Callable[[], float], rounds: int, cached: bool) -> float:
    """Seconds of each candidate, round by round; the median bandwidth. Torch's slow ways end after three."""
    speeds, order = [], random.Random(0)
    for i in range(rounds + 1):
        speeds.append(read())
        own = [statistics.median(x.seconds) for x in candidates if x.name.startswith("torch sdpa") and x.seconds]
        for one in order.sample(candidates, len(candidates)):  # what comes after another may profit from it, or suffer
            if i > 3 and one.name.startswith("torch") and statistics.median(one.seconds) > 1.2 * min(own):
                continue
            if cached:
                one.run()
            repeats = 10 if cached else 1
            start = time.perf_counter()
            for _ in range(repeats):
                one.run()
            if i:  # the first round warms up
                one.seconds.append((time.perf_counter() - start) / repeats)
    return statistics.median(speeds)


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % interval by the bootstrap over rounds."""
    draw = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draw, axis=1), (0.025, 0.975))
    return statistics.median(ratios), float(low), float(high)


def summary(cell: str, candidates: list[Candidate], layers: int, read: float) -> dict[str, object]:
    medians = {x.name: statistics.median(x.seconds) for x in candidates}
    plain = min(
        (x for x in candidates if x.name.startswith("torch") or x.name == "full"), key=lambda x: medians[x.name]
    )
    torch_best = min((x for x in candidates if x.name.startswith("torch sdpa")), key=lambda x: medians[x.name])
    rows = []
    for one in candidates:
        versus = [[a / b for a, b in zip(base.seconds, one.seconds, strict=False)] for base in (plain, torch_best)]
        speed = one.nbytes * layers / medians[one.name]
        rows.append(
            {
                "name": one.name, "ms": medians[one.name] / layers * 1e3, "rounds": len(one.seconds),
                "over_plain": interval(versus[0]), "over_torch": interval(versus[1]),
                "bytes": one.nbytes, "gb_per_s": speed / 1e9, "of_bandwidth": speed / read,
            }
        )  # fmt: skip
    return {"cell": cell, "plain": plain.name, "torch": torch_best.name, "read_gb_per_s": read / 1e9, "rows": rows}


def draw(console: Console, found: Mapping[str, object]) -> None:
    table = Table(title=f"{found['cell']}; fastest bf16: {found['plain']}; reads {found['read_gb_per_s']:.1f} GB/s")
    for name in ("", "ms a layer", f"× {found['plain']}", f"× {found['torch']}", "MB a layer", "GB/s", "% of read"):
        table.add_column(name, justify="left" if not name else "right")
    for row in found["rows"]:  # type: ignore[attr-defined]
        ratios = [f"{m:.2f} [{low:.2f}, {high:.2f}]" for m, low, high in (row["over_plain"], row["over_torch"])]
        numbers = f"{row['bytes'] / 1e6:.1f}", f"{row['gb_per_s']:.1f}", f"{100 * row['of_bandwidth']:.0f}"
        table.add_row(row["name"], f"{row['ms']:.3f}", *ratios, *numbers)
    console.print(table)


def candidates_of(
    shape: str, batch: int, length: int, formats: list[str], dtype: torch.dtype, layers: int | None
) -> tuple[list[Candidate], int]:
    heads, group, dim = SHAPES[shape]
    layer = LayerContext(0, heads * group, heads, dim, dtype, torch.bfloat16, torch.device("cpu"))
    layers = layers or max(2, min(30, int(BYTES / (layer.token_bytes * batch * length))))
    refused = {text: cpu.supports(layer, *parse(text).codec.specs(layer), Needs()) for text in formats}
    if problems := {text: reason for text, reason in refused.items() if reason}:
        sys.exit(f"the cpu backend refuses: {problems}")
    found = [ours(text, layer, batch, length, Needs(), text) for text in formats]
    for name, needs in (
        ("positions", Needs(positions=True)),
        ("mass", Needs(positions=True, accumulated_attention=True)),
    ):
        found += [ours(text, layer, batch, length, needs, f"{text}, {name}") for text in formats[:2]]
    if dtype == torch.bfloat16:
        found += torchs(layer, batch, length)
    for _ in range(layers):  # in turn, because where memory comes to lie matters
        for one in found:
            one.layers.append(one.layer())
    return found, layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--cell", action="append", help="batch,length")
    parser.add_argument(
        "--layers", type=int, help="1: of a small cell, stays in the caches, so that memory costs nothing"
    )
    parser.add_argument("--formats", default=";".join(FORMATS))
    parser.add_argument("--out", type=Path, help="a JSON file")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    cells = [tuple(map(int, cell.split(","))) for cell in asked.cell] if asked.cell else CELLS
    console, found = Console(), []
    limits = {f"read_gb_per_s_{n}": bandwidth(n)() / 1e9 for n in sorted({1, asked.threads})}
    limits |= {f"multiply_adds_g_per_s_{n}": multiply_adds(n) / 1e9 for n in sorted({1, asked.threads})}
    console.print(", ".join(f"{name} {value:.1f}" for name, value in limits.items()))
    for shape in asked.shape or SHAPES:
        for batch, length in cells:
            candidates, layers = candidates_of(
                shape, batch, length, asked.formats.split(";"), torch.bfloat16, asked.layers
            )
            read = measure(candidates, bandwidth(asked.threads), asked.rounds, asked.layers == 1)
            found.append(summary(f"{shape}, {batch} × {length}, {asked.threads} threads", candidates, layers, read))
            draw(console, found[-1])
            del candidates
    if asked.out:
        asked.out.write_text(json.dumps({"environment": describe(), "limits": limits, "cells": found}, indent=1))


if __name__ == "__main__":
    main()
