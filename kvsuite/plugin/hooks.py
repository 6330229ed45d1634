"""The hook that report plugins implement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvsuite.analysis.report import Report


def pytest_kv_report(report: Report, terminalreporter: Any) -> None:
    """Called once when a run has left records, all workers' joined: draw the report, or judge by it.
    ``report.cell("verdicts", ("int8", "speed"), "effect").low`` is a bound of an interval."""
