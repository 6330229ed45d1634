"""The pytest plugin. Load it with ``pytest_plugins = ("kvsuite.plugin",)`` in a root conftest."""

from __future__ import annotations

import difflib
import re
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kvsuite.analysis.report import analyse
from kvsuite.errors import UsageError
from kvsuite.plugin import hooks, options
from kvsuite.plugin.local import Local
from kvsuite.plugin.serving import Serving
from kvsuite.plugin.session import Session
from kvsuite.records import read
from kvsuite.report import markdown, terminal

EVALUATIONS = ("throughput", "length", "samples", "tools")
SESSION = pytest.StashKey[Session]()
ALONE = "speed is timed alone: run -m throughput without -n"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare ``--kv-…``."""
    options.add(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare the report hook and register the reports that come with kvsuite."""
    pluginmanager.add_hookspecs(hooks)
    pluginmanager.register(terminal, "kvsuite.report.terminal")
    pluginmanager.register(markdown, "kvsuite.report.markdown")


def pytest_configure(config: pytest.Config) -> None:
    """Read and check all options before anything is collected or loaded."""
    for name in EVALUATIONS:
        config.addinivalue_line("markers", f"{name}: evaluation: see kvsuite's README")
    worker: dict[str, Any] = getattr(config, "workerinput", {})
    try:
        _refuse_unknown_marker(config)
        asked = options.read(config)
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
    folder = Path(worker["kv_run"]) if worker else None
    kind = Local if asked.servers is None else Serving
    if kind is Serving and getattr(config.option, "dist", "no") != "no":
        raise pytest.UsageError("servers are asked from one process: run without -n")
    config.stash[SESSION] = kind(asked, worker.get("workerid", ""), folder)


def _refuse_unknown_marker(config: pytest.Config) -> None:
    """UsageError for a ``-m`` with a misspelled evaluation, which would choose nothing, or every check."""
    known = {re.split(r"[:(]", line)[0].strip() for line in config.getini("markers")}
    for word in set(re.findall(r"[^\W\d]\w+", config.option.markexpr)) - known - {"and", "or", "not"}:
        if near := difflib.get_close_matches(word, EVALUATIONS, 1, 0.7):
            raise UsageError(f"unknown marker {word!r} in -m: did you mean {near[0]!r}?")


@contextmanager
def _lenient() -> Iterator[None]:
    """A library's warning is shown, whatever the project's filters say: it is no finding about a method."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Under pytest-xdist the tests of a task go to one worker: its methods share one pass over the samples. (Its own
    groups, ``loadgroup``, do nothing with pytest 9.2 and xdist 3.8: they rename items, whose names are now fixed.)"""
    if config.option.dist != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByTask(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            _, _, parameters = nodeid.rpartition("[")
            named = f"-{parameters.rstrip(']')}-"
            return next((task for task in session.options.tasks if f"-{task}-" in named), nodeid)

    session = config.stash[SESSION]
    return ByTask(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell each pytest-xdist worker where the run leaves its records."""
    node.workerinput["kv_run"] = str(node.config.stash[SESSION].folder.absolute())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per method, server, task, batch and length where a test asks for them; tasks are those of its
    evaluation."""
    session = metafunc.config.stash[SESSION]
    asked, own = session.options, {m.name for m in metafunc.definition.iter_markers()}
    tasks = [task.name for task in session.tasks if task.evaluation in own]
    values: dict[str, tuple[Any, Any]] = {
        "kv_method": (asked.methods if asked.servers is None else (), lambda method: method.name),
        "kv_arm": (asked.arms, lambda name: name.replace(" ", "-")),
        "kv_cell": (session.cells if isinstance(session, Serving) else (), lambda cell: cell.name.replace(" ", "-")),
        "kv_task": (tasks, str),
        "kv_batch": (asked.batch, lambda width: f"b{width}"),
        "kv_length": (asked.length, lambda tokens: f"l{tokens}"),
        # a prefill takes seconds, and smoke has minutes
        "kv_prefill": (asked.length[:1] if asked.preset == "smoke" else asked.length, lambda tokens: f"l{tokens}"),
    }
    for name, (parameters, identify) in values.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, parameters, ids=identify)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of methods in this process are left out where servers are compared, and the other way round. Under
    pytest-xdist speed is not timed: other work runs beside it."""
    session = config.stash[SESSION]
    other = "kv_local" if isinstance(session, Serving) else "kv_serving"
    left_out = [item for item in items if other in getattr(item, "fixturenames", ())]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    for item in items:
        if _evaluates(item):
            item.add_marker(pytest.mark.filterwarnings("default"))
        if session.worker and item.get_closest_marker("throughput"):
            item.add_marker(pytest.mark.skip(reason=ALONE))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch what the chosen evaluations need before the first one starts."""
    config = session.config
    chosen = [item for item in session.items if _evaluates(item)]
    if config.option.collectonly or not chosen:
        return
    params = [getattr(item, "callspec", None) for item in chosen]
    tasks = {str(p.params["kv_task"]) for p in params if p is not None and "kv_task" in p.params}
    evaluations = [m for m in EVALUATIONS if any(i.get_closest_marker(m) for i in chosen)]
    try:
        _refuse_untimed(config, evaluations)
        with _lenient():
            run = config.stash[SESSION]
            if not run.worker:
                run.timed_cells = sum(
                    {"kv_local", "benchmark"} <= set(getattr(item, "fixturenames", ())) for item in chosen
                )
            run.fetch(sorted(tasks), evaluations)
            alone = not run.worker and getattr(config.option, "dist", "no") == "no"
            line = run.announce(chosen) if alone else ""
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
    if line:
        config.get_terminal_writer().line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Follow the plan of the run, where there is one."""
    plan = item.config.stash[SESSION].progress.plan
    if plan is not None:
        plan.begin(item.nodeid)
    try:
        return (yield)
    finally:
        if plan is not None:
            plan.end()


def _evaluates(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in EVALUATIONS)


def _refuse_untimed(config: pytest.Config, evaluations: Sequence[str]) -> None:
    """UsageError where pytest-benchmark, which times the cells, was told not to."""
    if "throughput" in evaluations and getattr(config.option, "benchmark_disable", False):
        raise UsageError(
            "--benchmark-disable leaves no speed to measure: leave it out, or choose -m 'samples or length'"
        )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Note in ``run.json`` that the run came to its end: without that its tables are partial."""
    run = session.config.stash[SESSION]
    ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if ended and not (run.worker or session.shouldstop or session.shouldfail):
        run.run.amend({"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")})


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Join what the workers left and let every report plugin view the run."""
    session = config.stash[SESSION]
    if any(ALONE in str(report.longrepr) for report in terminalreporter.getreports("skipped")):
        terminalreporter.write_line(ALONE, red=True, bold=True)
    if session.worker or not (session.folder / "run.json").is_file():
        return
    session.run.join()
    try:
        with _lenient():
            config.hook.pytest_kv_report(report=analyse(read(session.folder)), terminalreporter=terminalreporter)
    except UsageError as error:
        terminalreporter.write_line(f"no report of {session.folder}: {error}", red=True, bold=True)


@pytest.fixture(scope="session")
def kv_session(pytestconfig: pytest.Config) -> Session:
    """The run: its options, and what has been answered so far, whoever answers."""
    return pytestconfig.stash[SESSION]


@pytest.fixture(scope="session")
def kv_local(kv_session: Session) -> Local:
    """A run in this process, with its engine; a test that asks for it is left out where servers are compared."""
    assert isinstance(kv_session, Local)
    return kv_session


@pytest.fixture(scope="session")
def kv_serving(kv_session: Session) -> Serving:
    """A comparison of servers; a test that asks for it is left out of other runs."""
    assert isinstance(kv_session, Serving)
    return kv_session
