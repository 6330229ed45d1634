"""The negative benchmark: who chooses, who is scored, and that being chosen costs nothing."""

import math

import numpy as np
import pytest

from kvsuite.analysis.benchmark import family, score, select
from kvsuite.analysis.samples import Broken
from kvsuite.columns import Arm
from kvsuite.errors import UsageError

DRAWS = 300


def arm(scores, source="arm", dataset="d", cluster=None, text=None):
    n = len(scores)
    nothing = np.full(n, math.nan)
    keys = [(dataset, str(i)) for i in range(n)]
    return Arm(
        source, keys, cluster or [str(i) for i in range(n)], np.asarray(scores, dtype=float),
        nothing, nothing, nothing, text or [None] * n, {dataset: f"{source}.json"},
    )  # fmt: skip


def world(rng, n=300):
    """A task where every answer is luck in part: a function that draws one more replicate of anything."""
    level = rng.beta(6, 6, n)

    def replicate(harm=0.0):
        return arm(np.clip(level - harm + rng.normal(0, 0.12, n), 0, 1))

    return replicate


def nothing_happens(rng, seed):
    """Methods that do nothing, scored by us – and, in some draws, on the replicate that chose, and as the paper: where
    the method chose."""
    replicate = world(rng)
    base, mine = replicate(), replicate()
    chosen = select(base, {"kivi:4": mine, "h2o": replicate(), "snapkv": replicate()}, "kivi:4")
    ours = score(chosen, replicate(), replicate(), replicate(), draws=600, seed=seed)
    if seed >= DRAWS / 10:
        return ours, None, None
    naive = score(chosen, base, mine, draws=600, seed=seed)
    chose = select(base, {"kivi:4": mine, "h2o": replicate()}, "none of them")
    return ours, naive, score(chose, base, mine, draws=600, seed=seed)


@pytest.fixture(scope="module")
def outcomes():
    rng = np.random.default_rng(1)
    found = zip(*(nothing_happens(rng, seed) for seed in range(DRAWS)), strict=True)
    return [[o for o in column if o is not None] for column in found]


def test_on_the_replicate_that_chose_it_does_not(outcomes):
    _, naive, paper = outcomes
    assert np.mean([o.drop.high < 0 for o in naive]) > 0.99
    assert np.mean([o.drop.high < 0 for o in paper]) > 0.99
    assert np.mean([o.drop.mean for o in paper]) < np.mean([o.drop.mean for o in naive]) < -0.12


def test_luck_of_the_selecting_baseline(outcomes):
    """.68 where it chose, .54 once more (STATISTICS.md)."""
    ours, naive, _ = outcomes
    assert np.mean([o.selecting for o in ours]) == pytest.approx(0.68, abs=0.01)
    assert np.mean([o.base.mean for o in ours]) == pytest.approx(0.54, abs=0.01)
    assert np.mean([o.control.mean for o in ours]) == pytest.approx(0.54, abs=0.01)
    assert naive[0].base.mean == pytest.approx(naive[0].selecting)


def test_a_method_that_breaks_samples_is_found():
    rng = np.random.default_rng(2)
    replicate = world(rng, 2000)
    methods = {"h2o": replicate(0.2), "snapkv": replicate(0.2)}
    found = score(select(replicate(), methods, "kivi"), replicate(), replicate(0.2), replicate(), draws=1000)
    assert found.drop.high < -0.1
    assert found.floor.low < 0 < found.floor.high
    assert found.drop.mean == pytest.approx(found.method.mean - found.base.mean)
    assert found.floor.mean == pytest.approx(found.control.mean - found.base.mean)


BASE = [0.9, 0.9, 0.9, 0.9, 0.1, 0.0]
METHODS = {
    "KIVI-2": arm([0.1, 0.9, 0.1, 0.9, 0.0, 0.0]),
    "KIVI-4": arm([0.0] * 6),
    "h2o:heavy=64": arm([0.1, 0.1, 0.1, 0.9, 0.0, 0.0]),
    "snapkv": arm([0.1, 0.9, 0.9, 0.1, 0.0, 0.0]),
}


class TestSelection:
    def test_jurors_are_of_other_families(self):
        chosen = select(arm(BASE), METHODS, "KIVI-4")
        assert chosen.jurors == ("h2o:heavy=64", "snapkv")
        assert chosen.places == [0]
        assert select(arm(BASE), METHODS, "h2o").jurors == ("KIVI-2", "KIVI-4", "snapkv")

    def test_a_quorum(self):
        assert select(arm(BASE), METHODS, "KIVI-4", quorum=1).places == [0, 1, 2, 3]
        assert select(arm(BASE), METHODS, "h2o", quorum=2).places == [0, 2, 3]
        assert select(arm(BASE), METHODS, "h2o").places == [0]
        assert select(arm(BASE), METHODS, "h2o").quorum == 3

    def test_only_samples_the_baseline_is_good_at(self):
        assert 4 not in select(arm(BASE), METHODS, "KIVI-4", quorum=1).places
        zero = arm([0.0] * 6)
        assert select(zero, METHODS, "KIVI-4", Broken(inclusive=True)).places == []

    def test_the_rule(self):
        methods = {"h2o": arm([0.85, 0.8] * 3)}
        assert select(arm([0.9] * 6), methods, "kivi").places == [1, 3, 5]
        assert select(arm([0.9] * 6), methods, "kivi", Broken(0.2)).places == []

    def test_given_families(self):
        chosen = select(arm(BASE), METHODS, "KIVI-4", families={"SnapKV": "kivi"})
        assert chosen.jurors == ("h2o:heavy=64",)
        assert select(arm(BASE), METHODS, "KIVI-4", families={"KIVI-2": "other"}).jurors[0] == "KIVI-2"

    @pytest.mark.parametrize(
        ("name", "parts"),
        [
            ("KIVI-2", {"kivi"}),
            ("kivi:bits=4", {"kivi"}),
            ("streaming-llm", {"streaming-llm"}),
            ("r-kv:window=8", {"r-kv"}),
            ("H2O-512", {"h2o"}),
            ("h2o:heavy=64,recent=448 + kivi:bits=2", {"h2o", "kivi"}),
        ],
    )
    def test_family(self, name, parts):
        assert family(name) == parts

    def test_a_juror_that_holds_the_candidate_is_none(self):
        methods = {"h2o + kivi:bits=2": METHODS["snapkv"], "snapkv": METHODS["snapkv"]}
        assert select(arm(BASE), methods, "kivi:bits=4").jurors == ("snapkv",)
        assert select(arm(BASE), methods, "h2o + pyramid").jurors == ("snapkv",)

    @pytest.mark.parametrize(
        ("methods", "more", "said"),
        [
            ({"KIVI-2": METHODS["KIVI-2"]}, {}, "no method of another family than KIVI-4"),
            (METHODS, {"quorum": 3}, "quorum of 3 cannot be had from 2 methods"),
            (METHODS, {"quorum": 0}, "quorum of 0"),
            ({"h2o": arm([0.1] * 5, "short")}, {}, "short and arm do not have the same samples"),
            ({"h2o": arm([math.nan] * 6, "blank")}, {}, "blank has a sample without a score"),
        ],
    )
    def test_refused(self, methods, more, said):
        with pytest.raises(UsageError, match=said):
            select(arm(BASE), methods, "KIVI-4", **more)


class TestScore:
    def test_only_the_chosen_samples_count(self):
        chosen = select(arm(BASE), METHODS, "h2o", quorum=2)
        base, mine = arm([0.8, 0, 0.6, 0.4, 0, 0]), arm([0.5, 1, 0.5, 0.5, 1, 1])
        found = score(chosen, base, mine)
        assert (found.candidate, found.n, found.selecting) == ("h2o", 3, pytest.approx(0.9))
        assert (found.base.mean, found.method.mean, found.drop.mean) == pytest.approx((0.6, 0.5, -0.1))
        assert (found.control, found.floor) == (None, None)
        assert "no control" in found.notes[0]

    def test_clusters_of_the_chosen(self):
        """Ten samples of one document are one. The first half, which is not chosen, is of documents of its own."""
        rng = np.random.default_rng(3)
        scores = np.append(np.zeros(120), np.repeat(rng.random(12), 10))
        juror = np.append(np.ones(120), np.zeros(120))
        found = []
        for size in (1, 10):
            names = [f"other {i}" for i in range(120)] + [f"{i // size}" for i in range(120)]
            base, mine, other = (arm(x, cluster=names) for x in (np.ones(240), scores, juror))
            found.append(score(select(base, {"h2o": other}, "x"), base, mine, draws=1000))
        alone, together = (f.drop for f in found)
        assert together.se > 2.5 * alone.se
        assert (alone.df, together.df) == pytest.approx((119, 11))

    def test_nothing_chosen_is_said(self):
        found = score(select(arm(BASE), METHODS, "KIVI-4", Broken(0.999)), arm(BASE), arm(BASE))
        assert (found.n, found.drop, found.base) == (0, None, None)
        assert found.notes[0] == "no sample was chosen"

    def test_replicates_that_are_copies_are_said(self):
        chosen = select(arm(BASE), METHODS, "KIVI-4")
        fresh = arm([0.5] * 6)
        assert any("luck" in note for note in score(chosen, arm(BASE), fresh, fresh).notes)
        assert any("no floor" in note for note in score(chosen, fresh, arm(BASE), fresh).notes)
        assert score(chosen, fresh, arm(BASE), arm([0.6] * 6)).notes == ()

    def test_refused(self):
        chosen = select(arm(BASE), METHODS, "KIVI-4")
        with pytest.raises(UsageError, match="late has a sample without a score"):
            score(chosen, arm(BASE), arm([math.nan] * 6, "late"))
        with pytest.raises(UsageError, match="same samples"):
            score(chosen, arm(BASE), arm(BASE), arm(BASE, dataset="e"))
