"""What this machine can do at most, and what a step asks of it: bytes read and operations."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kvsuite.engines import ranks
from kvsuite.engines.worker import MethodWorker

REPEATS = 3
"""The fastest counts."""
READ = {"cpu": 1 << 28, "cuda": 1 << 32}
"""Bytes: beyond any cache."""
ROWS = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices that are multiplied."""


@dataclass(frozen=True)
class StepWork:
    """Of one step, or one prefill."""

    moved: int
    """Bytes: the weights of all matrices once, and K and V."""
    operations: int
    """Multiplications and additions of matrix products and attention."""


@functools.cache  # cells are many, and this takes longer than some of them
def bandwidth(device: torch.device) -> float:
    """Bytes a second that all threads together read from memory, measured once."""
    memory = torch.ones(READ[device.type] // 4, dtype=torch.float32, device=device)
    return memory.nbytes / _fastest(lambda: memory.sum(), device)


@functools.cache
def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product, measured once."""
    rows = ROWS[device.type]
    one = torch.full((rows, rows), 0.5, dtype=dtype, device=device)
    return 2 * rows**3 / _fastest(lambda: one @ one, device)


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds; the first time warms up."""
    seconds = []
    ranks.agree()  # all of them measure at once, as they work
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def step(model: Any, worker: MethodWorker) -> StepWork:
    """A step of one token for every sequence of a worker."""
    products = _products(model)
    tokens = sum(cache.kept(row) for cache in worker.caches for row, _ in worker.active)  # of all kv heads
    layer = worker.caches[0].layer
    attention = 4 * layer.head_dim * (layer.heads // layer.kv_heads) * tokens
    rows = len(worker.active)
    return StepWork(_nbytes(products) + worker.read_nbytes, 2 * _numel(products) * rows + attention)


def prefill(model: Any, worker: MethodWorker, length: int) -> StepWork:
    """A prompt of ``length`` tokens: causal attention, and the logits of its last token alone."""
    products = _products(model)
    last = [x for x in products if x is model.get_output_embeddings()]
    others = [x for x in products if x is not model.get_output_embeddings()]
    attention = sum(2 * cache.layer.heads * cache.layer.head_dim * length**2 for cache in worker.caches)
    return StepWork(_nbytes(products), 2 * _numel(others) * length + 2 * _numel(last) + attention)


def _products(model: Any) -> list[torch.nn.Linear]:
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


def _nbytes(products: list[torch.nn.Linear]) -> int:
    return sum(ranks.local(layer.weight).nbytes for layer in products)


def _numel(products: list[torch.nn.Linear]) -> int:
    return sum(ranks.local(layer.weight).numel() for layer in products)
