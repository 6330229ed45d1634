"""Chats end to end, why they are longer, and methods along their settings."""

from dataclasses import replace
from pathlib import Path

import pytest

from kvsuite.analysis.length import beside
from kvsuite.analysis.report import analyse
from kvsuite.analysis.requests import Pace, paces, requests
from kvsuite.analysis.tables.chats import family, sentences, sweep, why
from kvsuite.records import Answer, Run, Timing
from suites.checks.drawn import drawn

FACTS = {
    "methods": ["full", "m"], "model": {"name": "tiny", "fingerprint": "1"}, "started": "", "preset": "smoke",
    "command": [], "environment": {"dtype": "bfloat16", "threads": 1, "gpu": None},
    "settings": {"temperature": 1.0, "cap": 99, "batch": [1, 8], "length": [512], "compress": "prompt"},
}  # fmt: skip


def chat(method, *lengths, repeat=0, text="", prompt=100):
    known = {"evaluation": "length", "task": "chat", "cap": 99, "repeat": repeat, "prompt_tokens": prompt, "text": text}
    return [Answer(method, sample=f"c{i}", tokens=[repeat] * n, **known) for i, n in enumerate(lengths)]


def timed(method, phase, width, length, seconds, base, tokens):
    """Two rounds alike."""
    known = {"width": width, "length": length, "tokens": tokens, "checked": 0.1, "path": "x/cpu"}
    return Timing(method, phase=phase, seconds=[seconds] * 2, baseline_seconds=[base] * 2, **known)


SPEEDS = [  # m prefills at half the speed; its step takes 10 ms, full's 20 ms at 100 tokens and 40 ms at 200
    timed("m", "prefill", 1, 100, 2.0, 1.0, 100),
    timed("m", "decode", 1, 100, 0.01, 0.02, 1),
    timed("m", "decode", 1, 200, 0.01, 0.04, 1),
    timed("m", "decode", 8, 100, 9.0, 9.0, 8),
]


def run(*records):
    return Run(Path("left"), FACTS, [r for some in records for r in some])


def tables(found):
    return {table.key: drawn(table) for table in analyse(found).tables}


# end to end


def test_a_request_takes_its_prefill_and_a_step_for_every_further_token():
    pace = Pace({100: 0.01}, {100: 0.02, 200: 0.04})
    assert pace.seconds(100, 0) == pace.seconds(100, 1) == pytest.approx(1.0)
    assert pace.seconds(100, 3) == pytest.approx(1.0 + 0.0202 + 0.0204)
    assert pace.seconds(50, 2) == pytest.approx(0.5 + 0.02), "shorter than any that was timed"
    assert pace.seconds(300, 2) == pytest.approx(3.0 + 0.04), "longer"


def test_the_speed_is_that_of_the_smallest_batch_and_a_methods_a_multiple_of_the_baselines():
    width, known = paces(run(SPEEDS))
    assert width == 1
    assert known["full"].step == pytest.approx({100: 0.02, 200: 0.04})
    assert known["m"].step == pytest.approx({100: 0.01, 200: 0.01})
    assert (known["full"].prefill[100], known["m"].prefill[100]) == pytest.approx((0.01, 0.02))
    assert paces(run(SPEEDS[1:]))[1] == {}, "without a prefill no request has seconds"


def test_a_faster_method_that_answers_longer_makes_requests_slower():
    paced = {"full": Pace({100: 0.0}, {100: 0.02}), "m": Pace({100: 0.0}, {100: 0.01})}
    base = chat("full", 11, 11, 11, 11) + chat("full", 11, 12, 10, 11, repeat=1)
    full, control, m, _, jitter = beside(
        base + chat("m", 11, 21, 31, 11) + chat("x", 9) + chat("jitter", 11, 11, 11, 11)
    )
    found = requests(m, paced, "full")
    assert found.mean.mean == pytest.approx((10 + 20 + 30 + 10) / 2 / 40)
    assert (found.slower, found.pairs) == (1, 4), "0.30 s against 0.18 s; 0.20 s against 0.22 s is not"
    assert found.quantiles["p99"] == pytest.approx(0.5 * (20 + 0.97 * 10) / 10)
    assert requests(control, paced, "full").slower == 1
    assert requests(jitter, paced, "full").mean.mean == 1, "as fast as the baseline"
    assert requests(beside(base + chat("x", 9))[2], paced, "full") is None, "it was not timed"
    assert full.pairs


def test_requests_have_a_table_where_speed_was_measured():
    answers = [*chat("full", *[20, 30] * 4), *chat("full", *[30, 20] * 4, repeat=1), *chat("m", *[60, 90] * 4)]
    found = tables(run(answers, SPEEDS))["requests:chat"]
    assert found.title.startswith("chat, end to end · batch 1")
    assert [row[0] for row in found.rows] == ["full, other seed", "m"]
    assert found.rows[1][-1] == "8/8"
    assert "requests:chat" not in tables(run(answers))


# why longer


def test_why_an_answer_is_longer_is_the_first_reason_that_holds():
    assert why("So it is. " * 40, "So.", True) == "loop"
    assert why("One thing. Another thing", "One.", True) == "cap"
    assert why("One thing. Another thing.", "One.", False) == "sentences"
    assert why("One thing and another thing.", "One.", False) == "other"
    assert sentences("First:\n\n* one\n* two\nIs it 3.5 km? Yes!") == 5
    assert sentences("是。不是。") == 2


def test_reasons_add_up_beside_the_controls():
    base = chat("full", 10, 10, 10, text="One.") + chat("full", 10, 10, 10, repeat=1, text="One.")
    mine = chat("m", 20, 20, 10, text="One. Two. Three.")
    mine[1] = replace(mine[1], finish="length")
    rows = {row[0]: row[1:] for row in tables(run(base, mine))["longer:chat"].rows}
    assert rows == {"full, other seed": ["0/3", "0", "0", "0", "0", "-"], "m": ["2/3", "0", "1", "1", "0", "2"]}
    assert "longer:chat" not in tables(run(base)), "nothing is longer"


# along settings


def test_a_family_is_a_method_without_its_settings():
    assert family("h2o:budget=256+kivi:bits=4,group=32") == "h2o+kivi"


def test_methods_at_several_settings_stand_together_by_bytes():
    def needle(method, nbytes):
        return [Answer(method, task="needle", sample=f"n{i}", score=1.0, nbytes=nbytes, tokens=[i]) for i in range(4)]

    arms = {"full": 100, "kivi:bits=2": 30, "int8": 50, "kivi:bits=4": 40}
    records = [r for arm, nbytes in arms.items() for r in (*needle(arm, nbytes), *chat(arm, 20, 30, 40))]
    found = Run(Path("left"), FACTS | {"methods": list(arms)}, records)
    rows = tables(found)["sweep"].rows
    assert [row[:4] for row in rows] == [
        ["kivi", "kivi:bits=4", "0.40", "1.00"],
        ["kivi", "kivi:bits=2", "0.30", "1.00"],
    ]
    assert sweep(found, {}) == []


# figures


def figures(found):
    return {figure.key: figure for figure in analyse(found).figures}


def test_the_seconds_of_requests_are_drawn_as_shares():
    answers = [*chat("full", 20, 30), *chat("full", 30, 20, repeat=1), *chat("m", 11, 91), *chat("jitter", 20, 30)]
    drawn = figures(run(answers, SPEEDS))["requests:chat"]
    assert [s.name for s in drawn.series] == ["full", "full, other seed", "m"]
    assert [(p.x, p.y) for p in drawn.series[2].points] == [(pytest.approx(2.1), 50), (pytest.approx(2.9), 100)]


def test_length_is_drawn_over_bytes():
    needles = [
        Answer(arm, task="needle", sample=f"n{i}", score=1.0, nbytes=nbytes, tokens=[i])
        for arm, nbytes in (("full", 100), ("m", 25))
        for i in range(3)
    ]
    drawn = figures(run(needles, chat("full", 20, 30, 40), chat("full", 30, 20, 40, repeat=1), chat("m", 40, 60, 80)))
    [series] = drawn["tradeoff:length:chat"].series
    assert (series.arm, series.points[0].x, series.points[0].y) == ("m", 0.25, pytest.approx(2))
    assert drawn["tradeoff:length:chat"].bands[0].low < 1 < drawn["tradeoff:length:chat"].bands[0].high
