"""Decoding with transformers' own attention: over the same caches, right, checked, and told apart from the kernels'."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from kvsuite.analysis.tables.modes import modes
from kvsuite.cache import adapter
from kvsuite.cache.checker import error
from kvsuite.engines.request import Request
from kvsuite.engines.timing import ENDLESS, DecodeCell, PrefillCell, TransformersCell, measured
from kvsuite.engines.transformers import TransformersEngine
from kvsuite.errors import UsageError
from kvsuite.kernels import dense
from kvsuite.kernels.context import AttentionParams, HeadView
from kvsuite.kernels.reference.attention import causal_self_attention
from kvsuite.kernels.reference.mass import column_mass
from kvsuite.methods import parse
from kvsuite.modes import mode_of, phase_of
from kvsuite.records import Run, Timing
from suites.checks.table import METHODS, READING, SCALE, context, loaded, tokens

ROWS = (1, None, 0)
GROUP = 2


def steps(text, mode, dtype=torch.bfloat16, n=12):
    """A cache of two rows of unlike length while it decodes: what it held, what it was asked, what it gave."""
    cache = loaded(parse(text), [context(length, length, dtype) for length in (61, 90)], n, dtype, backend=mode)
    fed = [tokens(n, i, dtype) for i in range(3)]
    for i in range(n):
        q, k, v = (torch.stack([parts[side][:, i : i + 1] for parts in fed]) for side in range(3))
        cache.append(k, v, ROWS)
        held = [cache.read(row) for row in range(2)]
        yield cache, held, q, cache.attend(q, SCALE, ROWS)


@pytest.mark.parametrize("mode", ["eager", "sdpa"])
@pytest.mark.parametrize("text", [text for text in METHODS if text not in READING])
def test_attention_is_that_over_what_is_held(mode, text):
    kept = [[cache.kept(row) for row in range(2)] for cache, *_ in steps(text, "reference")]
    for (cache, held, q, out), tokens_kept in zip(steps(text, mode), kept, strict=True):
        assert mode == cache.backend.NAME
        assert [cache.kept(row) for row in range(2)] == tokens_kept
        assert (out[1] == 0).all()
        for item, row in ((0, 1), (2, 0)):
            for head in range(q.shape[1]):
                assert error(q[item, head], out[item, head], held[row][head // GROUP], SCALE) <= 1


def test_several_queries_and_a_window():
    cache = loaded(parse("kivi:bits=4,group=16,residual=32"), [context(61, 0)], 5, backend="eager")
    q, k, v = tokens(5, 1)
    cache.append(k[None], v[None], (0,))
    out, held = cache.attend(q[None], SCALE, (0,), window=30), cache.read(0)
    for at in range(5):
        for head in range(q.shape[0]):
            own = held[head // GROUP]
            seen = own.positions <= 61 + at
            view = replace(own, **{x: getattr(own, x)[seen] for x in ("k", "v", "positions", "slots")})
            assert error(q[head, at : at + 1], out[0, head, at : at + 1], view, SCALE, window=30) <= 1


def test_the_bound_of_rounded_scores_notices_that_one_key_is_missing():
    q, k, v = tokens(40, 0)
    found = []
    for head in range(len(q)):
        own, places = (k[head // GROUP], v[head // GROUP]), torch.arange(40)
        weights = (SCALE * own[0].double() @ q[head, -1].double())[:-1].softmax(0)
        wrong = (weights @ own[1][:-1].double()).bfloat16()
        found.append(error(q[head, -1:], wrong[None], HeadView(*own, places, places, rounded=True), SCALE))
    assert max(found) > 1


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, eos_token_id=None,
    )  # fmt: skip
    return TransformersEngine(LlamaForCausalLM(config).to(torch.bfloat16), None)


def prompt(engine, ids):
    return engine.prefill(Request("cell", "", "", ENDLESS), ids, [])


@pytest.mark.parametrize("mode", ["eager", "sdpa"])
def test_full_gives_the_logits_of_transformers_own_cache(engine, mode):
    """Bit for bit: the same tokens, the same function, the same numbers."""
    ids = list(range(50))
    cell = DecodeCell(engine, parse("full"), prompt(engine, ids), 2, 4, mode)
    plain = TransformersCell(engine, ids, 2)  # prefilled by sdpa, as ours
    token = cell.worker.sequences[0].response.tokens[0]
    cell.check()
    assert cell.checked <= 1
    engine.model.set_attn_implementation(mode)
    with torch.inference_mode():
        out = adapter.forward(engine.model, plain.cache, torch.full((2, 1), token))
        again = adapter.forward(engine.model, plain.cache, out.argmax(-1)[:, None])
    engine.model.set_attn_implementation(adapter.NAME)
    assert torch.equal(cell.decoder.logits, again)


@pytest.mark.parametrize("mode", ["eager", "sdpa"])
def test_a_prompt_gives_the_logits_of_transformers_own_prefill(engine, mode):
    ids = list(range(70))
    own = engine.prefill(Request("cell", "", "", ENDLESS), ids, [], mode=mode)
    engine.model.set_attn_implementation(mode)
    with torch.inference_mode():
        logits = adapter.forward(engine.model, cache := DynamicCache(), torch.tensor([ids]))
    engine.model.set_attn_implementation(adapter.NAME)
    assert torch.equal(own.logits, logits[0])
    for layer, theirs in zip(own.context, cache.layers, strict=True):
        assert torch.equal(layer.k, theirs.keys[0])
        assert torch.equal(layer.v, theirs.values[0])


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("mode", ["eager", "sdpa"])
def test_a_prompt_attends_alike_in_all_modes(mode, window):
    q, k, v = tokens(40, 2, torch.float32)
    out, weights = dense.self_attention(mode, q, k, v, AttentionParams(SCALE, window))
    torch.testing.assert_close(out, causal_self_attention(q, k, v, SCALE, window))
    assert (weights is None) == (mode == "sdpa")
    if weights is not None:
        mass = weights.sum(1).view(len(k), GROUP, -1).mean(1)
        torch.testing.assert_close(mass, column_mass(q, k, SCALE, window))
    with pytest.raises(ValueError, match="soft caps"):
        dense.self_attention(mode, q, k, v, AttentionParams(SCALE, softcap=1.0))


def test_a_prefill_takes_the_weights_that_eager_attention_computes(engine, monkeypatch):
    method, ids = parse("h2o:budget=20"), list(range(70))
    asked = [
        engine.prefill(Request("cell", "", "", ENDLESS), ids, [], method.observes, mode) for mode in ("paged", "sdpa")
    ]
    monkeypatch.setattr("kvsuite.cache.prefill.for_prefill", None)  # nobody else is asked
    asked.append(engine.prefill(Request("cell", "", "", ENDLESS), ids, [], method.observes, "eager"))
    [what] = method.observes
    for plain, other, eager in zip(*(prompt.context for prompt in asked), strict=True):
        assert torch.equal(plain[what], other[what])
        torch.testing.assert_close(plain[what], eager[what], rtol=0.05, atol=0.05)  # weights are rounded to bfloat16
        assert eager[what].sum() == pytest.approx(2 * 70, rel=0.01)


@pytest.mark.parametrize("mode", ["paged", "eager", "sdpa"])
def test_a_timed_prefill_is_of_its_mode(engine, mode):
    cell, peak = measured(lambda: PrefillCell(engine, parse("int8"), list(range(70)), mode), torch.device("cpu"))
    assert (cell.inner.worker.backend == mode) == (mode != "paged")
    assert cell.checked <= 1
    assert cell.round() > 0
    assert peak is None or peak >= 0


def test_what_a_mode_cannot_do_is_refused(engine):
    with pytest.raises(UsageError, match="transformers' attention reads all tokens"):
        DecodeCell(engine, parse("top-pages:top=2"), prompt(engine, list(range(50))), 1, 4, "eager")
    cache, (q, k, v) = loaded(parse("full"), [context(8, 0)], 1, backend="sdpa"), tokens(1, 1)
    cache.append(k[None], v[None])
    with pytest.raises(ValueError, match="soft caps"):
        cache.attend(q[None], SCALE, softcap=1.0)


def flash(q, k, v, cache_seqlens, softmax_scale, causal):
    """What flash-attn's function of this name gives: q (n, Q, heads, D), k, v (n, T, 1, D)."""
    out = torch.empty_like(q)
    for i, length in enumerate(cache_seqlens.tolist()):
        for at in range(q.shape[1]):
            seen = length - (q.shape[1] - 1 - at if causal else 0)
            scores = softmax_scale * q[i, at].float() @ k[i, :seen, 0].float().T
            out[i, at] = (scores.softmax(-1) @ v[i, :seen, 0].float()).to(q.dtype)
    return out


def test_flash_attention_is_given_each_head_of_each_row(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_with_kvcache=flash))
    for text in ("int8", "h2o:budget=16", "snapkv:budget=24,window=8 + ada + kivi:bits=4,group=16,residual=32"):
        for _, held, q, out in steps(text, "flash-attn", n=3):
            for item, row in ((0, 1), (2, 0)):
                for head in range(q.shape[1]):
                    assert error(q[item, head], out[item, head], held[row][head // GROUP], SCALE) <= 1
    with pytest.raises(ValueError, match="takes no mask"):
        list(steps("h2o:budget=40 + kivi:bits=2,group=8,residual=16", "flash-attn"))


FACTS = {
    "methods": ["full", "good", "bad"], "model": {"name": "m"}, "settings": {},
    "environment": {"gpu": None, "threads": 1, "compute_dtype": "bfloat16", "kv_dtype": "bfloat16"},
}  # fmt: skip


def timings(method, phase, ratio, seed):
    noise = np.random.default_rng(seed).normal(0, 0.01, (2, 10))
    seconds = {"seconds": (np.exp(noise[0]) / ratio).tolist(), "baseline_seconds": np.exp(noise[1]).tolist()}
    return Timing(method, phase=phase, width=8, length=512, tokens=8, checked=0.5, cache="kvsuite.cache.x", **seconds)


def test_a_speed_up_is_compared_between_modes(tmp_path):
    ratios = {"full": (1, 1), "good": (1.2, 1.2), "bad": (2.0, 1.1)}
    records = [
        timings(method, phase, ratio, seed)
        for seed, (method, both) in enumerate(ratios.items())
        for phase, ratio in zip(("eager", "decode"), both, strict=True)
    ]
    records += [timings("transformers", phase, ratio, 9) for phase, ratio in (("eager", 3.0), ("decode", 1.0))]
    records.append(replace(records[5], phase="sdpa", status="failed", error="ValueError: no"))
    [table] = modes(Run(tmp_path, FACTS, records))
    assert [column.key for column in table.columns] == ["eager", "sdpa", "paged", "eager over", "sdpa over"]
    bad, good = (table.cell((name, "8 · 512"), "eager over") for name in ("bad", "good"))
    assert bad.value == pytest.approx(2.0 / 1.1, rel=0.02)
    assert 1.7 < bad.low < bad.value < bad.high < 1.95
    assert good.low < 1 < good.high
    assert table.cell(("bad", "8 · 512"), "sdpa").state == "failed"
    assert table.cell(("full", "8 · 512"), "eager").value == pytest.approx(8, rel=0.02)
    said = " ".join(note.text for note in table.notes)
    assert "eager promises more than paged keeps in 1 of 2 cells" in said
    assert "FAILED sdpa bad b8 l512: ValueError: no" in said
    assert modes(Run(tmp_path, FACTS, [r for r in records if r.phase == "decode"])) == []


def test_prefills_have_a_table_of_their_own(tmp_path):
    records = [
        timings(method, phase_of(what, mode), ratio, seed)
        for seed, (method, what, mode, ratio) in enumerate(
            (method, what, mode, ratio)
            for what, ratios in (("prefill", (0.5, 0.9)), ("decode", (1.2, 1.2)))
            for mode, ratio in zip(("eager", "paged"), ratios, strict=True)
            for method, ratio in (("full", 1.0), ("good", ratio))
        )
    ]
    assert {r.phase for r in records} == {"eager prefill", "prefill", "eager", "decode"}
    assert [mode_of(r.phase) for r in records[::2]] == [
        ("prefill", "eager"), ("prefill", "paged"), ("decode", "eager"), ("decode", "paged")
    ]  # fmt: skip
    decode, prefill = modes(Run(tmp_path, FACTS, records))
    assert prefill.title.startswith("prefill by mode")
    assert decode.cell(("good", "8 · 512"), "eager over").value == pytest.approx(1, rel=0.03)
    assert prefill.cell(("good", "8 · 512"), "eager over").value == pytest.approx(0.5 / 0.9, rel=0.03)
