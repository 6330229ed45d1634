"""What the plugin does once an evaluation is asked for: what its tests share, and its report."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from _pytest.junitxml import xml_key

from kvsuite import environment
from kvsuite.analysis.report import Report, analyse
from kvsuite.analysis.shortfall import interrupted
from kvsuite.engines import ranks
from kvsuite.errors import UsageError, printable
from kvsuite.modes import PAGED
from kvsuite.plugin import EVALUATIONS, SESSION, chosen_by, evaluates, options, untold
from kvsuite.plugin.local import Local
from kvsuite.plugin.options import Options
from kvsuite.plugin.serving import Serving
from kvsuite.plugin.session import Session
from kvsuite.records import is_control, read
from kvsuite.registry import Registry, function
from kvsuite.report import html, markdown, terminal
from kvsuite.tasks import Task

ALIKE = (
    "torchrun's processes share one model, which is timed: choose -m throughput alone, without -n, --kv-executor and "
    "servers"
)
ALONE = "speed is timed alone: run -m throughput without -n or --kv-executor"
NEEDS = "answering here needs {}: pip install 'kvsuite[local]'"
REPORTS = Registry("report", "reports", function("pytest_kv_report"))


def begin(config: pytest.Config) -> None:
    """Read and check all options, and register the reports and the hooks of this module."""
    worker: dict[str, Any] = getattr(config, "workerinput", {})
    if ranks.rank():  # pytest's terminal is configured later, and writes there
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (to the end of this process)
    try:
        asked = options.read(config)
        reports = {name: REPORTS.module(name) for name in REPORTS.names()}
    except UsageError as error:
        raise _refused(str(error)) from error
    folder = Path(worker["kv_run"]) if "kv_run" in worker else None
    kind = Local if asked.servers is None else Serving
    if kind is Serving and getattr(config.option, "dist", "no") != "no":
        raise pytest.UsageError("servers are asked from one process: run without -n")
    if ranks.size() > 1:
        _begin_rank(config, asked)
    config.stash[SESSION] = kind(asked, worker.get("workerid", ""), folder)
    plugins = {"html": html, "terminal": terminal, "markdown": markdown, **reports}  # the last one draws first
    for name, module in plugins.items():
        if not config.pluginmanager.is_registered(module):
            config.pluginmanager.register(module, f"kvsuite.report.{name}")
    config.pluginmanager.register(sys.modules[__name__], __name__)
    if worker:
        _share_machine(worker)


def _begin_rank(config: pytest.Config, asked: Options) -> None:
    """Refuse what the processes of torchrun cannot share."""
    beside = getattr(config.option, "dist", "no") != "no" or asked.executor != "here"
    if beside or asked.servers is not None or chosen_by(config.option.markexpr) != ["throughput"]:
        raise _refused(ALIKE)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, when another rank has ended: a report is being written
    if asked.device == "cpu":  # transformers splits a model over GPUs where it sees one
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _refused(said: str) -> Exception:
    """What ends pytest with exit code 4 and this sentence, which the first rank prints for all."""
    return pytest.UsageError(said) if ranks.rank() == 0 else pytest.exit.Exception(said, pytest.ExitCode.USAGE_ERROR)


def _share_machine(worker: Mapping[str, Any]) -> None:
    """Give a worker of pytest-xdist a GPU of its own, in turn, and its share of the cores, unless the user did."""
    number, count = int(worker["workerid"].removeprefix("gw")), int(worker["workercount"])
    if gpus := len(list(Path("/proc/driver/nvidia/gpus").glob("*"))):
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", str(number % gpus))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, environment.cores() // count)))  # read when torch is imported


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

        # A worker waits while it knows of fewer than two tests and more may come. xdist 3.8 gives one that replaces a
        # dead one a single group of its tests, of which none or one may be left: the run would never end.
        def remove_node(self, node: Any) -> Any:
            work = self.assigned_work.get(node, {})
            for group in [group for group, tests in work.items() if all(tests.values())]:
                del work[group]
            return super().remove_node(node)

        def _reschedule(self, node: Any) -> None:
            if node not in self.registered_collections:  # it has yet to say what it found
                return
            super()._reschedule(node)
            if self.workqueue and not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
                self._reschedule(node)

    session = config.stash[SESSION]
    return ByTask(config, log)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell each pytest-xdist worker where the run leaves its records."""
    node.workerinput["kv_run"] = str(node.config.stash[SESSION].folder.absolute())


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Refuse to go on with another run, a folder that another process writes to, and a model that cannot be compared,
    before workers start or anything is loaded."""
    run = session.config.stash[SESSION]
    if run.worker:
        return
    try:
        if not (session.config.option.collectonly or ranks.rank()):
            run.claim()
        if run.options.resume is not None:
            run.check_resumed()
        if not session.config.option.collectonly:
            with _lenient():
                run.check_model()
    except UsageError as error:
        raise _refused(str(error)) from error
    except ImportError as error:
        raise _refused(NEEDS.format(error.name)) from error


def parametrize(metafunc: pytest.Metafunc, session: Session) -> None:
    """One test per method, server, task, batch and length where a test asks for them; tasks are those of its
    evaluation."""
    asked, own = session.options, {m.name for m in metafunc.definition.iter_markers()}
    by_arm = bool({"kv_arm", "kv_method"} & set(metafunc.fixturenames))
    tasks = [task.name for task in session.tasks if _marker(task, asked, by_arm) in own]
    methods = asked.methods if asked.servers is None else ()
    if "throughput" in own:  # a control's speed is that of making noise
        methods = tuple(method for method in methods if not is_control(method.name))
    lengths = tuple(dict.fromkeys(length for _, length in asked.cells))
    cells = [pytest.param(width, length, id=f"b{width}-l{length}") for width, length in asked.cells]
    apart: dict[str, tuple[Any, Any]] = {
        "kv_batch": (asked.batch, lambda width: f"b{width}"),
        "kv_length": (asked.length, lambda tokens: f"l{tokens}"),
    }
    # a prefill takes seconds, and smoke has minutes
    prefills = [lengths[0] // 2] if asked.preset == "smoke" else lengths
    values: dict[str, tuple[Any, Any]] = {
        "kv_method": (methods, lambda method: method.name),
        "kv_arm": (asked.arms, lambda name: name.replace(" ", "-")),
        "kv_cell": (session.cells if isinstance(session, Serving) else (), lambda cell: cell.name.replace(" ", "-")),
        "kv_task": (tasks, str),
        "kv_batch,kv_length": (cells, None),
        "kv_prefill": (prefills, lambda tokens: f"l{tokens}"),
        **(apart if not {*apart} <= set(metafunc.fixturenames) else {}),
        "kv_mode": ([pytest.param(PAGED, id=pytest.HIDDEN_PARAM), *asked.modes], str),
    }
    for name, (parameters, identify) in values.items():
        if set(name.split(",")) <= set(metafunc.fixturenames):
            metafunc.parametrize(name, parameters, ids=identify)


def _marker(task: Task, asked: Options, by_arm: bool) -> str:
    """The evaluation that a task is part of. Where the reference is forced there is no answer to be made again, and
    nothing can be forced through a server's cache."""
    if task.evaluation == "divergence":
        return "samples" if by_arm and asked.servers is None else ""
    return task.evaluation


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
        if evaluates(item):
            item.add_marker(pytest.mark.filterwarnings("default"))
            beside = session.worker or session.options.executor != "here"
            if beside and item.get_closest_marker("throughput"):
                item.add_marker(pytest.mark.skip(reason=ALONE))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch what the chosen evaluations need before the first one starts."""
    config = session.config
    chosen = [item for item in session.items if evaluates(item)]
    if config.option.collectonly or untold(config) or not chosen:
        return
    params = [getattr(item, "callspec", None) for item in chosen]
    named = {str(p.params["kv_task"]) for p in params if p is not None and "kv_task" in p.params}
    evaluations = [m for m in EVALUATIONS if any(i.get_closest_marker(m) for i in chosen)]
    run = config.stash[SESSION]
    tasks = named.intersection(run.options.tasks)  # pytest names a missing parameter, too
    try:
        run.choose(chosen)
        _refuse_untimed(config, evaluations, run.timed_cells)
        with _lenient():
            run.fetch(sorted(tasks), evaluations)
            alone = not run.worker and getattr(config.option, "dist", "no") == "no"
            line = run.announce(chosen) if alone else ""
    except UsageError as error:
        raise _refused(str(error)) from error
    except ImportError as error:
        raise _refused(NEEDS.format(error.name)) from error
    if line:
        config.get_terminal_writer().line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """A test of an arm's answers took as long as its jobs, whichever test they were done for."""
    report = yield
    run = item.config.stash[SESSION]
    report.duration -= run.sharing
    run.sharing = 0.0
    if call.when == "call" and (spec := getattr(item, "callspec", None)):
        report.duration += run.took.pop((str(spec.params.get("kv_arm")), str(spec.params.get("kv_task"))), 0.0)
    return report


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


def _refuse_untimed(config: pytest.Config, evaluations: Sequence[str], cells: int) -> None:
    """UsageError where pytest-benchmark, which times the cells, is not there or was told not to."""
    if cells and not config.pluginmanager.hasplugin("benchmark"):
        raise UsageError(
            "cells are timed by pytest-benchmark, which is not there: pip install 'kvsuite[local]', or choose "
            "-m 'samples or length'"
        )
    if "throughput" in evaluations and getattr(config.option, "benchmark_disable", False):
        raise UsageError(
            "--benchmark-disable leaves no speed to measure: leave it out, or choose -m 'samples or length'"
        )


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Note in ``run.json`` that the run came to its end: without that its tables are partial."""
    run = session.config.stash[SESSION]
    ended = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if ended and not (run.worker or ranks.rank() or session.shouldstop or session.shouldfail):
        try:
            run.run.amend({"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        except UsageError as error:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
            session.config.get_terminal_writer().line(f"\n{error}", red=True, bold=True)


def _again(config: pytest.Config, folder: Path) -> str:
    """The command that resumes a run."""
    words = iter(config.invocation_params.args)
    kept = [str(w) for w in words if not (str(w) in ("--kv-run", "--kv-resume") and next(words, ""))]
    kept = [w for w in kept if not w.startswith(("--kv-run=", "--kv-resume="))]
    return shlex.join([*ranks.command(), *kept, "--kv-resume", str(folder)])


def _end(config: pytest.Config, code: pytest.ExitCode) -> None:
    """Let pytest end with this code, if it was to end with 0."""
    session = config.pluginmanager.getplugin("session")
    if session is not None and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = code


def _hold(config: pytest.Config, report: Report, strict: bool) -> None:
    """Let gates, and what was found wrong with servers, decide how pytest ends, and tell them to its JUnit file, which
    is then written once more."""
    gates = [row for table in report.tables if table.key == "gates" for row in table.rows]
    alarms = report.alarms if strict else ()
    if not (gates or alarms):
        return
    if report.failed or alarms:
        _end(config, pytest.ExitCode.TESTS_FAILED)
    if (xml := config.stash.get(xml_key, None)) is not None:
        for row in gates:
            xml.add_global_property(" ".join(row.key), str(row.cells["state"].value))
        for said in alarms:
            xml.add_global_property(said.partition(":")[0], said)
        xml.pytest_sessionfinish()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Let the ranks of torchrun end together, and others write to the run's folder."""
    ranks.leave()
    config.stash[SESSION].release()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Join what the workers left and let every report plugin view the run."""
    session = config.stash[SESSION]
    if any(ALONE in str(report.longrepr) for report in terminalreporter.getreports("skipped")):
        terminalreporter.write_line(ALONE, red=True, bold=True)
    if session.worker or ranks.rank() or not (session.folder / "run.json").is_file():
        return
    try:
        session.run.join()
        with _lenient():
            report = analyse(read(session.folder), session.options.gates)
            config.hook.pytest_kv_report(report=report, terminalreporter=terminalreporter)
        _hold(config, report, session.options.strict)
        if isinstance(session, Local) and interrupted(report.run):
            terminalreporter.write_line(f"interrupted; go on with: {_again(config, session.folder)}", bold=True)
    except (UsageError, OSError) as error:  # of a disk that is full, too
        said = f"no report of {session.folder}: {printable(str(error))}"
        terminalreporter.write_line(said, red=True, bold=True)
        _end(config, pytest.ExitCode.USAGE_ERROR)  # gates were not held against anything
