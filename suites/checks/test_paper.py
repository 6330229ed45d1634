"""The paper's own figures: its published counts to the last sample, and Algorithm 1 and D on cases done by hand."""

import functools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvsuite import readers
from kvsuite.analysis import effects, paper
from kvsuite.analysis.resample import Design
from kvsuite.analysis.samples import Broken
from kvsuite.analysis.tables import negatives as report
from kvsuite.cli import main

DATA = Path(__file__).parents[3] / "shared" / "data"
SCORES = DATA / "rethink" / "scores"
published = pytest.mark.skipif(not SCORES.is_dir(), reason="the artifact's scores are not beside this checkout")

MODEL = "Meta-Llama-3-8B-instruct_8192_b1"
BASE = f"hf_{MODEL}"
PREFIXES = {
    "kivi": f"kivi_{MODEL}_4bits_group32_residual128",
    "gear": f"gear_{MODEL}_8bits",
    "h2o": f"h2o_{MODEL}_c2048_w32_k7_maxpool",
    "stream": f"streamingllm_{MODEL}_c2048_w32_k7_maxpool",
}
# PAPER.md, "Data at hand": mean rule, baseline over 0, at most (1 - θ) × baseline
ELIGIBLE = 1552
THETAS = (0.01, 0.02, 0.04, 0.08, 0.10, 0.16, 0.24, 0.32)
COUNTS = {
    "kivi": (182, 168, 145, 107, 87, 64, 41, 26),
    "gear": (256, 246, 219, 173, 157, 119, 67, 39),
    "kivi&gear": (108, 97, 78, 50, 36, 19, 6, 4),
    "h2o": (338, 332, 307, 266, 242, 192, 134, 103),
    "stream": (431, 421, 395, 368, 344, 292, 224, 177),
    "h2o&stream": (218, 211, 190, 162, 136, 97, 51, 35),
    "kivi&gear&h2o&stream": (62, 58, 42, 27, 17, 7, 0, 0),
}
TYPE_COLUMNS = ("eligible", "kivi", "gear", "kivi&gear", "h2o", "stream", "h2o&stream")
TYPES = {
    "qa": (306, 10, 17, 2, 54, 111, 34),
    "summarization": (284, 54, 110, 33, 120, 136, 83),
    "few-shot": (348, 5, 13, 0, 39, 31, 9),
    "synthetic": (149, 2, 3, 0, 0, 9, 0),
    "code": (465, 16, 14, 1, 29, 57, 10),
}
SWAPPED = {"kivi": (95, 1558), "gear": (133, None), "h2o": (116, None), "stream": (191, None)}
CODE = Broken(inclusive=True)


@pytest.fixture(scope="module")
def arms():
    return {name: readers.arm(f"artifact:{SCORES}/{prefix}") for name, prefix in {"": BASE, **PREFIXES}.items()}


@pytest.fixture(scope="module")
def scores(arms):
    """The design, the baseline's scores and the methods'."""
    assert len({tuple(arm.keys) for arm in arms.values()}) == 1
    assert len(set(arms[""].dataset)) == 14, "no dataset counts twice"
    design = Design.of(arms[""].dataset, arms[""].cluster)
    return design, arms[""].score, {name: arm.score for name, arm in arms.items() if name}


def told(capsys, *more, folder=SCORES, methods=PREFIXES):
    """What ``kvsuite negatives --json`` prints."""
    named = [f"{name}=artifact:{folder}/{prefix}" for name, prefix in methods.items()]
    candidates = [word for one in named for word in ("--candidate", one)]
    assert main(["negatives", "--baseline", f"artifact:{folder}/{BASE}", *candidates, "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def quick(monkeypatch):
    """Counts do not depend on how often is drawn."""
    monkeypatch.setattr(report, "compare", functools.partial(effects.compare, draws=50))


def counts(found):
    """Every name of COUNTS in what the command printed."""
    return {name: row["negatives"] for name, row in found["methods"].items()} | found["sets"]


@published
def test_the_counts_of_every_theta_and_set(scores):
    swept = paper.sweep(*scores, rule=CODE)
    assert tuple(swept) == paper.THETAS == THETAS
    for at, (theta, found) in enumerate(swept.items()):
        assert found.eligible.sum() == ELIGIBLE
        seen = {m: int(mask.sum()) for m, mask in found.negative.items()} | paper.sets(found.negative)
        assert {name: seen[name] for name in COUNTS} == {name: row[at] for name, row in COUNTS.items()}, theta


@published
@pytest.mark.parametrize("at", range(len(THETAS)), ids=map(str, THETAS))
def test_the_command_prints_the_counts_of_every_theta(at, capsys, quick):
    found = told(capsys, "--inclusive", "--theta", str(THETAS[at]))
    assert (found["eligible"], found["theta"]) == (ELIGIBLE, THETAS[at])
    assert {name: counts(found)[name] for name in COUNTS} == {name: row[at] for name, row in COUNTS.items()}
    if THETAS[at] == CODE.theta:
        one = {name: (row["swapped"], row["swapped_eligible"]) for name, row in found["methods"].items()}
        assert {m: (n, SWAPPED[m][1] and of) for m, (n, of) in one.items()} == SWAPPED
        alone = ("eligible", *PREFIXES)
        wanted = {kind: dict(zip(TYPE_COLUMNS, row, strict=True)) for kind, row in TYPES.items()}
        assert found["by_type"] == {kind: {name: row[name] for name in alone} for kind, row in wanted.items()}


@published
def test_the_counts_of_task_types_with_the_sets_inside_each(scores, arms):
    found = paper.negatives(*scores, CODE)
    types = [arms[""].types[dataset] for dataset in arms[""].dataset]
    mask = found.negative
    pairs = {"kivi&gear": mask["kivi"] & mask["gear"], "h2o&stream": mask["h2o"] & mask["stream"]}
    both = paper.Negatives(found.eligible, mask | pairs)
    seen = {kind: tuple(row[name] for name in TYPE_COLUMNS) for kind, row in paper.by_type(both, types).items()}
    assert seen == TYPES
    assert np.sum(list(TYPES.values()), axis=0).tolist() == [ELIGIBLE, 87, 157, 36, 242, 344, 136]


@published
def test_the_median_rule_gives_102(scores, capsys, quick):
    design, base, methods = scores
    rule = Broken(inclusive=True, benign="median")
    assert paper.negatives(design, base, methods, rule).negative["kivi"].sum() == 102
    found = told(capsys, "--inclusive", "--benign", "median", methods={"kivi": PREFIXES["kivi"]})
    assert found["methods"]["kivi"]["negatives"] == 102
    assert found["sets"] == {}


@published
def test_swapped_roles_give_the_papers_asymmetry(scores):
    design, base, methods = scores
    seen = {name: paper.swapped(design, base, score, CODE) for name, score in methods.items()}
    assert {name: (n, SWAPPED[name][1] and of) for name, (n, of) in seen.items()} == SWAPPED


@published
def test_who_harms_on_balance_is_what_the_data_can_say(capsys, quick):
    found = told(capsys, "--inclusive")["methods"]
    assert [name for name, row in found.items() if row["net_harm_p"] < 0.05] == ["h2o", "stream"]
    assert found["h2o"]["net_harm_p"] < 1e-9
    assert all(row["excess"] is None and row["interval"] is None for row in found.values()), "there is no control"


@published
@pytest.mark.parametrize("benign", ["mean", "median"])
@pytest.mark.parametrize("inclusive", [False, True])
def test_every_rule_agrees_with_a_plain_loop_over_the_data(scores, arms, benign, inclusive):
    _, base, methods = scores
    of_dataset: dict[str, list[float]] = {}
    for dataset, score in zip(arms[""].dataset, base.tolist(), strict=True):
        of_dataset.setdefault(dataset, []).append(score)
    average = {d: getattr(statistics, benign)(x) for d, x in of_dataset.items()}
    for theta in (0.01, 0.1, 0.32):
        rule = Broken(theta, benign, inclusive)
        for name, score in methods.items():
            wanted = []
            for dataset, b, m in zip(arms[""].dataset, base.tolist(), score.tolist(), strict=True):
                edge = (1 - theta) * b
                wanted.append(b > 0 and b >= average[dataset] and (m <= edge if inclusive else m < edge))
            found = paper.negatives(*scores, rule).negative[name]
            assert found.tolist() == wanted, (name, theta)


@published
@pytest.mark.parametrize(
    ("clone", "pattern"),
    [("clone-2/scores", "*/scores"), ("my clone [v1] of 2/scores", None), ("clone-2/a/b", "**/b")],
)
def test_another_clones_folder_gives_the_same(clone, pattern, tmp_path, capsys, quick):
    folder = tmp_path / clone
    folder.mkdir(parents=True)
    for file in SCORES.iterdir():
        (folder / file.name).symlink_to(file)
    there = told(capsys, "--inclusive", folder=tmp_path / pattern if pattern else folder)
    assert there == told(capsys, "--inclusive")
    assert counts(there)["kivi"] == 87


@published
def test_the_published_negative_samples_are_reproduced(scores, arms):
    """Of multi_news by id; the rows of the other datasets are not at hand, so of those only how many."""
    rows = json.loads((DATA / "longbench" / "negative_quant.json").read_text())
    found = paper.negatives(*scores, CODE)
    both = found.negative["kivi"] & found.negative["gear"]
    keys = [key for key, mine in zip(arms[""].keys, both, strict=True) if mine]
    assert set(arms[""].dataset) == set(rows)
    mine = {dataset: sum(d == dataset for d, _ in keys) for dataset in rows}
    assert mine == {dataset: len(samples) for dataset, samples in rows.items()}
    assert [n for n in mine.values() if n] == [15, 10, 8, 2, 1]
    lines = (DATA / "longbench" / "multi_news.jsonl").read_text(encoding="utf-8").split("\n")
    ids = [json.loads(line)["_id"] for line in lines if line]
    assert len(ids) == 200
    assert {ids[int(at)] for d, at in keys if d == "multi_news"} == {row["_id"] for row in rows["multi_news"]}


# by hand


def judged(base, score, **rule):
    """Places that are eligible, and that are negative."""
    scores, score = np.array(base, float), np.array(score, float)
    found = paper.negatives(Design.alone(len(base)), scores, {"m": score}, Broken(**rule))
    return np.flatnonzero(found.eligible).tolist(), np.flatnonzero(found.negative["m"]).tolist()


def test_strict_leaves_the_edge_out_and_inclusive_takes_it():
    base, score = [1, 1, 1, 1], [0.9, 0.899, 0.901, 0]
    assert judged(base, score) == ([0, 1, 2, 3], [1, 3])
    assert judged(base, score, inclusive=True) == ([0, 1, 2, 3], [0, 1, 3])
    assert judged(base, score, theta=0.0995) == ([0, 1, 2, 3], [0, 1, 3])


@pytest.mark.parametrize("benign", ["mean", "median"])
def test_a_baseline_of_zero_is_never_negative(benign):
    # the artifact's code counts it: 0 <= 0.9 × 0
    for inclusive in (False, True):
        assert judged([0, 0, 0], [0, 0.5, 0], benign=benign, inclusive=inclusive) == ([], [])
    assert judged([0, 0, 0, 1], [0, 0, 0, 0], benign="median", inclusive=True) == ([3], [3])


def test_mean_and_median_disagree_where_scores_are_skewed():
    base = [0.1, 0.2, 0.3, 1.0]  # mean 0.4, median 0.25
    assert judged(base, [0] * 4) == ([3], [3])
    assert judged(base, [0] * 4, benign="median") == ([2, 3], [2, 3])


def test_eligible_is_said_of_the_dataset_a_sample_belongs_to():
    design = Design.of(["a", "b"] * 3, [str(i) for i in range(6)])
    base = np.array([0.125, 0.75, 0.25, 0.5, 0.375, 1])
    assert np.flatnonzero(paper.negatives(design, base, {}).eligible).tolist() == [1, 2, 4, 5]
    assert np.flatnonzero(paper.negatives(Design.alone(6), base, {}).eligible).tolist() == [1, 3, 5]


def test_the_mean_itself_is_eligible():
    assert judged([0.1, 0.1, 0.1], [0, 0, 0]) == ([0, 1, 2], [0, 1, 2])
    assert judged([0.1, 0.2, 0.3], [0, 0, 0]) == ([1, 2], [1, 2])


def test_an_absolute_loss_does_not_favour_low_scores():
    base, score = [0.2, 1.0], [0.15, 0.85]
    relative, absolute = (Broken(0.1, absolute=x).fell(np.array(base), np.array(score)).tolist() for x in (False, True))
    assert (relative, absolute) == ([True, True], [False, True])


marks = st.sampled_from([0.0, 0.25, 0.5, 0.9, 0.99, 1.0]) | st.floats(0, 1)


@given(st.lists(st.tuples(st.sampled_from("de"), marks, marks, marks), min_size=1, max_size=40), st.booleans())
def test_a_higher_theta_finds_fewer_and_sets_nest(rows, inclusive):
    dataset, *columns = zip(*rows, strict=True)
    base, one, other = (np.array(c) for c in columns)
    design = Design.of(dataset, [str(i) for i in range(len(rows))])
    swept = paper.sweep(design, base, {"one": one, "other": other}, rule=Broken(inclusive=inclusive))
    before = None
    for theta, found in swept.items():
        assert (found.eligible == next(iter(swept.values())).eligible).all()
        loose = paper.negatives(design, base, {"one": one, "other": other}, Broken(theta, inclusive=True))
        for name, mask in found.negative.items():
            assert not (mask & ~found.eligible).any()
            assert before is None or not (mask & ~before.negative[name]).any(), "a lower θ has it, too"
            assert not (mask & ~loose.negative[name]).any()
        found_sets = paper.sets(found.negative)
        both, any_ = found_sets["one&other"], found_sets["one|other"]
        sizes = [int(mask.sum()) for mask in found.negative.values()]
        assert both + any_ == sum(sizes)
        assert both <= min(sizes)
        before = found
    n, of = paper.swapped(design, base, one)
    back = paper.negatives(design, one, {"": base})
    assert (n, of) == (back.negative[""].sum(), back.eligible.sum())


def test_few_methods_give_every_set_many_give_pairs_and_the_whole():
    def keys(count):
        return list(paper.sets({letter: np.array([True]) for letter in "abcdef"[:count]}))

    assert keys(1) == []
    assert keys(2) == ["a&b", "a|b"]
    assert len(keys(5)) == 2 * (10 + 10 + 5 + 1)
    assert len(keys(6)) == 2 * (15 + 1)
    assert [key for key in keys(6) if len(key) > 3] == ["a&b&c&d&e&f", "a|b|c|d|e|f"]


def test_no_effect_at_all_looks_longer_by_d():
    # 28 % and 16 % with sd(log r) = 0.7: the share of ratios from 3/2 on, and of those up to 1/2
    normal, spread = statistics.NormalDist(), 0.7
    longer, shorter = 1 - normal.cdf(math.log(1.5) / spread), normal.cdf(math.log(0.5) / spread)
    assert (round(longer, 2), round(shorter, 2)) == (0.28, 0.16)
    r = np.exp([spread * normal.inv_cdf((i + 0.5) / 5000) for i in range(5000)])
    for full in (1.0, 200.0):
        assert paper.d_shares(full / r, np.full(5000, full)) == pytest.approx((longer, shorter), abs=2e-4)
    assert paper.d(np.array([100.0] * 3), np.array([150.0, 50, 100])).tolist() == [-0.5, 0.5, 0]
    assert paper.d_shares(np.array([100.0] * 4), np.array([150.0, 149, 50, 51])) == (0.25, 0.25)
