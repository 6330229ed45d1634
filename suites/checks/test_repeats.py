"""Several answers to each prompt, and the uncompressed cache at other temperatures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvsuite.analysis.effects import compare
from kvsuite.analysis.length import beside, length_rows
from kvsuite.analysis.runs import changes, noise, parts
from kvsuite.errors import UsageError
from kvsuite.plugin.options import check
from kvsuite.records import Answer, Run
from suites.checks.drawn import tables
from suites.checks.tiny import left

FACTS = {
    "methods": ["full", "m"], "model": {"name": "tiny", "fingerprint": "1"},
    "command": [], "started": "", "preset": "smoke",
    "environment": {"dtype": "bfloat16", "threads": 1, "gpu": None},
    "settings": {"temperature": 1.0, "repeats": 2, "cap": 99, "batch": [1], "length": [512], "compress": "prompt"},
}  # fmt: skip


def chats(method, *lengths, first=0):
    """One list of lengths a repeat; the noise of a repeat is told from its tokens."""
    return [
        Answer(
            method, evaluation="length", task="chat", sample=f"c{i}", repeat=k, cap=99, tokens=[k] * n, text=f"{k} {i}"
        )
        for k, some in enumerate(lengths, start=first)
        for i, n in enumerate(some)
    ]


def made(*records, **facts):
    return Run(Path("left"), FACTS | facts, [r for some in records for r in some])


# which answers are compared


def test_a_methods_repeats_are_paired_with_the_baselines_of_the_same_noise_and_counted_against_the_last():
    base = chats("full", [10, 20], [12, 24], [30, 20])
    full, control, m = beside(base + chats("m", [11, 21], [13, 25]))
    assert [(a.length, b.length) for a, b in m.pairs] == [(11, 10), (21, 20), (13, 12), (25, 24)]
    assert [(a.length, b.length) for a, b in m.apart] == [(11, 30), (21, 20), (13, 30), (25, 20)]
    assert [(a.length, b.length) for a, b in control.apart] == [(10, 30), (20, 20), (12, 30), (24, 20)]
    assert [(a.length, b.length) for a, b in control.pairs] == [(12, 10), (24, 20)], "of three, two that share none"
    assert ([a.repeat for a in control.answers], len(full.answers)) == ([2, 2], 4)
    row = length_rows(base + chats("m", [11, 21], [13, 25]))[2]
    assert row.cost.mean == pytest.approx(70 / 66)
    assert (row.n, row.pairs, row.longer, row.shorter) == (4, 4, 0, 2)


def test_effects_rest_on_prompts_and_pair_all_repeats_with_the_baselines_last():
    lengths = np.random.default_rng(0).integers(20, 60, (5, 12))
    found = made(chats("full", *lengths[:3]), chats("m", *lengths[3:]))
    [part] = parts(found)
    assert part.coupled
    assert np.array_equal(part.control.tokens, np.tile(lengths[2], 2))
    assert np.array_equal(part.base.tokens, lengths[:2].ravel())
    [row] = compare([part])
    assert row.effect("length").n == row.n == 12
    assert row.effect("length").estimate.df == pytest.approx(11), "a prompt's answers are one cluster"
    assert not row.effect("length").lacking
    [control] = noise(found)
    assert np.array_equal(control.base.tokens, lengths[0])


def test_two_runs_are_compared_by_all_repeats_though_methods_have_no_control():
    one = made(chats("full", [10, 20], [12, 24], [30, 20]), chats("m", [11, 21], [13, 25]))
    other = made(chats("full", [10, 20], [12, 24], [30, 20]), chats("m", [15, 30], [14, 26]))
    [found] = [part for part in changes(one, other) if "m" in part.methods]
    assert found.repeats == 2
    assert (found.base.tokens.sum(), found.methods["m"].tokens.sum()) == (70, 85)


def test_a_repeat_that_failed_altogether_does_not_move_the_others():
    """The second answers were held against the baseline's first, whose noise they do not share."""
    mine = chats("m", [11, 21], [13, 25])
    mine = [replace(a, status="failed", error="x", tokens=[]) if a.repeat == 0 else a for a in mine]
    [part] = parts(made(chats("full", [10, 20], [12, 24], [30, 20]), mine))
    assert part.base.tokens.tolist() == [12, 24]


def test_the_prompts_mean_is_what_signs_are_flipped_of():
    """Two answers that always agree are one: p is that of the prompts, not of twice as many."""
    base = np.full(6, 40)
    found = made(chats("full", base, base, base + 1), chats("m", base + 10, base + 10))
    [row] = compare(parts(found))
    assert row.finding("log length").p == pytest.approx(2 / 2**6)


# other temperatures


def test_another_temperature_stands_in_tables_of_chats_alone():
    arm = "full:temperature=0.9"
    lengths = [[30, 20, 44, 25], [24, 27, 40, 22]]
    found = made(chats("full", *lengths, [21, 22, 23, 45]), chats("m", *lengths), chats(arm, [40] * 4, [41] * 4))
    assert [list(part.methods) for part in parts(found)] == [["m"]]
    with_it = {table.title.partition(" · ")[0] for table in tables(found) if arm in str(table.rows)}
    assert with_it == {"chat", "chat, why longer"}, "no verdict, no decision"


# what is asked of a run


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"repeats": 2, "temperature": 0}, "--kv-repeats 2: at --kv-temperature 0 every repeat is the same answer"),
        ({"repeats": 0}, "--kv-repeats must be at least 1, not 0"),
        ({"reference-temperatures": "0.9", "temperature": 0}, "--kv-reference-temperatures: at --kv-temp"),
        ({"reference-temperatures": "1.0"}, "--kv-reference-temperatures 1 is the run's own --kv-temperature"),
        ({"reference-temperatures": "0,1.1"}, "--kv-reference-temperatures must be over 0"),
        ({"reference-temperatures": "warm"}, "--kv-reference-temperatures must be a number of at least 0, not 'warm'"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_a_sentence(given, said):
    with pytest.raises(UsageError) as caught:
        check(given)
    assert str(caught.value).startswith(said)


def test_a_run_of_repeats_and_temperatures_is_resumed_where_it_was(run):
    asked = ["--kv-repeats", "2", "--kv-reference-temperatures", "3"]
    assert run("length", *asked).ret == 0
    arms, arm = ["full", "jitter", "int8", "h2o:budget=64"], "full:temperature=3"
    found = {(a.method, a.repeat, a.sample): a for a in left(Answer)}
    wanted = {(m, k) for m in [*arms, arm] for k in (0, 1)} | {("full", 2)}
    assert {(m, k) for m, k, _ in found} == wanted
    assert len(found) == len(left(Answer)) == 3 * len(wanted)
    assert {a.status for a in found.values()} == {"ok"}
    assert any(found[arm, k, s].tokens != found["full", k, s].tokens for m, k, s in found if m == arm)
    file = Path("left/records.jsonl")
    lines = file.read_text().splitlines()
    gone = [line for line in lines if '"full:temperature' in line or '"repeat": 2' in line]
    assert len(gone) == 9
    file.write_text("\n".join(line for line in lines if line not in gone) + "\n")
    assert run("length", *asked, "--kv-resume", "left").ret == 0
    assert {(a.method, a.repeat, a.sample): a.tokens for a in left(Answer)} == {k: a.tokens for k, a in found.items()}
    assert len(left(Answer)) == len(found)
    report = Path("left/report.md").read_text()
    assert "partial" not in report
    assert "3 prompts, 2 answers each" in report
