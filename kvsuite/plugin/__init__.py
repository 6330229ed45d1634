"""The pytest plugin, as every project with kvsuite installed loads it: options and markers, nothing that takes time.
Where an evaluation is asked for, `kvsuite.plugin.evaluation` does the rest."""

from __future__ import annotations

import re
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from _pytest.mark.expression import Expression

import kvsuite
from kvsuite.plugin import declared, hooks

if TYPE_CHECKING:
    from kvsuite.plugin.local import Local
    from kvsuite.plugin.serving import Serving
    from kvsuite.plugin.session import Session

EVALUATIONS = ("throughput", "length", "samples", "tools")
FIXTURES = frozenset(
    f"kv_{name}"
    for name in ("session", "local", "serving", "method", "arm", "cell", "task", "batch", "length", "prefill", "mode")
)
"""By these a test is known to be an evaluation's."""
PACKAGE = Path(kvsuite.__file__).parent
SUITES = PACKAGE / "suites" if (PACKAGE / "suites").is_dir() else PACKAGE.parent / "suites"
"""The folder of the evaluations: in an installed package, else beside the package of a checkout."""
SESSION = pytest.StashKey["Session"]()
UNTOLD = "under pytest-xdist the evaluation must be known before the workers start: choose it by -m"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare ``--kv-…``."""
    declared.add(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare the report hook."""
    pluginmanager.add_hookspecs(hooks)


def pytest_configure(config: pytest.Config) -> None:
    """Where an evaluation is asked for, read and check all options before anything is collected or loaded, and before
    pytest-xdist starts its workers."""
    for name in EVALUATIONS:
        config.addinivalue_line("markers", f"{name}: evaluation: see kvsuite's README")
    used, chosen = _used(config), chosen_by(config.option.markexpr)
    if used:
        _refuse_unknown_marker(config)
    if chosen and used and hasattr(config.option, "benchmark_quiet"):
        config.option.benchmark_quiet = True  # the report has the figures of pytest-benchmark's table, in pairs
    if chosen or _given(config) or (used and getattr(config.option, "dist", "no") != "no"):
        run_of(config)


def _given(config: pytest.Config) -> bool:
    return any(config.getoption(f"kv_{key}") is not None for key in declared.HELP)


def _used(config: pytest.Config) -> bool:
    """Whether this project, or this command, means kvsuite: it may well be installed beside another one."""
    named = any(arg.partition("::")[0].startswith("kvsuite.suites") for arg in config.args)
    if named or "kvsuite.plugin" in config.option.plugins or config.getini("kv_suites") or _given(config):
        return True
    file = config.rootpath / "pyproject.toml"
    return file.is_file() and re.search(r"^\[tool\.kvsuite[\].]", file.read_text(encoding="utf-8"), re.M) is not None


def _words(expression: str) -> set[str]:
    return set(re.findall(r"[^\W\d]\w+", expression)) - {"and", "or", "not"}


def _matches(expression: str, name: str) -> bool:
    """Whether ``-m`` chooses a test with this one marker. One that cannot be read does not: pytest will tell."""
    try:
        return Expression.compile(expression).evaluate(lambda word, /, **parameters: word == name)
    except SyntaxError:
        return False


def chosen_by(expression: str) -> list[str]:
    """The evaluations that ``-m`` asks for by name."""
    return [name for name in EVALUATIONS if name in _words(expression) and _matches(expression, name)]


def _refuse_unknown_marker(config: pytest.Config) -> None:
    """UsageError for a ``-m`` with a misspelled evaluation, which would choose nothing, or every check."""
    import difflib

    known = {re.split(r"[:(]", line)[0].strip() for line in config.getini("markers")}
    for word in _words(config.option.markexpr) - known:
        if near := difflib.get_close_matches(word, EVALUATIONS, 1, 0.7):
            raise pytest.UsageError(f"unknown marker {word!r} in -m: did you mean {near[0]!r}?")


def ruled_out(config: pytest.Config, folder: str) -> bool:
    """Whether a ``-m`` made of evaluations' names rules out all tests of a folder, whose name is their only marker."""
    words = _words(expression := config.option.markexpr)
    return bool(words) and words <= set(EVALUATIONS) and not _matches(expression, folder)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out the evaluations that ``-m`` rules out: their imports take seconds."""
    ours = collection_path.parent == SUITES and collection_path.is_dir()
    return True if ours and ruled_out(config, collection_path.name) else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Collect the evaluations beside what a project with ``kv_suites`` collects, unless a path is named. They are no
    argument of pytest: in a virtual environment inside the project it would overlook them."""
    report, config = (yield), collector.config
    if isinstance(collector, pytest.Session) and report.passed and config.getini("kv_suites"):
        named = config.args_source is config.ArgsSource.ARGS
        if chosen_by(config.option.markexpr) and not named:
            collector._initialpaths |= {SUITES}  # names of tests begin there
            proxy = collector.gethookproxy(SUITES.parent)
            report.result.append(proxy.pytest_collect_directory(path=SUITES, parent=collector))
    return report


def run_of(config: pytest.Config) -> Session:
    """The run of this pytest session; the first call reads and checks all options."""
    if SESSION not in config.stash:
        from kvsuite.plugin import evaluation

        evaluation.begin(config)
    return config.stash[SESSION]


def untold(config: pytest.Config) -> bool:
    """Whether this is a worker of pytest-xdist whose controller did not know that there is an evaluation."""
    worker = getattr(config, "workerinput", None)
    return worker is not None and "kv_run" not in worker


def evaluates(item: pytest.Item) -> bool:
    """Whether a test is one of an evaluation; a marker of that name may be another project's own."""
    marked = any(item.get_closest_marker(name) for name in EVALUATIONS)
    return marked and not FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per method, server, task, batch and length where a test asks for them."""
    if not FIXTURES.isdisjoint(metafunc.fixturenames):
        from kvsuite.plugin import evaluation

        evaluation.parametrize(metafunc, run_of(metafunc.config))


@pytest.fixture(scope="session")
def kv_session(pytestconfig: pytest.Config) -> Session:
    """The run: its options, and what has been answered so far, whoever answers."""
    if untold(pytestconfig):
        pytest.fail(UNTOLD, pytrace=False)
    return run_of(pytestconfig)


@pytest.fixture(scope="session")
def kv_local(kv_session: Session) -> Local:
    """A run in this process, with its engine; a test that asks for it is left out where servers are compared."""
    from kvsuite.plugin.local import Local

    assert isinstance(kv_session, Local)
    return kv_session


@pytest.fixture(scope="session")
def kv_serving(kv_session: Session) -> Serving:
    """A comparison of servers; a test that asks for it is left out of other runs."""
    from kvsuite.plugin.serving import Serving

    assert isinstance(kv_session, Serving)
    return kv_session
