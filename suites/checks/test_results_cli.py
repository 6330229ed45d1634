"""``kvsuite negatives`` as a user meets it: its JSON, its tables, and one sentence for a mistake."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvsuite.analysis import effects, stats
from kvsuite.cli import main
from kvsuite.report import terminal
from suites.checks import drawn

N = 40
ARGS = ["--baseline", "artifact:s/base", "--candidate", "m=artifact:s/m"]
CONTROL = ["--control", "artifact:s/control"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty folder with scores of two datasets, of whose samples m halved 12 and the control spoiled 3 others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "s").mkdir()
    base = np.resize([1, 0.75, 0.5, 0], N)
    m, control = base.copy(), base.copy()
    m[:12], m[12:20:2], control[20:26] = m[:12] / 2, 1, np.resize([0, 1], 6)
    for name, scores in {"base": base, "m": m, "control": control}.items():
        put(name, scores.tolist())
        put(name, scores[::-1].tolist(), "lcc")
    return tmp_path


def put(name, scores, dataset="trec", first=0):
    rows = [{"id": at, "score": score} for at, score in enumerate(scores, first)]
    file(name, dataset).write_text(json.dumps(rows))


def file(name, dataset="trec"):
    return Path("s") / f"{name}_{dataset}_eval.json"


@pytest.fixture
def told(capsys):
    """The code of a command, and what it printed."""

    def go(*words):
        code = main(list(map(str, words)))
        return code, *capsys.readouterr()

    return go


@pytest.fixture
def refused(told, monkeypatch):
    """The one line that a command ends with, before anything is resampled."""

    def drawn(*_, **__):
        raise AssertionError("resampled before the mistake was told")

    def go(*words):
        for module, name in ((stats, "bootstrap"), (effects, "sign_flip")):
            monkeypatch.setattr(module, name, drawn)
        code, out, err = told(*words)
        assert (code, out, err.count("\n"), err[:9]) == (2, "", 1, "kvsuite: "), err
        return err

    return go


# negatives


def typed(value):
    return {k: typed(v) for k, v in value.items()} if isinstance(value, dict) else type(value).__name__


@pytest.mark.parametrize("control", [[], CONTROL, ["--control", "artifact:s/base"]], ids=["none", "noise", "identical"])
def test_the_json_is_the_issues_shape_and_nothing_else(told, control):
    code, out, err = told("negatives", *ARGS, "--candidate", "n=artifact:s/base", *control, "--json")
    found = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert code == 0
    assert list(found) == ["eligible", "theta", "methods", "sets", "by_type"]
    numbers, floor = ("int", "int", "int"), control == CONTROL
    names = ["negatives", "swapped", "swapped_eligible", "excess", "interval", "net_harm_p", "mean_difference"]
    kinds = [*numbers, *(("float", "list") if floor else ("NoneType",) * 2), "float", "float", "list", "str"]
    row = dict(zip([*names, "mean_interval", "verdict"], kinds, strict=True))
    assert list(found["methods"]["m"]) == list(row)
    counted = {"eligible": "int", "m": "int", "n": "int"}
    assert typed(found) == {
        "eligible": "int",
        "theta": "float",
        "methods": {"m": row, "n": row},
        "sets": {"m&n": "int", "m|n": "int"},
        "by_type": {"few-shot": counted, "code": counted},
    }
    for name, row in found["methods"].items():
        assert row["verdict"] in ("harmful", "within margin", "undecided"), name
        ends = [row["mean_interval"], *([row["interval"]] if floor else [])]
        assert all(
            len(end) == 2 and end[0] <= x <= end[1]
            for end, x in zip(ends, (row["mean_difference"], row["excess"]), strict=False)
        )
    said = {"none": "No control", "noise": "The control, noise alone, changed ", "identical": "No floor measured"}
    assert err.startswith(said["none" if not control else "noise" if floor else "identical"])


def test_theta_may_be_points_of_the_score(told):
    """Halved scores of .75 and 1 lost half of themselves, but .375 and .5 points."""
    for rule, negatives in (((), 12), (("--absolute",), 6)):
        words = ["negatives", *ARGS, *CONTROL, "--theta", "0.4", *rule]
        assert json.loads(told(*words, "--json")[1])["methods"]["m"]["negatives"] == negatives
    assert "below the baseline's score less 0.4" in " ".join(told(*words)[1].split())


def test_the_json_counts_right(told):
    found = json.loads(told("negatives", *ARGS, *CONTROL, "--json")[1])
    m = found["methods"]["m"]
    # of each dataset 1 and .75 are at least the mean; m halved six of these, the control spoiled two
    assert found["eligible"] == 40
    assert found["by_type"] == {"few-shot": {"eligible": 20, "m": 6}, "code": {"eligible": 20, "m": 6}}
    assert (m["negatives"], found["sets"]) == (12, {})
    assert m["excess"] == pytest.approx((12 - 4) / 40)
    assert m["mean_difference"] == pytest.approx((3 * -2.25 / 2 + 1) / N)
    assert m["verdict"] == "undecided"  # 8 more of 40 at a margin of 5 %


NONE = [{"id": 0, "score": None}]
BROKEN = {
    "shorter": (lambda: put("m", [1] * 39), "s/m_trec_eval.json has no sample 39 of trec, which s/base_trec_eval"),
    "longer": (lambda: put("m", [1] * 41), "s/base_trec_eval.json has no sample 40 of trec, which s/m_trec_eval"),
    "other ids": (lambda: put("m", [1] * N, first=1), "s/m_trec_eval.json has no sample 0 of trec"),
    "twice": (lambda: file("m").write_text(json.dumps(NONE * 2).replace("null", "1")), "s/m_trec", "sample 0", "twice"),
    "no dataset": (lambda: file("m", "lcc").unlink(), "artifact:s/m has no dataset lcc (s/base_lcc_eval.json has)"),
    "nan": (lambda: put("m", [1, math.nan]), "s/m_trec_eval.json: sample 1 of trec has the score nan"),
    "above": (lambda: put("m", [1, 1.5]), "s/m_trec_eval.json: sample 1 of trec has the score 1.5"),
    "below": (lambda: put("m", [-0.1]), "s/m_trec_eval.json: sample 0 of trec has the score -0.1"),
    "none": (lambda: put("m", [0, 1, None]), "s/m_trec_eval.json: sample 2 of trec has no score"),
    "words": (lambda: put("m", ["0.5"]), "s/m_trec_eval.json: sample 0 of trec has the score '0.5'"),
    "cut off": (lambda: file("m").write_text(file("m").read_text()[:-9]), "s/m_trec_eval.json cannot be read as JSON"),
    "empty": (lambda: put("m", []), "s/m_trec_eval.json is not a list of scores"),
    "bytes": (lambda: file("m").write_bytes(b"\xff\xfe\x00"), "s/m_trec_eval.json", "cannot be read as UTF-8"),
    "control": (lambda: put("control", [1] * 39), "s/control_trec_eval.json has no sample 39 of trec"),
}


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["table", "json"])
def test_broken_scores_are_one_sentence_with_file_and_sample(refused, how, more):
    breaking, *words = BROKEN[how]
    breaking()
    said = refused("negatives", *ARGS, *CONTROL, *more)
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--candidate", "m=artifact:s/base"], "--candidate m is there twice"),
        (["--candidate", "artifact:s/base"], "--candidate 'artifact:s/base': write NAME=SPEC"),
        (["--candidate", "=artifact:s/base"], "write NAME=SPEC"),
        (["--candidate", "n=artefact:s/base"], "unknown format of results 'artefact': did you mean 'artifact'?"),
        (["--candidate", "n=artifact:gone/base"], "there is no file or folder 'gone'"),
        (["--candidate", "n=artifact:s/nothing"], "no file of s starts with 'nothing'"),
        (["--control", "artifact:*/x/base"], "there is no file or folder '*/x'"),
        (["--theta", "0"], "theta must be a number between 0 and 1, not 0"),
        (["--theta", "1"], "theta must be"),
        (["--theta", "nan"], "theta must be"),
        (["--margins", "quality=-0.01"], "the margin for quality must be a number of at least 0"),
        (["--margins", "length=0.1,broken=nan"], "the margin for broken must be"),
        (["--margins", "score=0.1"], "unknown margin 'score': "),
        (["--margins", "quality"], "the margin for quality must be a number, not ''"),
        (["--candidate", "n=s"], "'s' is not a run folder"),
    ],
)
def test_a_mistake_in_the_command_is_one_sentence(refused, words, said):
    assert said in refused("negatives", *ARGS, *words)


def test_what_not_all_have_is_dropped_and_told_if_that_is_allowed(told):
    put("m", [1] * 35)
    file("control", "lcc").unlink()
    told_so = ["left out of lcc: 40 of 40", "left out of trec: 5 of 40 samples that not all have (35, 36, 37, 38, 39)"]
    code, out, err = told("negatives", *ARGS, *CONTROL, "--allow-missing", "--json")
    assert (code, list(json.loads(out)["by_type"])) == (0, ["few-shot"])
    assert all(word in err for word in told_so)
    code, out, err = told("negatives", *ARGS, *CONTROL, "--allow-missing")
    assert (code, err) == (0, "")
    assert all(word in " ".join(out.split()) for word in told_so)


def words_shown(told, monkeypatch, columns, *command):
    """Words of the tables' cells and headers that are not on the screen whole."""
    tables, write = [], terminal.write
    monkeypatch.setattr(terminal, "write", lambda some, *rest: (tables.extend(some), write(some, *rest)))
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = told(*command)
    assert code == 0
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= columns
    seen = set(out.split())
    return [word for word in drawn.words(tables) if word not in seen]


@pytest.mark.parametrize("columns", [60, 80, 160])
def test_every_cell_of_negatives_can_be_read(told, monkeypatch, columns):
    more = [
        word for name in ("kivi-4", "gear", "streamingllm") for word in ("--candidate", f"{name}=artifact:s/control")
    ]
    assert words_shown(told, monkeypatch, columns, "negatives", *ARGS, *more, *CONTROL) == []


def test_a_control_that_changed_nothing_is_no_floor(told):
    _, out, _ = told("negatives", *ARGS, "--control", "artifact:s/base")
    assert "No floor measured: the control gave the baseline's very scores" in " ".join(out.split())


def test_where_nothing_is_eligible_there_is_no_excess(told):
    for dataset in ("trec", "lcc"):
        put("base", [0] * N, dataset)
    code, out, _ = told("negatives", *ARGS, *CONTROL, "--json")
    assert (code, json.loads(out)["methods"]["m"]["excess"]) == (0, None)
    assert "nan" not in told("negatives", *ARGS, *CONTROL)[1]


@pytest.mark.parametrize("name", ["kivi[old]", "kivi:eyes:", "a[/b]"])
def test_a_name_is_shown_as_it_was_given(told, name):
    assert told("negatives", *ARGS, "--candidate", f"{name}=artifact:s/m")[1].count(f"\n{name} ") == 3


def test_nothing_heavy_is_imported_for_results():
    code = """
import sys
from kvsuite.cli import main
if "--help" in sys.argv:
    try: main(sys.argv[1:])
    except SystemExit: pass
else: main(sys.argv[1:])
print(sorted({"torch", "transformers", "triton", "pytest"} & set(sys.modules)))
"""
    for words in (["--help"], [*ARGS, "--json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, "negatives", *words], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "[]"
        assert "--candidate NAME=SPEC" in done.stdout or '"eligible": 40' in done.stdout


def test_a_run_has_its_own_baseline_and_control(told, tmp_path):
    """48 needles of the published run; the noise of its control changed logits but no score."""
    smoke = Path(__file__).parents[2] / "reports" / "cpu" / "smoke"
    code, out, _ = told("negatives", smoke)
    rows = [line.split() for line in out.splitlines()]
    assert code == 0
    assert next(r for r in rows if r[:1] == ["kivi:bits=2"])[:4] == ["kivi:bits=2", "20", "0", "0/28"]
    assert [r[1:] for r in rows if r[:2] == ["by", "noise"]] == [["noise", *["0"] * 8]], "by threshold"
    assert ["synthetic", "by", "noise", "0/48"] in [r[:4] for r in rows]
    found = json.loads(told("negatives", smoke, "--json", "--theta", "0.5")[1])
    assert (found["eligible"], found["methods"]["h2o:budget=128"]["negatives"]) == (48, 46)
    assert next(iter(found["by_type"]["synthetic"])) == "eligible"
    assert "by noise" not in found["by_type"]["synthetic"]
    for wrong, said in (
        ((smoke, "--baseline", "artifact:s/base"), "a run folder has its own baseline"),
        ((), "say which scores: a run folder, or --baseline and --candidate"),
        (("s",), "is not a run folder"),
        ((Path(__file__).parents[2] / "reports" / "cpu" / "decode",), "holds no scores of a baseline and methods"),
    ):
        code, _, err = told("negatives", *wrong)
        assert code == 2
        assert said in err
