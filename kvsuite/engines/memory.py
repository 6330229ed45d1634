"""The most memory that a device had given out while something ran, as the device's own allocator counts it."""

from __future__ import annotations

import contextlib
import ctypes
from pathlib import Path
from typing import Any

import torch

PROCESS = Path("/proc/self")
RESET = b"5"
"""What resets the peak of a process's resident memory: proc(5), clear_refs."""


class PeakMemory:
    """A context manager; ``nbytes``, after it: the peak above what was given out at its start, or None where the
    system does not tell.

    On a GPU it is what PyTorch's allocator had given out (``torch.cuda.max_memory_allocated``). On Linux it is the
    resident memory of this process (VmHWM); freed memory is given back first, since what is taken from it does not
    show.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.nbytes: int | None = None
        self._before: int | None = None

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            with contextlib.suppress(OSError, AttributeError):  # another system, or another libc
                ctypes.CDLL("libc.so.6").malloc_trim(0)
                (PROCESS / "clear_refs").write_bytes(RESET)
                self._before = _resident("VmRSS")
        return self

    def __exit__(self, *error: Any) -> None:
        if self._before is None:
            return
        cuda = self.device.type == "cuda"
        now = torch.cuda.max_memory_allocated(self.device) if cuda else _resident("VmHWM")
        self.nbytes = max(now - self._before, 0)


def _resident(name: str) -> int:
    """Bytes, of one line of /proc/self/status."""
    [line] = [x for x in (PROCESS / "status").read_text(encoding="utf-8").splitlines() if x.startswith(name)]
    return 1024 * int(line.split()[1])
