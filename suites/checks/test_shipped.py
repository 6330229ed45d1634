"""``kvsuite plan`` without a run: its figures are those of the published runs, and hold."""

import math
import subprocess
import sys

import pytest
from scipy import stats as oracle

from kvsuite.analysis.shipped import shipped
from kvsuite.analysis.stats import LEVEL
from kvsuite.analysis.tables.presets import Preset, harm, presets, seconds
from kvsuite.cli import main
from kvsuite.margins import Margins
from kvsuite.plugin.options import check
from kvsuite.presets import PRESETS
from suites.checks.shipped import measured


def asked(margins=""):
    return [Preset.of(name, raw, margins) for name, raw in PRESETS.items()]


def test_what_is_shipped_is_what_the_published_runs_show():
    assert shipped() == measured(), "python -m suites.checks.shipped"


def test_smoke_takes_about_as_long_as_the_published_run():
    known, (smoke, standard, paper) = shipped(), asked()
    assert seconds(smoke, known) == pytest.approx(known.took, rel=0.3)
    assert seconds(smoke, known) < seconds(standard, known) < seconds(paper, known)


@pytest.mark.parametrize("endpoint", ["kl", "perplexity", "speed"])
def test_what_it_needs_is_enough_by_the_noncentral_t(endpoint):
    spread, level = shipped().spreads[endpoint], LEVEL / 7
    n = math.ceil(spread.effect(endpoint, 16, Margins(), (level, level)).needed)
    width = math.log1p(Margins().perplexity) if spread.ratio else Margins().kl
    width = -math.log1p(-Margins().speed) if endpoint == "speed" else width

    def power(samples):
        away = width / (spread.spread / math.sqrt(samples))
        return oracle.nct.sf(oracle.t.isf(level, samples - 1), samples - 1, away)

    assert power(n) > 0.75
    assert power(max(n // 2, 2)) < 0.8


def test_harm_that_it_promises_to_find_is_found():
    """KL whose spread grows with it: 4 runs of 5 are beyond the margin by t."""
    spread, levels = shipped().spreads["kl"], (LEVEL / 56, LEVEL / 7)
    e = spread.effect("kl", 16, Margins(), levels)
    kl = harm(e, spread)
    away = (kl - Margins().kl) / (spread.relative * kl / 4)
    assert oracle.nct.sf(oracle.t.isf(levels[0], 15), 15, away) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("preset", asked(), ids=list(PRESETS))
def test_what_decides_has_the_samples_to_clear(preset):
    """An endpoint with too few, or of which nothing is known, would make every method *cannot tell*."""
    effects = preset.effects(shipped())
    deciding = [name for name in Margins.names() if name not in preset.margins.veto]
    assert {"kl", "perplexity", "speed"} <= set(deciding) <= effects.keys()
    assert {name: math.ceil(effects[name].needed) for name in deciding if effects[name].needed > effects[name].n} == {}


def test_a_preset_takes_no_longer_than_it_says():
    smoke, standard, paper = (seconds(preset, shipped()) for preset in asked())
    assert smoke <= 6 * 60
    assert standard <= 60 * 60
    assert paper <= 8 * 3600, "overnight"


def test_the_command(capsys, monkeypatch):
    for columns in (60, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["plan"]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert ["smoke 7 16 - 48 8 " in out, "standard" in out, "paper" in out] == [True] * 3
        assert "smoke quality 48 10.0 % " in out
        assert "convicts only" in out
    assert main(["plan", "--margins", "quality=0.2"]) == 0
    assert "smoke quality 48 20.0 % " in " ".join(capsys.readouterr().out.split())
    assert main(["plan", "--margins", "quality=2"]) == 2


def test_it_needs_no_torch():
    code = "import sys; from kvsuite.cli import main; main(['plan']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_what_can_only_convict_is_asked_where_it_must_clear():
    for margins, said in (("", "convicts only"), ("veto=", "no"), ("veto=,quality=0.9", "yes")):
        _, table = presets(asked(margins)[:1], shipped())
        assert table.cell(("smoke", "kl"), "clears").value == "yes"
        assert table.cell(("smoke", "quality"), "clears").value == said


def test_a_preset_is_read_as_pytest_reads_it():
    for mine, name in zip(asked(), PRESETS, strict=True):
        theirs = check({"preset": name})
        assert {task: theirs.samples.get(task, theirs.samples[""]) for task in theirs.tasks} == mine.samples
        assert (list(theirs.batch), list(theirs.length), theirs.cap) == (mine.batch, mine.length, mine.cap)
        assert (theirs.margins, theirs.rounds, len(theirs.methods)) == (mine.margins, mine.rounds, mine.arms)
