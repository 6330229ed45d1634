"""Decode steps of OpenVINO GenAI, llama.cpp and kvsuite on one CPU, in turn: each one's compressed caches over its own
plain cache. docs/findings.md shows what came out."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from decoding import ENGINES
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from kvsuite import models
from kvsuite.environment import describe

ARMS = {
    "openvino_genai": ("f16", "bf16", "u8", "u4"),
    "llama_cpp": ("f16", "q8_0", "q4_0"),
    "kvsuite": ("full", "int8", "int4", "kivi:bits=4"),
}
PLAIN = {"f16", "bf16", "full"}
"""Uncompressed; an engine's ratios are over the fastest of its own."""


def serve(pipe: Any, engine: str, name: str, job: tuple[Any, ...]) -> None:
    """One arm, in a process of its own, which sleeps while others compute."""
    side = ENGINES[engine](name, *job)
    pipe.send(side.facts)
    before = time.process_time()
    while steps := pipe.recv():
        idle = time.process_time() - before
        side.step()  # the first wakes threads and fills caches
        pipe.send((statistics.fmean(side.step() for _ in range(steps)), idle))
        before = time.process_time()


class Arm:
    """One arm's process, seen from outside."""

    def __init__(self, engine: str, name: str, job: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self.engine, self.name, self.seconds, self.idle = engine, name, list[float](), 0.0
        self.pipe, inner = context.Pipe()
        context.Process(target=serve, args=(inner, engine, name, job), daemon=True).start()
        inner.close()  # the pipe ends with the process
        self.facts = self.pipe.recv()

    def turn(self, steps: int) -> None:
        """Decode so many tokens for each sequence."""
        self.pipe.send(steps)
        seconds, idle = self.pipe.recv()
        self.seconds.append(seconds)
        self.idle += idle

    def row(self, wall: float) -> dict[str, Any]:
        """What is kept of it; the first round warmed up. ``idle_cpu``: seconds of CPU per second of others' turns."""
        return {**self.facts, "idle_cpu": self.idle / wall, "seconds": self.seconds[1:]}


def text(length: int) -> list[int]:
    """Token ids of presidential messages."""
    tokenizer, ids = Tokenizer.from_file(str(models.default_model() / "tokenizer.json")), list[int]()
    for file in sorted(models.messages().glob("*.txt")):
        if len(ids) < length:
            ids += tokenizer.encode(file.read_text(), add_special_tokens=False).ids
    return ids[:length]


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """All arms of the engines that are installed, in turn: A B C ..., then in reverse."""
    job = (text(asked.length), asked.batch, (asked.rounds + 1) * (asked.steps + 1), asked.threads)
    found = [Arm(engine, name, job) for engine, names in ARMS.items() if find_spec(engine) for name in names]
    start = time.perf_counter()
    for number in range(asked.rounds + 1):
        for arm in found[:: 1 if number % 2 else -1]:
            arm.turn(asked.steps)
    wall = time.perf_counter() - start
    for arm in found:
        arm.pipe.send(0)
    rows: dict[str, dict[str, Any]] = {}
    for arm in found:
        rows.setdefault(arm.engine, {})[arm.name] = arm.row(wall)
    how = {name: getattr(asked, name) for name in ("batch", "length", "threads", "steps")}
    return {**how, "environment": describe(), "rows": rows}


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % interval by the bootstrap over rounds."""
    draws = np.random.default_rng(0).choice(ratios, (5000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    return statistics.median(ratios), float(low), float(high)


def draw(console: Console, cell: dict[str, Any], short: dict[str, Any]) -> None:
    """One length's table. ``context``: what a step takes longer than one of ``short``, the cell of fewest tokens."""
    table = Table(title=f"{cell['batch']} × {cell['length']} tokens, {cell['threads']} threads")
    for name in ("", "cache", "bytes a token", "ms a step", "tok/s", "× plain", "context, ms", "of the step"):
        table.add_column(name, justify="right", no_wrap=True)
    for engine, arms in cell["rows"].items():
        step = {name: statistics.median(row["seconds"]) for name, row in arms.items()}
        plain = min(PLAIN & set(arms), key=lambda name: step[name])
        for name, row in arms.items():
            pairs = zip(arms[plain]["seconds"], row["seconds"], strict=True)
            ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*interval([a / b for a, b in pairs]))
            context = step[name] - statistics.median(short["rows"][engine][name]["seconds"])
            parts = ("-", "-") if cell is short else (f"{1e3 * context:.1f}", f"{context / step[name]:.0%}")
            speed = f"{1e3 * step[name]:.1f}", f"{cell['batch'] / step[name]:.0f}"
            table.add_row(engine, name, f"{row['kv_bytes_per_token']:,.0f}", *speed, ratio, *parts)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=1024, help="tokens of context; 64 gives the step without one")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="tokens per sequence and turn, after one to warm up")
    parser.add_argument("--output", type=Path, default=Path("runs/beside"), help="a folder; all of it is shown")
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    cell = measure(asked)
    (asked.output / f"{asked.batch}x{asked.length}.json").write_text(json.dumps(cell, indent=1))
    cells = [json.loads(file.read_text()) for file in asked.output.glob(f"{asked.batch}x*.json")]
    cells.sort(key=lambda cell: cell["length"])
    for cell in cells:
        draw(Console(width=120), cell, cells[0])


if __name__ == "__main__":
    main()
