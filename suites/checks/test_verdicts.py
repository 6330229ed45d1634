"""From intervals to verdicts and to how many samples give one; methods beside the baseline and its noise."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as oracle
from scipy.optimize import minimize_scalar
from statsmodels.stats.proportion import proportion_confint

from kvsuite.analysis.effects import DEFAULT, Part, compare, decided
from kvsuite.analysis.length import is_empty, loops
from kvsuite.analysis.resample import Design
from kvsuite.analysis.shares import Unseen, tango_bound, tango_z
from kvsuite.analysis.stats import LEVEL, Estimate, Interval, Ratio, benjamini_hochberg, estimate, holm
from kvsuite.analysis.tables.negatives import undecided
from kvsuite.analysis.verdict import Effect, decide, effect, judge, overall, samples_needed
from kvsuite.columns import Arm
from kvsuite.errors import UsageError
from kvsuite.margins import Margins
from suites.checks.simulations import chances

DRAWS = 1000


def arm(score=None, tokens=None, *, cap=1000, capped=0, text=None, file="x.json"):
    n = len(tokens if score is None else score)
    columns = (score, tokens, cap, capped)
    columns = [np.array(np.broadcast_to(math.nan if x is None else x, n), float) for x in columns]
    names = [f"s{i}" for i in range(n)]
    return Arm(file, [("d", s) for s in names], names, *columns, text or [None] * n, {"d": file})


def compared(base, method, control=None, margins=DEFAULT, **more):
    [row], _ = decided(compare([Part(base, {"m": method}, control, **more)], margins, draws=DRAWS), margins)
    return row


NONE, BELOW, ABOVE = math.inf, (-0.01, math.inf), (-math.inf, 0.01)


@pytest.mark.parametrize(
    ("low", "high", "limits", "verdict"),
    [
        (0.011, 0.02, ABOVE, "harmful"), (0.01, 0.02, ABOVE, "undecided"), (-1, 0.01, ABOVE, "within margin"),
        (-1, 0.0101, ABOVE, "undecided"), (-0.02, -0.011, BELOW, "harmful"), (0, 0, (-NONE, 0), "within margin"),
        (-0.02, -0.01, BELOW, "undecided"), (-0.01, 1, BELOW, "within margin"),
        (0.9, math.inf, (0.5, 1.03), "undecided"), (0.9, 1.02, (0.8, 1.03), "within margin"),
        (0.9, 1.02, (0.95, 1.03), "undecided"), (0.6, 0.7, (0.8, 1.2), "harmful"), (1.3, 1.4, (0.8, 1.2), "harmful"),
        (math.nan, math.nan, ABOVE, "undecided"),
    ],
)  # fmt: skip
def test_a_verdict_is_of_the_interval_not_of_the_point(low, high, limits, verdict):
    assert judge(Interval(0, low, high), limits) == verdict


def test_the_worst_endpoint_decides_and_speed_is_no_damage():
    def of(*verdicts, endpoint="quality"):
        return overall(
            [Effect(endpoint, Estimate(0, 0, 0), ABOVE, 9, verdict=v, veto=v == "not excluded") for v in verdicts]
        )

    assert of("within margin", "harmful", "undecided") == "harmful"
    for open_ in ("undecided", "capped", "partial"):
        assert of("within margin", open_) == "undecided"
    assert of() == of("not excluded") == "undecided"
    assert of("within margin", "not excluded") == "within margin"
    assert of("harmful", endpoint="speed") == "undecided"


# Tango's score, and families


@pytest.mark.parametrize(
    ("pairs", "low", "high"), [((1, 7, 21), -0.517, -0.026), ((40, 20, 160), 0.031, 0.218), ((0, 0, 16), -0.194, 0.194)]
)
def test_tangos_interval(pairs, low, high):
    """Of bentur_2009 as in Fagerland, Lydersen and Laake (2014, Statistics in Medicine 33:2850); the others by brute
    force. Without discordant pairs it is Wilson's of a share."""
    assert [tango_bound(pairs, side, 0.025) for side in (-1, 1)] == pytest.approx([low, high], abs=6e-4)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 30), st.floats(-0.9, 0.9))
def test_tangos_statistic_is_that_of_the_most_likely_shares(one, other, same, difference):
    if not one + other + same:
        return
    n = one + other + same

    def unlikely(q):
        shares = np.array([q + difference, q, 1 - 2 * q - difference])
        return -oracle.multinomial.logpmf([one, other, same], n, shares / shares.sum())

    ends = max(0, -difference) + 1e-9, (1 - difference) / 2 - 1e-9
    q = minimize_scalar(unlikely, bounds=ends, method="bounded", options={"xatol": 1e-10}).x
    z = (one - other - n * difference) / math.sqrt(n * (2 * q + difference - difference**2))
    assert tango_z((one, other, n), difference) == pytest.approx(z, abs=1e-3)


@given(
    st.one_of(
        st.builds(lambda b, c, n: ("pairs", (b, c, b + c + n)), *[st.integers(0, 15)] * 2, st.integers(1, 40)),
        st.builds(lambda k, n: ("unseen", Unseen(k, k + n, (0.5, 0.5))), st.integers(0, 9), st.integers(1, 40)),
        st.just(("unseen", None)),
    ),
    st.sampled_from([-1, 1]), st.sampled_from([0.05, 0.025, 0.05 / 56]), st.booleans(), st.booleans(),
    st.floats(-1, 1),
)  # fmt: skip
def test_a_bound_is_where_p_is_the_level(what, side, level, safe, log, skew):
    kind, value = what
    if kind == "pairs":
        b, c, n = value
        seen = Estimate.of((b - c) / n, 0.1, n - 1, pairs=value)
    else:
        seen = Estimate.of(1.1, 0.05, 7, log=log, unseen=value, skew=skew)
        plain = replace(seen, skew=0.0).bound(side, level, safe)
        assert side * (seen.bound(side, level, safe) - plain) >= -1e-12, "a correction is to the safe side"
    end = seen.bound(side, level, safe)
    if abs(end) < 1 or kind == "unseen":
        assert seen.p(end, -side, safe) == pytest.approx(level, rel=1e-4)


def test_skew_is_that_of_the_clusters_mean():
    x = np.random.default_rng(0).exponential(1, 16)
    seen, plain = estimate(Design.alone(16), [Ratio(x, skewed=True), Ratio(x)])
    assert (seen.skew, plain.skew) == (pytest.approx(oracle.skew(x, bias=False) / 4), 0)
    assert seen.bound(1, 0.05, safe=True) > plain.bound(1, 0.05, safe=True)
    assert seen.bound(-1, 0.05, safe=True) == plain.bound(-1, 0.05, safe=True), "its tail is on the other side"
    assert seen.bound(1, 0.05) == plain.bound(1, 0.05), "harm is not widened"
    pairs = np.repeat(x, 3), np.full(48, 1 / 3)  # documents of three positions
    design = Design.of(["d"] * 48, [f"{i // 3}" for i in range(48)])
    assert estimate(design, [Ratio(pairs[0] / 3, pairs[1], skewed=True)])[0].skew == pytest.approx(seen.skew)


def test_the_bounds_of_t_are_scipys():
    seen = Estimate.of(1.3, 0.1, 6, log=True)
    ends = 1.3 * np.exp(oracle.t.interval(0.9, 6, scale=0.1))
    assert [seen.bound(side, 0.05) for side in (-1, 1)] == pytest.approx(ends)
    assert seen.p(1.1, 1) == pytest.approx(oracle.t.sf(math.log(1.3 / 1.1) / 0.1, 6))
    assert seen.p(1.1, -1) == pytest.approx(1 - seen.p(1.1, 1))


def of(mean, se=0.01, endpoint="quality", direction=-1, margin=0.05, df=200, **more):
    return effect(endpoint, Estimate.of(mean, se, df), margin, direction, 200, **more)


@pytest.mark.parametrize("margins", [None, Margins(veto={"quality"})])
def test_verdict_p_and_interval_agree_in_every_family(margins):
    draw = np.random.default_rng(0)
    for _ in range(300):
        count = draw.integers(1, 9)
        found = []
        for at in range(count):
            true, se = draw.choice([0, 0.03, 0.2]), draw.choice([0.005, 0.02, 0.06])
            found.append((f"m{at // 2}", of(-true, se)))
            found.append((f"m{at // 2}", of(true, se, "length", 0)))
        for _, e in decide(found, margins):
            assert (e.verdict == "harmful") == (e.adjusted <= LEVEL) == (judge(e.estimate, e.limits) == "harmful")
            if e.verdict != "not excluded":
                assert e.verdict == judge(e.estimate, e.limits)
            else:
                assert e.endpoint == "quality"


def test_harm_is_holms_over_all_and_the_rest_gets_the_level_that_is_left():
    found = [("a", of(-0.2)), ("a", of(0.0)), ("b", of(-0.08)), ("c", of(-0.05)), ("c", of(0.0, endpoint="speed"))]
    decided = [e for _, e in decide(found)]
    assert [e.adjusted for e in decided] == pytest.approx(holm([e.harm(-1) for _, e in found]))
    assert [e.verdict == "harmful" for e in decided] == [True, False, True, False, False]
    assert {e.levels[0] for e in decided} == {LEVEL / 3}
    assert decided[3].estimate.high == pytest.approx(-0.05 + oracle.t.isf(LEVEL / 3, 200) * 0.01)


def test_within_margin_is_all_endpoints_of_a_method_holm_over_methods():
    p = {name: oracle.t.ppf(1 - level, 200) for name, level in (("one", 0.04), ("half", 0.02))}
    safe, just, loose = of(0.0), *(of(-0.05 + 0.01 * p[name]) for name in ("half", "one"))

    def verdicts(*effects):
        return [e.verdict == "within margin" for _, e in decide(effects)]

    assert verdicts(("a", safe), ("a", loose)) == [True, True], "an intersection needs no correction"
    assert verdicts(("a", loose), ("b", loose)) == [False, False]
    assert verdicts(("a", loose), ("b", safe)) == [True, True]
    assert verdicts(("a", just), ("b", just)) == [True, True]
    assert verdicts(("a", of(0, endpoint="speed")), ("b", loose)) == [True, True], "speed is a family of its own"


def test_a_veto_convicts_and_never_clears():
    veto = Margins.parse("veto=quality")
    (_, kl), (_, quality) = decide([("m", of(0.0, endpoint="kl", direction=1)), ("m", of(0.0, 0.2))], veto)
    assert (kl.verdict, quality.verdict, overall([kl, quality])) == ("within margin", "not excluded", "within margin")
    (_, kl), (_, quality) = decide([("m", of(0.0, endpoint="kl", direction=1)), ("m", of(-0.5))], veto)
    assert (quality.verdict, overall([kl, quality])) == ("harmful", "harmful")
    loose = of(oracle.t.isf(0.04, 200) * 0.01 - 0.05, endpoint="kl")
    found = decide([("m", of(0.0, endpoint="kl")), ("m", of(0.0, 0.2)), ("n", loose)], veto)
    assert [e.verdict for _, e in found] == ["within margin", "not excluded", "within margin"], (
        "it takes no level either"
    )


def test_what_lacks_answers_or_a_spread_is_in_no_family():
    partial, lone, bad = of(-0.5, compared=3, asked=4), of(-0.5, df=0), of(-0.5)
    found = [e for _, e in decide([("a", partial), ("b", lone), ("c", bad)])]
    assert [(e.verdict, e.adjusted is None) for e in found] == [
        ("partial", True),
        ("undecided", True),
        ("harmful", False),
    ]
    assert found[2].levels[0] == LEVEL


def test_a_two_sided_margin_of_a_ratio_is_x_and_one_over_x():
    assert of(1.0, ratio=True, direction=0, margin=0.15).limits == (1 / 1.15, 1.15)
    assert of(1.0, ratio=True, direction=-1, margin=0.05).limits == (0.95, math.inf)
    for ratio in (0.8, 1.25):
        seen = effect("length", Estimate.of(ratio, 0.01, 99, log=True), 0.15, 0, 99, ratio=True)
        assert decide([("m", seen)])[0][1].verdict == "harmful"


def test_margins_are_written_and_kept():
    found = Margins.parse("quality=0.1, veto=quality+length")
    assert (found.quality, found.length, found.veto) == (0.1, 0.15, ("length", "quality"))
    assert Margins(**json.loads(json.dumps(vars(found)))) == found == Margins(quality=0.1, veto={"length", "quality"})
    with pytest.raises(UsageError, match="unknown endpoint 'size'"):
        Margins.parse("veto=size")


@pytest.mark.parametrize(("lost", "n", "verdict"), [(9, 24, "harmful"), (6, 16, "harmful"), (2, 16, "undecided")])
def test_few_samples_show_much_harm(lost, n, verdict):
    assert compared(arm([1] * n), arm([0] * lost + [1] * (n - lost))).verdict == verdict


@pytest.mark.parametrize("name", Margins.names())
@pytest.mark.parametrize("value", [-0.01, 1, math.nan, math.inf])
def test_a_margin_is_from_0_to_below_1(name, value):
    with pytest.raises(UsageError, match=f"the margin for {name} must be"):
        Margins(**{name: value})


def upper(k, n, level=LEVEL):
    """Wilson's one-sided upper limit."""
    return proportion_confint(k, n, alpha=2 * level, method="wilson")[1]


@pytest.mark.parametrize(("n", "safe"), [(1, False), (8, False), (24, False), (25, True)])
def test_answers_that_never_changed_are_safe_only_when_many(n, safe):
    """Of scores of .5, which could fall or rise by as much."""
    found = compared(arm([0.5] * n), arm([0.5] * n)).effect("quality")
    assert found.verdict == ("within margin" if safe else "undecided")
    reach = 0.5 * upper(0, n) if n > 1 else 1
    assert (found.estimate.low, found.estimate.high) == pytest.approx((-reach, reach))
    assert n == 1 or 24 < found.needed < 25.5


@pytest.mark.parametrize("changed", [0, 1, 9, 10])
def test_the_safe_end_holds_what_few_changes_have_not_shown_and_the_other_does_not(changed):
    lost = np.arange(300) < changed
    found = compared(arm([0.98] * 300), arm(0.98 - 0.98 * lost)).effect("quality").estimate
    mean = -0.98 * changed / 300
    unseen = 0 if changed == 10 else upper(changed, 300) - changed / 300
    bare = oracle.t.isf(LEVEL, 299) * found.se
    assert found.low == pytest.approx(mean - max(unseen * 0.98, bare))
    if changed:
        assert found.high == pytest.approx(mean + bare)
    short = compared(arm(tokens=[100] * 300), arm(tokens=100 - 50 * lost)).effect("length").estimate
    assert short.high >= short.mean + 9 * unseen - 1e-12, "an answer can grow to its cap, nine times its length more"


@pytest.mark.parametrize("n", [2, 3])
def test_few_samples_that_all_gained_are_not_safe(n):
    assert compared(arm([0] * n), arm([1] * n)).verdict == "undecided"


@pytest.mark.parametrize("endpoint", ["length", "quality"])
def test_harm_is_not_suspected_where_little_changed(endpoint):
    few = np.resize([0.1, -0.1], 300) * (np.arange(300) < 6)
    some = {"length": {"tokens": [100] * 200}, "quality": {"score": [0.5] * 300}}[endpoint]
    other = {"length": some, "quality": {"score": 0.5 + few}}[endpoint]
    found = compared(arm(**some), arm(**other), margins=Margins(quality=0.002, length=0.03)).effect(endpoint)
    assert found.verdict == "undecided"
    assert "some harm is likely" not in undecided(found)


@pytest.mark.parametrize(("column", "endpoint"), [("score", "quality"), ("tokens", "length")])
def test_so_many_unchanged_answers_as_are_needed_are_enough(column, endpoint):
    def of(n):
        same = arm(**{column: [0.5 if column == "score" else 100] * n})
        return compared(same, same, margins=Margins(quality=0.01, length=0.03)).effect(endpoint)

    needed = math.ceil(of(200).needed)
    assert needed == pytest.approx({"quality": 133, "length": 810}[endpoint], abs=9), "the more, the more can change"
    assert (of(needed).verdict, of(int(needed * 0.95)).verdict) == ("within margin", "undecided")


@pytest.mark.parametrize("n", [5, 40])
def test_a_method_that_answers_nothing_has_an_interval(n):
    found = compared(arm(tokens=[50] * n), arm(tokens=[0] * n)).effect("length").estimate
    assert 0 == found.mean == found.low <= found.high


@pytest.mark.parametrize(("ratio", "margin"), [(False, 0.01), (True, 0.03), (False, 0.05)])
def test_so_many_samples_as_are_needed_decide_4_times_of_5(ratio, margin):
    seen = Estimate(float(ratio), 0, 0, 0.02, 99, log=ratio, room=1.0)
    needed = samples_needed(seen, 100, margin, ratio)
    assert chances(seen, 100, round(needed), 0, margin, ratio)["within margin"] == pytest.approx(0.8, abs=0.01)
    assert samples_needed(seen, 200, margin, ratio) == pytest.approx(2 * needed)
    at_edge = chances(seen, 100, 5000, margin, margin, ratio)
    assert at_edge["within margin"] == pytest.approx(at_edge["harmful"]) == pytest.approx(0.05, abs=0.001)
    assert sum(at_edge.values()) == pytest.approx(1)
    assert chances(seen, 100, 5000, 3 * margin, margin, ratio)["harmful"] > 0.99
    assert samples_needed(seen, 100, 0) == math.inf
    found = effect("perplexity" if ratio else "quality", seen, margin, 1 if ratio else -1, 100, ratio)
    assert found.needed == pytest.approx(needed)
    away = (math.log1p(found.visible) if ratio else found.visible) / 0.02
    assert oracle.nct.sf(oracle.t.ppf(0.95, 99), 99, away) == pytest.approx(0.8)


def test_what_could_have_been_seen_is_seen_4_times_of_5():
    """Scores of 0 and 1, also where nothing changed: identical answers would not have shown everything."""
    n = 48
    e = compared(arm([1] * n), arm([1] * n), margins=Margins(quality=0)).effect("quality")
    assert 0.02 < e.visible < 0.25
    chance = oracle.binom(n, e.visible)
    alone = [compared(arm([1] * n), arm([0] * k + [1] * (n - k)), margins=Margins(quality=0)) for k in range(n // 2)]
    found = [row.effect("quality").adjusted <= row.effect("quality").levels[0] for row in alone]
    assert sum(chance.pmf(k) for k, seen in enumerate(found) if seen) + chance.sf(n // 2 - 1) > 0.75


# methods against the baseline


def test_a_control_is_the_floor_and_an_identical_one_is_none():
    low = [0.5] * 10  # these are not eligible, whatever becomes of them
    base, same = arm([1] * 40 + low), arm([1] * 40 + low)
    method, control = arm([0] * 12 + [1] * 28 + [0] * 10), arm([1] * 30 + [0] * 10 + low)
    row, back = compared(base, method, control), compared(base, control, method).effect("broken")
    assert (row.negatives, row.floor, row.eligible) == (12, 10, 40)
    there = row.effect("broken")
    assert (there.estimate.mean, there.estimate.pairs, there.n) == (pytest.approx(2 / 40), (12, 10, 40), 40)
    assert back.estimate.mean == -there.estimate.mean
    for side in (-1, 1):  # by noise alone method and control are exchangeable
        assert back.estimate.bound(side, LEVEL) == pytest.approx(-there.estimate.bound(-side, LEVEL))
    for none in (None, same):
        row = compared(base, method, none)
        assert (row.effect("broken"), row.floor, row.negatives) == (None, None, 12)


def test_coupled_answers_are_both_held_against_the_control():
    one = arm([1] * 30 + [0] * 10, [100] * 40)
    control = arm([0] * 12 + [1] * 28, [100] * 30 + [300] * 10)
    free, coupled = (compared(one, one, control, coupled=x) for x in (False, True))
    assert (free.effect("broken").estimate.mean, free.effect("broken").estimate.pairs) == (-12 / 30, (0, 12, 30))
    assert (coupled.effect("broken").estimate.mean, coupled.effect("broken").estimate.pairs) == (0, (0, 0, 28))
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
    m, n = found = decided(compare([scored, chats], draws=DRAWS))[0]
    assert ([e.endpoint for e in m.effects], m.n) == (["quality", "broken", "length"], 60)
    assert ([e.endpoint for e in n.effects], n.n) == (["quality", "broken"], 30)
    assert (m.negatives, m.floor, m.eligible) == (m.negatives, n.floor, n.eligible) != (None, None, 0)
    effects, findings = [e for r in found for e in r.effects], [f for r in found for f in r.findings]
    p = holm([e.harm(side) for e in effects for side in e.sides])
    assert sorted(e.adjusted for e in effects)[:2] == pytest.approx(sorted(p)[:2])
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
