"""pytest -m tools: each tool learns from runs (--kv-learn, else this one's own cells and chats) and is scored on what
it had not seen. Each figure is one record; a tool to which the runs say too little is skipped, with the reason."""

import math

import pytest

from kvsuite.errors import UsageError

pytestmark = pytest.mark.tools


@pytest.fixture(scope="module")
def runs(kv_session):
    """Folders that are learned from."""
    return kv_session.options.learn or (kv_session.folder,)


def report(kv_session, figures):
    """Record what ``figures`` finds, and check that it can be believed."""
    try:
        found = figures()
    except UsageError as reason:
        pytest.skip(str(reason))
    for one in found:
        kv_session.record(one)
    for one in found:
        assert one.n > 0
        assert one.nulls, "nothing stands beside it"
        assert all(map(math.isfinite, [one.value, *one.nulls.values()]))
        assert one.low is None or one.low <= one.value <= one.high


def test_throughput_predictor(kv_session, runs):
    from kvsuite.predict import reported

    report(kv_session, lambda: reported.throughput(reported.timed(runs)))


def test_length_predictor(kv_session, runs):
    from kvsuite.predict import reported
    from kvsuite.runs.verbosity import MiniLM

    report(kv_session, lambda: reported.length(reported.chats(runs), MiniLM()))


def test_types_of_tasks(kv_session, runs):
    from kvsuite.predict import reported
    from kvsuite.runs.verbosity import MiniLM

    report(kv_session, lambda: reported.task_types(reported.chats(runs), MiniLM()))


def test_router(kv_session, runs):
    from kvsuite.predict import reported

    report(kv_session, lambda: reported.router(reported.timed(runs), reported.chats(runs)))
