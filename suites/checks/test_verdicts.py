"""From intervals to verdicts and to how many samples give one; methods beside the baseline and its noise."""

import math

import numpy as np
import pytest
from scipy import stats as oracle

from kvsuite.analysis.effects import Part, compare
from kvsuite.analysis.length import is_empty, loops
from kvsuite.analysis.stats import Estimate, Interval, benjamini_hochberg, discordant_p, holm, wilson
from kvsuite.analysis.tables.negatives import undecided
from kvsuite.analysis.verdict import Effect, chances, effect, judge, overall, samples_needed
from kvsuite.columns import Arm
from kvsuite.errors import UsageError
from kvsuite.margins import Margins

DRAWS = 1000


def arm(score=None, tokens=None, *, cap=1000, capped=0, text=None, file="x.json"):
    n = len(tokens if score is None else score)
    seconds = None
    columns = (score, tokens, cap, capped, seconds)
    columns = [np.array(np.broadcast_to(math.nan if x is None else x, n), float) for x in columns]
    names = [f"s{i}" for i in range(n)]
    return Arm(file, [("d", s) for s in names], names, *columns, text or [None] * n, {"d": file})


def compared(base, method, control=None, **more):
    [row] = compare([Part(base, {"m": method}, control, **more)], draws=DRAWS)
    return row


@pytest.mark.parametrize(
    ("low", "high", "limit", "worse", "verdict"),
    [
        (0.011, 0.02, 0.01, 1, "harmful"), (0.01, 0.02, 0.01, 1, "undecided"), (-1, 0.01, 0.01, 1, "within margin"),
        (-1, 0.0101, 0.01, 1, "undecided"), (-0.02, -0.011, -0.01, -1, "harmful"), (0, 0, 0, 1, "within margin"),
        (-0.02, -0.01, -0.01, -1, "undecided"), (-0.01, 1, -0.01, -1, "within margin"),
        (1.04, 1.05, 1.03, 1, "harmful"), (0.9, 1.02, 1.03, 1, "within margin"), (0.9, math.inf, 1.03, 1, "undecided"),
        (0.9, 0.99, 1, -1, "harmful"), (1, 1.1, 1, -1, "within margin"), (math.nan, math.nan, 0.01, 1, "undecided"),
    ],
)  # fmt: skip
def test_a_verdict_is_of_the_interval_not_of_the_point(low, high, limit, worse, verdict):
    assert judge(Interval(0, low, high), limit, worse) == verdict


def test_the_worst_endpoint_decides():
    def of(*verdicts):
        return overall([Effect("quality", Estimate(0, 0, 0), 0, 1, 9, verdict=v) for v in verdicts])

    assert of("within margin", "harmful", "undecided") == "harmful"
    assert of("within margin", "undecided") == of() == "undecided"
    assert of("within margin", "within margin") == "within margin"


@pytest.mark.parametrize("name", ["quality", "broken", "length", "speed"])
@pytest.mark.parametrize("value", [-0.01, 1, math.nan, math.inf])
def test_a_margin_is_from_0_to_below_1(name, value):
    with pytest.raises(UsageError, match=f"the margin for {name} must be"):
        Margins(**{name: value})


@pytest.mark.parametrize("n", [1, 8, 380, 381])
def test_answers_that_never_changed_are_safe_only_when_many(n):
    found = compared(arm([0.5] * n), arm([0.5] * n)).effect("quality")
    assert found.verdict == ("within margin" if n == 381 else "undecided")
    reach = wilson(0, n).high if n > 1 else 1
    assert (found.estimate.low, found.estimate.high) == pytest.approx((-reach, reach))
    assert n == 1 or 381 <= math.ceil(found.needed) <= 385


@pytest.mark.parametrize("changed", [0, 1, 9, 10])
def test_an_interval_holds_what_few_changes_have_not_shown(changed):
    lost = np.arange(300) < changed
    found = compared(arm([1] * 300), arm(1.0 - lost)).effect("quality").estimate
    unseen = 0 if changed == 10 else wilson(changed, 300).high - changed / 300
    assert found.unseen == pytest.approx(unseen)
    assert found.low <= -changed / 300 - unseen + 1e-12
    assert found.high >= min(unseen - changed / 300, 0) - 1e-12
    short = compared(arm(tokens=[100] * 300), arm(tokens=100 - 50 * lost)).effect("length").estimate
    assert short.high >= short.mean + 9 * unseen - 1e-12, "an answer can grow to its cap, nine times its length more"
    assert changed == 10 or short.low == pytest.approx(short.mean - unseen)


@pytest.mark.parametrize("n", [2, 3])
def test_few_samples_that_all_gained_are_not_safe(n):
    assert compared(arm([0] * n), arm([1] * n)).verdict == "undecided"


@pytest.mark.parametrize("endpoint", ["length", "quality"])
def test_harm_is_not_suspected_where_little_changed(endpoint):
    few = np.resize([0.1, -0.1], 300) * (np.arange(300) < 6)
    some = {"length": {"tokens": [100] * 200}, "quality": {"score": [0.5] * 300}}[endpoint]
    other = {"length": some, "quality": {"score": 0.5 + few}}[endpoint]
    found = compared(arm(**some), arm(**other)).effect(endpoint)
    assert found.verdict == "undecided"
    assert "some harm is likely" not in undecided(found)


@pytest.mark.parametrize(("column", "endpoint"), [("score", "quality"), ("tokens", "length")])
def test_so_many_unchanged_answers_as_are_needed_are_enough(column, endpoint):
    def of(n):
        same = arm(**{column: [0.5 if column == "score" else 100] * n})
        return compared(same, same).effect(endpoint)

    needed = math.ceil(of(200).needed)
    assert needed > 300, "the more, the more an answer can still change"
    assert (of(needed).verdict, of(int(needed * 0.95)).verdict) == ("within margin", "undecided")


@pytest.mark.parametrize("n", [5, 40])
def test_a_method_that_answers_nothing_has_an_interval(n):
    found = compared(arm(tokens=[50] * n), arm(tokens=[0] * n)).effect("length").estimate
    assert 0 == found.mean == found.low <= found.high


@pytest.mark.parametrize(("ratio", "margin"), [(False, 0.01), (True, 0.03), (False, 0.05)])
def test_so_many_samples_as_are_needed_decide_4_times_of_5(ratio, margin):
    seen = Estimate(float(ratio), 0, 0, 0.02, 99)
    needed = samples_needed(seen, 100, margin, ratio)
    assert chances(seen, 100, round(needed), 0, margin, ratio)["within margin"] == pytest.approx(0.8, abs=0.01)
    assert samples_needed(seen, 200, margin, ratio) == pytest.approx(2 * needed)
    at_edge = chances(seen, 100, 5000, margin, margin, ratio)
    assert at_edge["within margin"] == pytest.approx(at_edge["harmful"]) == pytest.approx(0.025, abs=0.001)
    assert sum(at_edge.values()) == pytest.approx(1)
    assert chances(seen, 100, 5000, 3 * margin, margin, ratio)["harmful"] > 0.99
    assert samples_needed(seen, 100, 0) == math.inf
    found = effect("length" if ratio else "quality", seen, margin, 1 if ratio else -1, 100, None, ratio)
    visible = (oracle.t.ppf(0.975, 99) + oracle.norm.ppf(0.8)) * 0.02
    assert (found.needed, found.visible) == pytest.approx((needed, math.expm1(visible) if ratio else visible))


# methods against the baseline


def test_a_control_is_the_floor_and_an_identical_one_is_none():
    low = [0.5] * 10  # these are not eligible, whatever becomes of them
    base, same = arm([1] * 40 + low), arm([1] * 40 + low)
    method, control = arm([0] * 12 + [1] * 28 + [0] * 10), arm([1] * 30 + [0] * 10 + low)
    row, back = compared(base, method, control), compared(base, control, method).effect("broken")
    assert (row.negatives, row.floor, row.eligible) == (12, 10, 40)
    there = row.effect("broken")
    assert (there.estimate.mean, there.p, there.n) == (pytest.approx(2 / 40), discordant_p(12, 10), 40)
    assert back.p == there.p, "by noise alone method and control are exchangeable"
    mirrored = (-there.estimate.mean, -there.estimate.high, -there.estimate.low)
    assert (back.estimate.mean, back.estimate.low, back.estimate.high) == pytest.approx(mirrored)
    for none in (None, same):
        row = compared(base, method, none)
        assert (row.effect("broken"), row.floor, row.negatives) == (None, None, 12)


def test_coupled_answers_are_both_held_against_the_control():
    one = arm([1] * 30 + [0] * 10, [100] * 40)
    control = arm([0] * 12 + [1] * 28, [100] * 30 + [300] * 10)
    free, coupled = (compared(one, one, control, coupled=x) for x in (False, True))
    assert (free.effect("broken").estimate.mean, free.effect("broken").p) == (-12 / 30, discordant_p(0, 12))
    assert (coupled.effect("broken").estimate.mean, coupled.effect("broken").p) == (0, 1)
    assert ([(x.negatives, x.floor) for x in (free, coupled)]) == [(0, 12), (10, 10)]
    assert (free.finding("longer").counts, free.finding("shorter").counts) == ((0, 10), (0, 0))
    assert (coupled.finding("longer").counts, coupled.finding("shorter").counts) == ((0, 0), (0, 0))
    assert coupled.effect("quality").estimate.mean == 0


def test_a_scrambler_is_caught_by_broken_beyond_noise_and_not_by_net_harm():
    half = [1, 0] * 100
    flipped = np.where(np.arange(200) < 60, 1 - np.array(half), half)
    row = compared(arm(half), arm(flipped), arm([*half[:-2], 0, 1]))
    assert (row.negatives, row.floor, row.finding("net harm").counts) == (30, 1, (30, 30))
    assert row.effect("quality").estimate.mean == 0
    assert row.finding("net harm").p == 1
    assert row.effect("broken").verdict == row.verdict == "harmful"
    assert row.finding("churn").counts == (60, 2)


@pytest.mark.parametrize("who", ["m", "c", "b"])
@pytest.mark.parametrize(("cap", "said"), [(999, "999 tokens"), (math.nan, "none that is known")])
def test_different_and_unknown_caps_are_refused(who, cap, said):
    some, caps = [10.0] * 5, [1000, 1000, 1000, cap, 1000]
    base, method, control = (arm(tokens=some, cap=caps if x == who else 1000, file=f"{x}.json") for x in "bmc")
    with pytest.raises(UsageError, match=rf"(?=.*{who}\.json).*: sample s3 of d had different caps.*{said}"):
        compared(base, method, arm(tokens=[9] * 5, cap=control.cap, file="c.json"))


def test_lengths_end_at_the_cap_and_what_stands_beside_them():
    said, loop = "One thing and another.", "Again and again and so on. " * 5
    base = arm(tokens=[100, 200, 300, 600], text=[said] * 4)
    method = arm(tokens=[150, 100, 200, 5000], capped=[0, 0, 0, 1], text=[loop, " \n", said, said])
    row = compared(base, method)
    assert row.effect("length").estimate.mean == (150 + 100 + 200 + 1000) / 1200
    assert row.finding("log length").estimate.mean == pytest.approx(math.log(1.5 * 0.5 * 2 / 3 * 10 / 6) / 4)
    assert [row.finding(name).counts for name in ("cap hits", "empty", "loops")] == [(1, 0)] * 3
    beside = compared(base, method, arm(tokens=[100, 200, 100, 600])).finding
    assert (beside("longer").counts, beside("shorter").counts) == ((2, 0), (1, 0))


def test_parts_are_merged_and_corrected_once_over_all():
    draw = np.random.default_rng(6)
    x = draw.random((4, 30)).round(1)
    scored = Part(arm(x[0]), {"m": arm(x[1]), "n": arm(x[2])}, arm(x[3]))
    chats = Part(*(f(arm(tokens=100 + 100 * y)) for f, y in ((lambda a: a, x[0]), (lambda a: {"m": a}, x[1]))))
    m, n = found = compare([scored, chats], draws=DRAWS)
    assert ([e.endpoint for e in m.effects], m.n) == (["quality", "broken", "length"], 60)
    assert ([e.endpoint for e in n.effects], n.n) == (["quality", "broken"], 30)
    assert (m.negatives, m.floor, m.eligible) == (m.negatives, n.floor, n.eligible) != (None, None, 0)
    effects, findings = [e for r in found for e in r.effects], [f for r in found for f in r.findings]
    assert [e.adjusted for e in effects] == pytest.approx(holm([e.p for e in effects]))
    tested = [f for f in findings if f.p is not None]
    assert [f.adjusted for f in tested] == pytest.approx(benjamini_hochberg([f.p for f in tested]))


NUMBERS = "".join(f"{i:02d}." for i in range(67))
SENTENCE = "The cache holds keys and values. "


@pytest.mark.parametrize(
    ("text", "looping"),
    [
        (SENTENCE * 5, True), (SENTENCE * 3, False), ("It begins well. " + SENTENCE * 6 + "The cache ho", True),
        (SENTENCE * 6 + "And then it ends.", False), ("a" * 60, True), ("a" * 59, False), ("ha " * 10, False),
        ("", False), ("Some text.\n\n---\n", False), ("| a | b |\n|---|---|\n| 1 | 2 |\n| 3 | 4 |\n", False),
        ("".join(f"{i}. A line of its own.\n" for i in range(9)), False), (SENTENCE * 9 + "\n \n", True),
        (NUMBERS[:200] * 4, True), (NUMBERS * 5, False),
    ],
)  # fmt: skip
def test_a_loop_is_a_piece_that_ends_a_text_four_times_over(text, looping):
    assert loops(text) is looping
    assert is_empty(text) is (text == "")


@pytest.mark.parametrize("between", [" ", "\n", "\n\n"])
def test_pieces_with_something_between_loop_at_the_fourth_time(between):
    assert loops(between.join([SENTENCE.strip()] * 4))
