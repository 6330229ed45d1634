"""``kvsuite paper`` and docs/paper.md: every figure and table of the paper, beside its artifact's data and ours."""

import json
import re
from pathlib import Path

import pytest

from kvsuite.analysis.tables import paper
from kvsuite.cli import main
from kvsuite.records import read
from suites.checks.test_paper import BASE, COUNTS, DATA, PREFIXES, TYPES, published

ROOT = Path(__file__).parents[2]
RUNS = [ROOT / "reports" / "cpu" / name for name in ("standard", "grid", "tools")]
OURS = [word for folder in RUNS for word in ("--run", str(folder))]
LABELS = {"kivi": "KIVI-4", "gear": "GEAR-4", "h2o": "H2O", "stream": "StreamingLLM"}


def test_every_figure_and_table_is_there_once_and_says_how_or_why():
    known = paper._known()["figures"]
    wanted = [f"Figure {n}" for n in range(1, 19)] + [f"Table {n}" for n in range(1, 12)]
    assert [figure["name"] for figure in known] == wanted
    assert all(("why" in figure) != ("ours" in figure) for figure in known)
    assert all("differs" in figure for figure in known if "ours" in figure)
    assert len({figure["key"] for figure in known}) == len(known)


@pytest.fixture(scope="module")
def found():
    return {table.key: table for table in paper.figures([], list(map(read, RUNS)), None)}


def test_ours_is_what_the_run_shows(found):
    assert found["fig6"].cell("kivi:bits=2, θ = 10%", "ours").value == "68 of 139 (3 by noise)"
    assert found["fig6"].cell("KIVI-4, θ = 10%", "paper").value == "488 (plotted)"
    assert found["fig7"].cell("synthetic: h2o:budget=0.5", "ours").value == "57 of 71 (2 by noise)"
    assert found["table9"].cell("full, other seed", "ours").value == "17.5 / 35.0 (80 prompts)"
    assert found["fig5"].cell("streaming-llm:budget=0.5: slower", "ours").value == "56 of 80"
    assert found["fig5"].cell("int8: mean, × full", "ours").value == "1.02 (0.88–1.18)"
    assert found["table9"].cell("KIVI", "paper").value == "2.8 / 44.9"
    assert "full" not in [row.key[0] for row in found["table9"].rows]


def test_the_page_is_what_the_command_prints(capsys):
    """But for the artifact's figures, whose data not everybody has (the next check)."""
    assert main(["paper", "--markdown", *OURS]) == 0
    fresh, page = capsys.readouterr().out, (ROOT / "docs" / "paper.md").read_text()

    def without(text):
        lines = [re.sub(r"^(\|[^|]*\|[^|]*\|)[^|]*\|([^|]*\|)$", r"\1\2", line) for line in text.splitlines()]
        return [line for line in lines if not re.match(r"\| [^|]*(KIVI-4|GEAR-4|H2O|Str)[^|]*\| - \| - \|$", line)]

    assert without(page) == without(fresh)


@published
def test_the_artifacts_figures_in_the_page_are_what_its_data_give(capsys):
    assert main(["paper", "--markdown", *OURS, "--artifact", str(DATA)]) == 0
    assert capsys.readouterr().out == (ROOT / "docs" / "paper.md").read_text()
    artifact = paper.Artifact(DATA)
    assert (artifact.known["baseline"], list(artifact.known["methods"].values())) == (BASE, list(PREFIXES.values()))
    thetas, types = artifact.figure("thetas"), artifact.figure("types")
    for name, counts in COUNTS.items():
        label = "&".join(LABELS[part] for part in name.split("&"))
        assert thetas[f"{label}, θ = 10%"] == f"{counts[4]} of 1552"
    for kind, (eligible, kivi, gear, _, h2o, stream, _) in TYPES.items():
        for label, n in zip(LABELS.values(), (kivi, gear, h2o, stream), strict=True):
            assert types[f"{kind}: {label}"] == f"{n} of {eligible}"


def test_what_is_not_there_is_one_sentence(capsys, tmp_path):
    for wrong, said in (
        (["fig19"], "unknown figure or table of the paper 'fig19'"),
        (["fig6", "--artifact", str(tmp_path)], "holds no scores of the artifact"),
        (["fig6", "--run", str(tmp_path)], "is not a run folder"),
    ):
        assert main(["paper", *wrong]) == 2
        assert said in capsys.readouterr().err
    assert main(["paper", "table3"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "H2O, × FP16 1.34 / .69 / .85" in out
    assert "Not yet: it needs several GPUs" in out
    assert json.loads((ROOT / "kvsuite/analysis/paper.json").read_text())["source"].endswith("2503.24000")
