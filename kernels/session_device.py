"""Where `session.py` measures: CUDA, or a stand-in on the CPU that runs all but CUDA's own calls."""

from __future__ import annotations

import gc
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timed:
    """Some calls as one thing to start; holds on to what they read."""

    replay: Call
    calls: Sequence[Any]


class Cuda:
    """All that is asked of CUDA itself."""

    def __init__(self) -> None:
        self.at, self.step_capture = torch.device("cuda"), None  # StepGraph has its own
        self.properties = torch.cuda.get_device_properties(0)
        self.l2 = self.properties.L2_cache_size

    def describe(self) -> dict[str, Any]:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            driver = "unknown"
        p = self.properties
        found = {"GPU": p.name, "driver": driver, "CUDA": torch.version.cuda, "SMs": p.multi_processor_count}
        return {**found, "L2 MB": self.l2 / 1e6, "memory GB": p.total_memory / 1e9}

    def capture(self, calls: Sequence[Call]) -> Timed:
        for call in dict.fromkeys(calls):  # compiles, which cannot be recorded; a kernel may have a variant for some
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        return Timed(graph.replay, calls)

    def samples(self, sides: Sequence[Timed], rounds: int | None = None) -> list[list[float]]:
        """Microseconds of one call, side by side: replays take turns, and so does who is first. ``rounds``: as many
        and none before them; else for half a second."""
        count = self._warm(sides) if rounds is None else rounds
        events: list[list[tuple[Any, Any]]] = [[] for _ in sides]
        for turn in range(count):
            for i in range(len(sides))[:: 1 if turn % 2 else -1]:
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                first.record()
                sides[i].replay()
                last.record()
                events[i].append((first, last))
        self.sync()
        times = [[a.elapsed_time(b) for a, b in pairs] for pairs in events]
        return [[1e3 * ms / len(side.calls) for ms in found] for side, found in zip(sides, times, strict=True)]

    def _warm(self, sides: Sequence[Timed], seconds: float = 0.15) -> int:
        """Replay for a while, which also wakes the clocks; how many rounds to measure."""
        rounds, start = 0, time.perf_counter()
        while time.perf_counter() < start + seconds:
            for side in sides:
                side.replay()
            self.sync()
            rounds += 1
        return min(80, max(12, round(2.5 * rounds * seconds / (time.perf_counter() - start))))

    def sync(self) -> None:
        torch.cuda.synchronize()

    def clean(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()

    def dead(self) -> bool:
        """Whether nothing will run here any more, as after an illegal access or a broken recording."""
        try:
            torch.randn(1, device=self.at).item()
        except RuntimeError:
            return True
        return False


class StandIn(Cuda):
    """The same on a CPU, for the interpreter: graphs are run call by call, times are wall-clock."""

    def __init__(self) -> None:
        self.at, self.l2 = torch.device("cpu"), 0

    def describe(self) -> dict[str, Any]:
        return {"GPU": "none (Triton's interpreter)"}

    def capture(self, calls: Sequence[Call]) -> Timed:
        return Timed(lambda: [call() for call in calls], calls)

    def samples(self, sides: Sequence[Timed], rounds: int | None = None) -> list[list[float]]:
        found = []
        for side in sides:
            start = time.perf_counter()
            side.replay()
            found.append([1e6 * (time.perf_counter() - start) / len(side.calls)] * 2)
        return found

    def step_capture(self, step: Callable[[], Tensor]) -> tuple[Call, Tensor]:
        kept = torch.empty(0, dtype=torch.bfloat16)

        def replay() -> None:
            out = step()
            kept.resize_(out.shape).copy_(out)

        return replay, kept

    def sync(self) -> None: ...

    def clean(self) -> None: ...

    def dead(self) -> bool:
        return False
