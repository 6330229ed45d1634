"""The one place where kernels are started: what ran can be recorded, and compiled for a GPU that is not there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns at every start where it is left open
import triton


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: its grid, its run-time arguments in order (tensors, ints, floats) and its constants."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    warps: int
    stages: int

    def run(self) -> None:
        """Start it on the tensors' device, or in the interpreter."""
        self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages)


_recorders: list[list[Launch]] = []


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    warps: int = 4,
    stages: int = 2,
) -> None:
    """Start a kernel, or only write it down inside `recording`."""
    started = Launch(kernel, grid, arguments, constants, warps, stages)
    if _recorders:
        _recorders[-1].append(started)
    elif all(grid):
        started.run()


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches instead of running them."""
    found: list[Launch] = []
    _recorders.append(found)
    try:
        yield found
    finally:
        _recorders.pop()


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors. There ``tl.dot`` is wrong in bfloat16, so operands
    are widened to float32 after they were rounded."""
    return bool(triton.knobs.runtime.interpret)
