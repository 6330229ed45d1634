"""``kvsuite why``: what caches had lost of the samples that methods broke."""

import base64
import gzip
import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from kvsuite import environment, models, tasks
from kvsuite.analysis import causes
from kvsuite.analysis.report import analyse
from kvsuite.analysis.tables import causes as table
from kvsuite.cli import main
from kvsuite.engines.losses import POSITIONS, ForcedAnswer, losses
from kvsuite.engines.request import Request
from kvsuite.errors import UsageError
from kvsuite.methods import parse, parse_all
from kvsuite.records import Answer, Job, Loss, Run, RunFolder, read
from kvsuite.report.html.samples import payload
from kvsuite.runs import again
from kvsuite.runs.here import Here
from kvsuite.runs.setting import Setting
from kvsuite.runs.why import sentence
from kvsuite.tasks import Sample
from suites.checks.test_engine import engine_of

LENGTH = 60


@pytest.fixture(scope="module")
def engine(tiny_llama):
    return engine_of(tiny_llama)


def asked(answer=12, suffix=0, span=()):
    draw = np.random.default_rng(3)
    parts = [draw.integers(1, 128, n).tolist() for n in (LENGTH, suffix, answer)]
    return ForcedAnswer(Request("a", "", "", answer), *parts, list(span))


def eager(engine, ids):
    """Attention of transformers' own implementation: (layers, heads, T, T)."""
    engine.model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return torch.stack([x[0] for x in engine.model(torch.tensor([ids]), output_attentions=True).attentions])
    finally:
        engine.model.set_attn_implementation("kvsuite")


@pytest.mark.parametrize("suffix", [0, 5])
def test_attention_lost_is_that_of_transformers_to_the_tokens_that_are_gone(engine, suffix):
    one, streaming = asked(12, suffix), parse("streaming-llm:budget=24")
    found = losses(engine, one, {streaming: 7})[streaming]
    ids = one.context + one.suffix + one.answer
    weights, prompt = eager(engine, ids), LENGTH + suffix
    lost = []
    for place in range(not suffix, 12):
        newest = prompt + place - 1
        gone = [p for p in range(newest + 1) if 4 <= p < newest - 20]
        lost.append(float(weights[:, :, newest, gone].sum(-1).mean()))
    assert found["positions"] == len(lost)
    assert found["attention"] == pytest.approx(np.mean(lost), rel=1e-4)
    assert found["parting"] == pytest.approx(lost[7 - (not suffix)], rel=1e-4)
    assert 0.1 < found["attention"] < 0.9


def test_a_long_answer_is_looked_at_here_and_there(engine):
    one, method = asked(90), parse("streaming-llm:budget=24")
    found = losses(engine, one, {method: 89})[method]
    assert found["positions"] == POSITIONS
    assert found["parting"] > 0


@pytest.mark.parametrize(("span", "kept"), [(range(30, 36), 0), (range(55, 60), 1), (range(38, 42), 0.5), ((), None)])
def test_what_is_kept_of_the_span(engine, span, kept):
    method = parse("streaming-llm:budget=24")
    found = losses(engine, asked(2, span=span), {method: None})[method]
    assert found["kept"] == pytest.approx(24 / LENGTH)
    assert found.get("span_kept") == kept
    assert found.get("span_gone") == (None if kept is None else float(kept == 0))
    assert found["parting"] is None


def test_errors_are_those_of_what_attention_reads(engine):
    names = ("full", "int8", "kivi:bits=4,residual=32", "kivi:bits=2,residual=32", "h2o:budget=24+int8")
    one, methods = asked(3, span=range(5, 12)), [parse(name) for name in names]
    full, int8, four, two, both = losses(engine, one, dict.fromkeys(methods, 1)).values()
    assert full["k_error"] == full["v_error"] == full["attention"] == full["parting"] == 0
    for key in ("k_error", "v_error", "span_k_error", "span_v_error"):
        assert 0 < int8[key] < four[key] < two[key] < 1, key
    assert both["attention"] > 0
    context = engine.prefill(one.request, one.context, []).context
    cache = [methods[3].cache(layer, 1, LENGTH) for layer in engine.layers]
    methods[3].compress(0, context, cache)
    pairs = [(h.k, seen.k[i]) for c, seen in zip(cache, context, strict=True) for i, h in enumerate(c.read(0))]
    wrong, right = (
        sum(float((x[5:12] ** 2).sum()) for x in side) for side in zip(*[(a - b, b) for a, b in pairs], strict=True)
    )
    assert two["span_k_error"] == pytest.approx((wrong / right) ** 0.5, rel=1e-4)


def test_a_method_that_fails_costs_its_own_figures(engine, monkeypatch):
    good, bad = parse("streaming-llm:budget=24"), parse("h2o:budget=24")
    monkeypatch.setattr(type(bad.selector), "score", lambda *_: 1 / 0)
    found = losses(engine, asked(3), {good: None, bad: None})
    assert found[bad] == {"error": "ZeroDivisionError: division by zero"}
    assert found[good]["attention"] > 0


@pytest.mark.parametrize(
    ("context", "reference", "wanted"),
    [
        ("One. The number of Rome is 123. Two; three.", "123", "The number of Rome is 123."),
        ("The number is 123. And again 123.", "123", ""),
        ("The number is 1234.", "123", ""),
        ("No end 123", "123", "No end 123"),
        ("A line\nwith 123 in it\nand more", "123", "with 123 in it"),
        ("Nothing.", "", ""),
    ],
)
def test_the_sentence_of_the_reference(context, reference, wanted):
    assert sentence(Sample("", context, "", reference, 1)) == wanted


# the two groups


def planted(tmp_path, kept, method="h2o:budget=8", **figures):
    """A run with a loss for every entry of ``kept``; those below 0.5 are broken."""
    records = []
    for i, share in enumerate(kept):
        common = {"task": "needle", "sample": str(i), "cluster": f"text {i}"}
        records.append(Answer("full", **common, score=1.0, tokens=[1, 2, 3]))
        records.append(Answer(method, **common, score=float(share >= 0.5), tokens=[1, 2, 4]))
        own = {"kept": 0.2, "span": "s", "span_tokens": 4, "span_kept": share, "span_gone": 1 - share, **figures}
        records.append(Loss(method, task="needle", sample=str(i), **own))
    records.append(Answer("full", task="needle", sample="worse", score=0.0, tokens=[1]))
    records.append(Answer(method, task="needle", sample="worse", score=0.0, tokens=[1]))
    facts = {"methods": ["full", method], "baseline": "full", "settings": {}, "environment": {}, "model": {"name": "m"}}
    return Run(tmp_path, facts, records)


def test_what_goes_with_the_damage_is_told_and_what_does_not_is_not(tmp_path):
    run = planted(tmp_path, [0.0, 0.1, 0.2, 0.1, 0.0, 0.9, 1.0, 0.8], k_error=0.1, v_error=0.1)
    [cause] = causes.causes(run)
    assert (cause.broken, cause.intact) == (5, 3)
    by = {c.key: c for c in cause.contrasts}
    kept = by["span_kept"]
    assert kept is cause.main
    assert (kept.broken.mean, kept.intact.mean) == pytest.approx((0.08, 0.9))
    welch = stats.ttest_ind([0.0, 0.1, 0.2, 0.1, 0.0], [0.9, 1.0, 0.8], equal_var=False).confidence_interval()
    assert (kept.difference.low, kept.difference.high) == pytest.approx((welch.low, welch.high))
    assert kept.p == pytest.approx(1 / 56, abs=0.006), "one of the 56 ways to choose 3 of 8"
    assert by["k_error"].p == 1
    assert by["k_error"].difference is None
    [drawn] = table.causes(run)
    assert drawn.notes[0].text.startswith("h2o:budget=8 broke 5 of 8: tokens of the reference's sentence kept 8 % ("), (
        "the sample that the baseline fails is not counted"
    )
    assert "chance" not in drawn.notes[0].text
    assert drawn.cell(("h2o:budget=8", "span_kept"), "difference").value == pytest.approx(-82)


def test_few_may_be_chance_and_none_broken_is_said(tmp_path):
    [one] = table.causes(planted(tmp_path, [0.1, 0.9]))
    assert "which may be chance (p = 1)" in one.notes[0].text
    [none] = table.causes(planted(tmp_path, [0.9, 0.9]))
    assert none.notes[0].text == "h2o:budget=8 broke 0 of 2."
    [only] = table.causes(planted(tmp_path, [0.1, 0.2]))
    assert only.notes[0].text.endswith("; none is left unbroken to compare with.")


def test_shuffled_groups_show_nothing():
    draw = np.random.default_rng(0)
    p = [causes._permuted(draw.random(6), draw.random(9)) for _ in range(40)]
    assert sum(x < 0.05 for x in p) <= 6
    assert abs(np.mean(p) - 0.5) < 0.2


# from a run's folder


@pytest.fixture
def left(world, tmp_path, monkeypatch):
    """A run of the tiny model, as if it had been right: ``full`` always, h2o on one sample of three."""
    monkeypatch.setenv("KVSUITE_CACHE", str(world / "cache"))
    monkeypatch.chdir(tmp_path)
    methods, task, folder = parse_all(["full,jitter,int8,h2o:budget=64"]), tasks.task("needle"), RunFolder(Path("left"))
    shared = {"compress": "prompt", "cap": 6, "temperature": 1.0, "seed": 0, "device": "cpu", "backend": "auto"}
    how = {key: shared[key] for key in ("device", "backend", "compress", "cap", "temperature", "seed")}
    here = Here(
        Setting(
            world / "model", tuple(methods), "float32", width=2, repeats=1, timeout=math.inf, memory=math.inf, **how
        )
    )
    samples = task.samples(3, [256], 0, lambda text: len(here.tokenizer(text, add_special_tokens=False)["input_ids"]))
    folder.describe(
        {
            "methods": [m.name for m in methods],
            "baseline": "full",
            "model": {"name": "model", "fingerprint": models.fingerprint(world / "model")},
            "texts": {"needle": environment.fingerprint(task.fetch())},
            "settings": {**shared, "tasks": ["needle"], "samples": {"": 3}, "length": [256]},
            "environment": {"compute_dtype": "float32", "kv_dtype": "float32", "gpu": None, "threads": 1},
        }
    )
    jobs = [Job("samples", m.name, "needle", s.id) for m in methods for s in samples]
    for answer in here.answers(task, samples, jobs, {}):
        right = answer.method != "h2o:budget=64" or answer.sample.endswith("1")
        folder.append(replace(answer, score=float(right)))


def test_a_run_is_looked_into_once(left, world, capsys):
    command = ["why", "left", "--model", str(world / "model")]
    assert main([*command, "--method", "h2o:budget=64", "--sample", "needle-l256-d12-1"]) == 0
    assert main(command) == 0
    said = capsys.readouterr()
    assert "h2o:budget=64 broke 2 of 3: tokens of the reference's sentence kept" in " ".join(said.out.split())
    assert said.err.splitlines()[0] == "1 of 1: h2o:budget=64, needle-l256-d12-1"
    assert "5 of 5: " in said.err
    found = [r for r in read(Path("left")).records if isinstance(r, Loss)]
    assert sorted((r.method, r.status) for r in found) == [("h2o:budget=64", "ok")] * 3 + [("int8", "ok")] * 3
    assert all(r.span.startswith("The secret number of ") and r.span_tokens > 30 for r in found)
    assert all(0 <= r.span_kept < 1 and r.attention > 0 for r in found if r.method != "int8")
    assert all(r.span_kept == 1 and r.k_error > 0 and r.attention == 0 for r in found if r.method == "int8")
    assert main(command) == 0
    assert capsys.readouterr().err == "", "nothing is looked at twice"
    packed = json.loads(gzip.decompress(base64.b64decode(payload(analyse(read(Path("left")))))))
    losses = [pair["answer"].get("loss") for s in packed["samples"] for pair in s["pairs"] if pair["arm"] == "int8"]
    assert next(sorted(loss) for loss in losses if loss)[:2] == ["attention", "k_error"]
    for wrong, sentence_said in (
        (["why", "left"], "say where it is, --model"),
        ([*command, "--method", "h2o:budget=65"], "unknown method with scores in left 'h2o:budget=65'"),
        ([*command, "--sample", "x"], "unknown sample in left that the baseline answers well 'x'"),
    ):
        assert main(wrong) == 2
        assert sentence_said in capsys.readouterr().err
    weights = world / "model" / "generation_config.json"
    was = weights.read_text()
    try:
        weights.write_text(was + " ")
        assert main(command) == 2
        assert "is not the model that answered left" in capsys.readouterr().err
    finally:
        weights.write_text(was)


def test_prompts_are_told_as_they_were_asked(left, world):
    run = read(Path("left"))
    asked = {("needle", a.sample): a.prompt_hash for a in run.records}
    found, why = again.texts(run, world / "model", [*asked][:2])
    assert why == ""
    assert list(found) == [*asked][:2]
    for key, told in found.items():
        said = [[m["role"], m["content"]] for m in told["messages"]]
        assert hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16] == asked[key]
        assert told["reference"].isdecimal()
        assert told["max_new_tokens"] == 24
    moved = replace(run, records=[replace(a, prompt_hash="0") for a in run.records])
    with pytest.raises(UsageError, match="is not the one that left holds"):
        again.texts(moved, world / "model", [*asked])
