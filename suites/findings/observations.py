"""What observing a prompt costs beside prefilling it: ``python suites/findings/observations.py [LENGTH LONGER]``.

The default model prefills presidential messages, with each observation and with none, in turn: LENGTH tokens (3,000)
for time, LONGER (8,000) for memory. Time is a prefill's seconds over those of the one without in the same round: the
median of `ROUNDS` rounds, the least and the most. Memory is the peak that a prefill adds (`kvsuite.engines.memory`),
over that of the one without; an extra pass is left out. Needs a quiet machine.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import dataclass

import torch

from kvsuite import models
from kvsuite.cache.observations import (
    AttentionMass,
    ChunkAttention,
    ExtraPass,
    HiddenStates,
    LastQueries,
    Observation,
    PreRopeMoments,
    QueryCentres,
)
from kvsuite.engines.memory import PeakMemory
from kvsuite.engines.request import Request
from kvsuite.engines.transformers import TransformersEngine

ROUNDS = 7


@dataclass(frozen=True)
class Largest:
    """What is kept of a hidden state: its largest number."""

    def note(self, hidden: torch.Tensor, layer: int) -> torch.Tensor:
        """hidden (n, hidden size) to (1, n)."""
        return hidden.float().abs().amax(-1)[None]


WINDOW, MOMENTS = LastQueries(64), PreRopeMoments(4)
ARMS: dict[str, tuple[Observation, ...]] = {
    "none": (), "window": (WINDOW,), "window and moments": (WINDOW, MOMENTS), "column sums": (AttentionMass(),),
    "largest hidden states": (HiddenStates(Largest()),), "query centres": (QueryCentres(),),
    "attention in chunks of 256": (ChunkAttention(256, 8, 4),), "an extra pass": (ExtraPass(),),
    "an extra pass, normalized": (ExtraPass(normalized=True),),
}  # fmt: skip
TIME = {"window and moments": 1.15, "column sums": 1.5}
"""What must not be exceeded, × the time without."""
MEMORY = 1.3
"""The same for both of these, × the memory without."""


def main() -> int:
    """Measure and print; 1 where a median or a memory is more than allowed."""
    length, longer = map(int, sys.argv[1:3] or (3000, 8000))
    engine = TransformersEngine.load(models.default_model())
    text = "".join(file.read_text() for file in sorted(models.messages().glob("*.txt"))[:40])
    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    order = [*ARMS]
    for number in range(ROUNDS + 1):  # the first warms up
        for name in order:
            taken = engine.prefill(Request("", "", "", 1), ids[:length], [], ARMS[name]).seconds
            seconds[name] += [taken] if number else []
        order.append(order.pop(0))
    peaks = {name: peak(engine, ids[:longer], asked) for name, asked in ARMS.items() if "pass" not in name}
    print(f"{'':28} {length} tokens, × the time without   {longer} tokens, × the memory without")
    over = False
    for name in ARMS:
        ratios = sorted(a / b for a, b in zip(seconds[name], seconds["none"], strict=True))
        most = f" ({TIME[name]:g} allowed)" if name in TIME else ""
        time = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}){most}"
        memory = f"{peaks[name] / peaks['none']:.3f}" if name in peaks else "-"
        memory += f" ({MEMORY:g} allowed)" if name in TIME else ""
        print(f"{name:28} {time:40} {memory}")
        if name in TIME:
            over |= statistics.median(ratios) > TIME[name] or peaks[name] > MEMORY * peaks["none"]
    print(f"without: {statistics.median(seconds['none']):.2f} s, {peaks['none'] / 2**20:.0f} MiB more than the model")
    return int(over)


def peak(engine: TransformersEngine, ids: list[int], asked: tuple[Observation, ...]) -> int:
    """Bytes that a prefill takes at its peak, above what is held before it."""
    with PeakMemory(torch.device("cpu")) as memory:
        engine.prefill(Request("", "", "", 1), ids, [], asked)
    assert memory.nbytes is not None, "this system does not tell"
    return memory.nbytes


if __name__ == "__main__":
    sys.exit(main())
