"""The pytest plugin. Load it with ``pytest_plugins = ("kvsuite.plugin",)`` in a root conftest."""

from __future__ import annotations

from typing import Any

import pytest

from kvsuite.errors import UsageError
from kvsuite.plugin import options
from kvsuite.plugin.session import Session
from kvsuite.report import terminal

EVALUATIONS = ("throughput", "length", "samples", "tools")
SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare ``--kv-…``."""
    options.add(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Read and check all options before anything is collected or loaded."""
    try:
        config.stash[SESSION] = Session(options.read(config))
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per method and per task where a test asks for ``kv_method`` or ``kv_task``."""
    asked = metafunc.config.stash[SESSION].options
    if "kv_method" in metafunc.fixturenames:
        metafunc.parametrize("kv_method", asked.methods, ids=lambda method: method.name, scope="session")
    if "kv_task" in metafunc.fixturenames:
        metafunc.parametrize("kv_task", asked.tasks, scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch what the chosen evaluations need before the first one starts."""
    config = session.config
    if config.option.collectonly or not any(item.get_closest_marker(m) for item in session.items for m in EVALUATIONS):
        return
    try:
        config.stash[SESSION].fetch()
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The tables of what was evaluated, from the facts that tests recorded."""
    reports = [r for key in ("passed", "failed") for r in terminalreporter.getreports(key) if r.when == "call"]
    facts = [fact for report in reports for name, fact in report.user_properties if name == "kvsuite"]
    if facts:
        terminal.write(facts, terminalreporter._tw._file, terminalreporter._tw.fullwidth)


@pytest.fixture(scope="session")
def kv_session(pytestconfig: pytest.Config) -> Session:
    """The run: its options, its engine, and what has been answered so far."""
    return pytestconfig.stash[SESSION]
