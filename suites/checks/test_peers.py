"""What `python suites/peers/compare.py` decides by itself; kvpress is not needed."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from kvsuite.methods import parse
from suites.checks.table import KVZAP

PEERS = Path(__file__).parents[1] / "peers"


def script(name):
    return SimpleNamespace(**runpy.run_path(str(PEERS / f"{name}.py")))


@pytest.mark.parametrize("count", [8, 24])
def test_as_many_different_arms_as_asked_and_full_first(count):
    found = script("arms").arms(count, 2000)
    assert [arm["name"] for arm in found[:1]] == ["full"]
    assert len({arm["name"] for arm in found}) == count
    assert all(parse(arm["name"]).tokens(2013) == arm["tokens"] < 2000 for arm in found[1:])


def test_ratios_pair_the_processes_of_one_round_and_the_ceiling_is_that_of_the_formula():
    sides = {"prefill": 3.0, "observing": 1.0, "alone": 1.0, "batched": {"8 arms": 0.5}}
    rounds = [
        {"ours": {"cells": {"8 arms": 10.0}, **sides}, "theirs": {"cells": {"8 arms": 40.0}}},
        {"ours": {"cells": {"8 arms": 10.0}, **sides}, "theirs": {"cells": {"8 arms": 60.0}}},
    ]
    [found] = script("shown").speed(rounds, {"8 arms": [{}] * 8}, 2)
    assert found["ratios"] == [4.0, 6.0]
    assert (found["ratio"], found["target"], found["ceiling"]) == (5.0, 6.0, 4.0)


@pytest.mark.parametrize("broken", [False, True])
def test_one_other_token_of_one_layer_is_told(tmp_path, broken):
    kept, name = torch.tensor([[[0, 1, 8, 9]], [[0, 1, 8, 9]]]), "streaming-llm:budget=4"
    save_file({f"{name} kept": kept.clone()}, str(tmp_path / "ours.safetensors"))
    kept[1, 0, 2] -= int(broken)
    save_file({f"{name} kept": kept.clone()}, str(tmp_path / "theirs.safetensors"))
    side = {"context": [1] * 10, "question": [2], "full": "yes", "share": 2}
    arm = {"name": name, "press": "StreamingLLMPress", "tokens": 4}
    lines = script("shown").parity({"ours": side, "theirs": side}, tmp_path, [arm])
    assert [one["holds"] for one in lines] == [True, True, not broken, None]


@pytest.mark.parametrize(("apart", "holds"), [(1e-7, True), (1e-3, False)])
def test_sums_of_attention_are_compared_after_kvpress_mean_is_undone(tmp_path, apart, holds):
    mass = torch.rand(2, 3, 10) + 0.5
    counts = torch.arange(10, 0, -1)
    save_file({"mass": mass}, str(tmp_path / "ours.safetensors"))
    save_file({"observed": mass * (1 + apart) / counts}, str(tmp_path / "theirs.safetensors"))
    side = {"context": [1] * 10, "question": [2], "full": "yes", "share": 2}
    lines = script("shown").parity({"ours": side, "theirs": side}, tmp_path, [])
    assert [one["holds"] for one in lines] == [True, True, holds, None]


def test_steps_are_compared_with_the_faster_plain_cache_round_by_round(monkeypatch):
    monkeypatch.syspath_prepend(PEERS)

    def cell(length, **seconds):
        arms = {name: {"kv_bytes_per_token": 1, "seconds": times} for name, times in seconds.items()}
        return {"batch": 8, "length": length, "threads": 2, "rows": {"openvino_genai": arms}}

    short = cell(64, f16=[0.03] * 3, bf16=[0.02] * 3, u8=[0.02] * 3)
    long = cell(1024, f16=[0.09] * 3, bf16=[0.04, 0.06, 0.08], u8=[0.02, 0.03, 0.04])
    console = Console(width=120, record=True)
    script("beside").draw(console, long, short)
    rows = {line.split()[3]: line for line in console.export_text().splitlines() if "openvino_genai" in line}
    assert "2.00 [2.00, 2.00]" in rows["u8"], "the whole step: every round's ratio is 2"
    assert "40.0" in rows["bf16"], "of 60 ms 20 are there without a context"
    assert "67% " in rows["bf16"]
    assert "0.67 [0.44, 0.89]" in rows["f16"], "slower than the other plain cache"


def kept(*places):
    found = torch.zeros(1, 1, 6, dtype=torch.bool)
    found[0, 0, list(places)] = True
    return found


@pytest.mark.parametrize(
    ("mine", "holds", "others"),
    [(kept(0, 1, 2), True, 0), (kept(0, 1, 3), True, 1), (kept(0, 1, 4), False, 1), (kept(0, 1), False, 0)],
    ids=["the same", "a tie", "a lower score", "fewer"],
)
def test_other_tokens_may_stay_only_where_scores_are_equal(monkeypatch, mine, holds, others):
    monkeypatch.syspath_prepend(PEERS)
    scores = torch.tensor([[[5.0, 4.0, 3.0, 3.0, 2.9, 1.0]]])
    found = script("parity").compared(mine, kept(0, 1, 2), scores, False)
    assert (found["holds"], found["others"]) == (holds, others)


def test_every_pair_of_parity_is_a_method_with_the_tokens_it_says(monkeypatch):
    monkeypatch.syspath_prepend(PEERS)
    for arm in script("parity").spelled(780, KVZAP, 90):
        if "budget=" in arm["name"]:
            assert parse(arm["name"]).tokens(780) == arm["tokens"]
