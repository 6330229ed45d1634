"""The first table: what is forced decides, in words that name the method, its bytes and its damage."""

import io
from dataclasses import replace

import numpy as np
import pytest

from kvsuite.analysis.forced import acted, divergences
from kvsuite.analysis.report import analyse
from kvsuite.errors import UsageError
from kvsuite.records import Answer, Forced, Timing, decode, encode
from kvsuite.report import terminal
from suites.checks.test_partial import run

DOCUMENTS, POSITIONS = 16, 64
SMOKE = {"quality": 0.1, "broken": 0.1, "veto": ["quality", "broken", "length", "truncation"]}
NOISE = 2e-4


def forced(method, kl=0.0, loss=0.0, nbytes=100, n=DOCUMENTS, **more):
    """Documents differ by a tenth in how far a method is from the baseline."""
    draw, found = np.random.default_rng(3), []
    for i in range(n):
        level, logs = 1 + 0.1 * draw.standard_normal(), -draw.exponential(1, POSITIONS)
        known = {"task": "document", "sample": f"d{i}", "cluster": f"d{i}", "nbytes": nbytes, "tokens": [1], "cap": 64}
        columns = {
            "kl": (kl * level * draw.exponential(1, POSITIONS)).tolist(),
            "flips": (draw.random(POSITIONS) < min(kl, 1)).astype(int).tolist(),
            "logs": (logs - loss * level).tolist(),
        }
        found.append(Forced(method, prefill_seconds=3.0, **known, **columns, **more))
    return found


def speed(method, ratio, length=1024):
    noise = 1 + 0.01 * np.random.default_rng(length).standard_normal((2, 8))
    seconds = {"seconds": (noise[0] / ratio).tolist(), "baseline_seconds": noise[1].tolist()}
    where = {"cache": "kvsuite.cache.layer.LayerCache/cpu", "checked": 0.5, "path": "m/cpu"}
    return Timing(method, width=8, length=length, tokens=8, **where, **seconds)


def report(*records, methods=("m",)):
    whole = [forced("full"), forced("jitter", NOISE), *records]
    facts = {"margins": SMOKE, "methods": ["full", "jitter", *methods], "finished": "now"}
    return analyse(run(*whole, **facts, expected={"samples": {"document": DOCUMENTS}}))


def decided(*records, method="m", methods=("m",)):
    found = report(*records, methods=methods)
    return found.table("headline").title, found.cell("decision", method, "decision").value


@pytest.mark.parametrize(
    ("kl", "loss", "times", "words"),
    [
        (0.002, 0.001, 1.3, "use it"),
        (0.002, 0.001, 1.0, "use it"),
        (0.002, 0.001, 0.7, "no damage, but slower"),
        (0.09, 0.001, 1.3, "damaged: KL +0.09"),
        (0.002, 0.1, 1.3, "damaged: perplexity +1"),
        (0.3, 0.2, 0.5, "damaged: KL +0.3"),
    ],
)
def test_what_is_forced_decides_and_speed_says_what_for(kl, loss, times, words):
    headline, said = decided(forced("m", kl, loss, nbytes=53), [speed("m", times)])
    assert said.startswith(words)
    if words.startswith("damaged"):
        assert headline == "m: damaged"
    else:
        assert headline == "m: no damage found, 0.53 of the bytes"


def test_from_which_context_on():
    every = [speed("m", ratio, length) for length, ratio in ((512, 0.8), (1024, 0.88), (2048, 0.93))]
    _, said = decided(forced("m", 0.002, 0.001), every)
    assert said.startswith("use it above ")
    assert int(said.split()[3].replace(",", "")) > 2048


def missing(said):
    return [int(x) for x in said.removeprefix("cannot tell: ").removesuffix(" min").split(" more documents, ")]


def test_what_is_missing_is_told_in_documents_and_minutes():
    draw = np.random.default_rng(5)
    wild = [replace(r, kl=(np.array(r.kl) * draw.choice([0.1, 4])).tolist()) for r in forced("m", 0.01, 0.001)]
    found = report(wild)
    whole, said = found.run, found.cell("decision", "m", "decision").value
    assert found.table("headline").title == "m: cannot tell yet"
    more, minutes = missing(said)
    assert more > 0
    assert abs(minutes - more * 9 / 60) <= 1, "three arms at 3 s a document"
    shared = analyse(replace(whole, records=[replace(r, shared_seconds=2.5) for r in whole.records]))
    again, less = missing(shared.cell("decision", "m", "decision").value)
    assert again == more
    assert abs(less - more * 4 / 60) <= 1, "one prefill of 2.5 s a document, and .5 s an arm"


def test_a_control_is_no_method_and_one_that_did_nothing_no_floor():
    found = report(forced("m", 0.002))
    assert {row.key for row in found.table("decision").rows} == {("m",)}
    assert acted(found.run)
    seen, noise = (divergences(found.run)[arm].divergence for arm in ("m", "jitter"))
    assert seen.excess["kl"].mean == pytest.approx(seen.kl.mean - noise.kl.mean)
    still = analyse(run(forced("full"), forced("jitter"), forced("m", 0.002), margins=SMOKE))
    assert not acted(still.run)
    assert divergences(still.run)["m"].divergence.excess == {}


def test_tasks_can_only_veto():
    samples = [Answer(m, task="needle", sample=f"n{i}", score=s, tokens=[i], text=f"{m} {i}", cap=9)
               for m, s in (("full", 1.0), ("jitter", 1.0), ("m", 1.0)) for i in range(8)]  # fmt: skip
    assert decided(forced("m", 0.002, 0.001), samples)[0].startswith("m: no damage found")
    lost = [replace(a, score=0.0) if a.method == "m" else a for a in samples]
    headline, said = decided(forced("m", 0.002, 0.001), lost)
    assert headline == "m: damaged"
    assert said.startswith("damaged: tasks -100 pt")


def references(method, by=0.0, lost=0, n=160, kl=0.0):
    """Reference answers of five tokens, each ``by`` nats less likely; ``lost`` of them 2.3 nats less."""
    draw, own = np.random.default_rng(4), np.random.default_rng([*method.encode()])
    logs, noise = -draw.exponential(1, (n, 5)), own.normal(0, 0.05, (n, 5)) * (method != "full")
    logs = logs + noise - by - 2.3 * (np.arange(n) < lost)[:, None]
    known = {"task": "reference:needle", "type": "synthetic", "tokens": [1], "cap": 5, "kl": [kl] * 5, "flips": [0] * 5}
    return [Forced(method, sample=f"r{i}", cluster=f"r{i}", logs=own.tolist(), **known) for i, own in enumerate(logs)]


@pytest.mark.parametrize(
    ("by", "lost", "n", "verdict"),
    [
        (0.0, 0, 160, "within margin"),
        (0.0, 0, 32, "undecided"),  # of which one in ten could be lost, and none be seen
        (0.2, 0, 32, "harmful"),
        (0.0, 32, 160, "harmful"),
        (0.0, 7, 160, "undecided"),
        (-0.2, 0, 160, "within margin"),
    ],
)
def test_reference_answers(by, lost, n, verdict):
    arms = [references("full", n=n), references("jitter", n=n), references("other", lost=n, n=n)]
    found = report(forced("m", 0.002, 0.001), *arms, references("m", by, lost, n), methods=("m", "other"))
    cell = found.cell("verdicts", ("m", "reference"), "effect")
    assert cell.verdict == verdict
    assert cell.value == pytest.approx(-by - 2.3 * lost / n, abs=0.01)
    assert cell.limits == (-0.1, np.inf)
    words = found.cell("decision", "m", "decision").value
    said = {"within margin": "no damage", "harmful": "damaged: reference answers -0", "undecided": "cannot tell: "}
    assert words.startswith(said[verdict])
    assert ("m", "reference") in [row.key for row in found.table("verdicts").rows]
    assert ("jitter", "reference") not in [row.key for row in found.table("verdicts").rows], "a control is no method"


def test_divergence_is_of_running_text_alone():
    alone = report(forced("m", 0.002, 0.001)).cell("verdicts", ("m", "kl"), "effect")
    arms = [references(arm, kl=3.0) for arm in ("full", "jitter", "m")]
    found = report(forced("m", 0.002, 0.001), *arms)
    assert found.cell("verdicts", ("m", "kl"), "effect").value == alone.value
    assert found.cell("divergence:reference:needle", "m", "kl").value == pytest.approx(3)
    assert found.cell("divergence:document", "m", "kl").value < 0.01


def test_reference_answers_that_are_missing_clear_nobody():
    records = [forced("full"), forced("jitter", NOISE), forced("m", 0.002, 0.001)]
    records += [references("full"), references("jitter"), references("m")[:100]]
    wanted = {"document": DOCUMENTS, "reference:needle": 160}
    facts = {"margins": SMOKE, "methods": ["full", "jitter", "m"], "finished": "now"}
    found = analyse(run(*records, **facts, expected={"samples": wanted}))
    assert found.cell("verdicts", ("m", "reference"), "effect").lacking == (100, 160)
    assert found.cell("verdicts", ("m", "kl"), "effect").lacking is None
    assert found.cell("decision", "m", "decision").value == "partial: answers are missing"


def test_documents_that_are_missing_clear_nobody():
    headline, said = decided(forced("m", 0.002, 0.001, n=9))
    assert (headline, said) == ("m: cannot tell yet", "partial: answers are missing")


def test_documents_of_one_message_are_documents():
    """They are one cluster, of whose spread nothing is known, but none of them is missing."""
    records = [[replace(r, cluster="a") for r in forced(*own)] for own in (("full",), ("jitter", NOISE), ("m", 0.002))]
    facts = {"margins": SMOKE, "methods": ["full", "jitter", "m"], "finished": "now"}
    found = analyse(run(*records, **facts, expected={"samples": {"document": DOCUMENTS}}))
    assert found.cell("decision", "m", "decision").value == "cannot tell"


def test_the_table_of_a_task():
    cells = report(forced("m", 0.09)).table("divergence:document")
    assert cells.cell("full", "kl").value is None
    assert cells.cell("m", "kl").low < 0.09 < cells.cell("m", "kl").high
    assert cells.cell("m", "flips").value == pytest.approx(9, abs=3)


def test_without_v_a_terminal_shows_what_decides():
    class Reporter:
        def __init__(self, verbosity):
            self.verbosity, self._file, self.fullwidth = verbosity, io.StringIO(), 100
            self._tw = self

        def write_line(self, line, **_):
            self._file.write(line + "\n")

    found = report(forced("m", 0.002, 0.001), [speed("m", 1.2)])
    for verbosity, others in ((0, False), (1, True)):
        drawn = Reporter(verbosity)
        terminal.pytest_kv_report(found, drawn)
        text = drawn._file.getvalue()
        assert text.lstrip().startswith("m: no damage found")
        assert ("verdicts" in text, "forced tokens" in text) == (others, others)


def test_a_record_survives():
    (record,) = forced("m", 0.1, n=1)
    assert decode(encode(record)) == record
    assert record.job == ("divergence", "m", "document", "d0", 0)


def test_documents_of_other_numbers_of_tokens_are_refused():
    for columns in ({"kl": [0.1], "flips": [0], "logs": [-1.0]}, {"logs": [-1.0]}):
        lost = [replace(document, **columns) for document in forced("m")]
        with pytest.raises(
            UsageError, match=r"document d0 of document has \d+ kl, \d+ flips and 1 logs of m, not 64 each"
        ):
            analyse(run(forced("full"), lost, methods=["full", "m"]))
