"""The hook that report plugins implement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsuite.records import Run


def pytest_kv_report(run: Run, terminalreporter: Any) -> None:
    """Called once when a run has left records, all workers' joined: build one view of it."""
