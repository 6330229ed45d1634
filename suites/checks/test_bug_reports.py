"""Faults that others reported and no other check covers; docs/bug-reports.md says where the rest are tested."""

import gc
import re
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from kvsuite.analysis.garbled import check
from kvsuite.analysis.texts import stuttered
from kvsuite.cache import adapter
from kvsuite.cache.adapter import KVCache
from kvsuite.cache.observations import AttentionMass
from kvsuite.cache.prefill import PrefillCache
from kvsuite.engines.request import Request
from kvsuite.methods import parse
from suites.checks import naive
from suites.checks.table import SCALE, context, loaded, plain, tokens
from suites.checks.test_engine import engine_of
from suites.checks.test_garbled import CAP, CHINESE, GERMAN, RUSSIAN, World, arm, checked, sign
from suites.checks.test_models import build, given

ROOT = Path(__file__).parents[2]
SHARES = [
    *("h2o", "h2o:budget=0.01", "h2o:heavy=0.01,recent=0.02", "random:budget=0.01"),
    *("streaming-llm:budget=0.01", "h2o:budget=0.01 + kivi:bits=4,group=16,residual=32"),
]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("text", SHARES)
def test_a_share_of_a_short_context_is_never_nothing(text, length):
    """NVIDIA/kvpress#264: a share of 1 or 2 tokens was rounded down to none; what was left answered with NaN."""
    cache = loaded(parse(text), [context(length, 0)], 4)
    assert all(len(held.positions) >= 1 for held in cache.read())
    q, k, v = tokens(4, 1)
    for i in range(4):
        cache.append(k[None, :, i : i + 1], v[None, :, i : i + 1])
        assert cache.attend(q[None, :, i : i + 1], SCALE).isfinite().all()
        assert all(len(held.positions) >= 1 for held in cache.read())


def test_one_scale_per_token_is_ruined_by_a_channel_far_from_zero():
    """huggingface/transformers#35185: of 98 right answers of Qwen2.5-7B a 4-bit cache left none, of Mistral's 84 all.
    What tells such models apart are channels of K far from zero: they take all steps of a scale that a token's channels
    share. With a scale per channel the same bits lose little. The suite has to tell the two apart."""
    q, k, v = tokens(256, 0, torch.float32)
    k[..., 5] += 150
    lost = {}
    for text in ("int8", "int4", "kivi:bits=4"):
        errors = []
        for g, held in enumerate(loaded(parse(text), [plain(k, v)], 0, torch.float32).read()):
            for head in range(2 * g, 2 * g + 2):
                p, other = (naive.weights(q[head], keys - keys.mean(0), SCALE) for keys in (k[g], held.k))
                errors.append((p - other).abs().sum(-1).mean() / 2)
        lost[text] = float(sum(errors) / len(errors))
    assert lost["int4"] > 0.3, "most attention goes to other tokens"
    assert lost["kivi:bits=4"] < 0.1
    assert lost["kivi:bits=4"] < lost["int8"], "no 8 bits make up for it"


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GptOss"])
def test_memory_is_that_of_kv_heads(name):
    """FasterDecoding/SnapKV#16: keys and values were repeated for every query head before they were stored."""
    for kv_heads in (1, 2, 4):
        model = build(name, num_key_value_heads=kv_heads)
        adapter.install(model)
        caches = [parse("full").cache(layer, 1, 64) for layer in adapter.contexts(model)]
        for cache in caches:
            cache.load(0, plain(*(torch.zeros(kv_heads, 64, 32) for _ in "kv")))
            assert cache.nbytes == kv_heads * (2 * 64 * 32 * 4 + 4 * 2 + 16), (
                "float32, the table of two pages, and 4 lengths"
            )


@torch.inference_mode()
def test_prompts_of_any_length_are_stored_as_they_are():
    """raullenchai/Rapid-MLX#1107: keys were corrupt where a prompt's length was no multiple of 32. One arm prefilled in
    one go, the other in chunks, so it looked like a fault of eviction."""
    model = build("Llama")
    ids = torch.randint(1, 96, (1, 130), generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    theirs = []
    for dtype in (torch.float32, torch.float64):
        theirs.append(DynamicCache())
        model.to(dtype)(input_ids=ids, use_cache=True, **given(model, theirs[-1]))
    rounded, exact = (torch.stack([torch.stack([x.keys[0], x.values[0]]) for x in cache.layers]) for cache in theirs)
    most = 4 * (rounded - exact).abs().amax((1, 2, 3, 4)) + 1e-6  # as far as eager itself is off, by layer
    adapter.install(model.float())
    layers = adapter.contexts(model)
    for length in (1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130):
        prefilled = PrefillCache(layers)
        model(input_ids=ids[:, :length], use_cache=True, **given(model, prefilled))
        caches = [parse("full").cache(layer, 1, 160) for layer in layers]
        parse("full").compress(0, prefilled.prefilled, caches)
        for at, cache in enumerate(caches):
            for head, held in enumerate(cache.read()):
                found = torch.stack([held.k, held.v])
                assert (found - exact[at, :, head, :length]).abs().max() <= most[at]


def test_a_compressed_context_has_not_seen_the_question(tiny_llama):
    """AnswerDotAI/cold-compress#42: what reads the question before it chooses keeps the tokens of this answer and loses
    those of the next; it speeds up one answer and compresses no document."""
    engine, seen, method = engine_of(tiny_llama), {}, parse("h2o:budget=24")
    document, questions = "".join(chr(40 + i * 37 % 80) for i in range(90)), ("What is it?", "zzzzzzzz ??")
    for compress in ("context", "prompt"):
        for question in questions:
            request = Request("r", document, question, 5)
            prompt = engine.prefill(request, *engine.encode(request, compress), method.observes)
            assert prompt.context[0].k.shape[1] == len(document) + (len(question) if compress == "prompt" else 0)
            seen[compress, question] = torch.stack(
                [layer[AttentionMass()][:, : len(document)] for layer in prompt.context]
            )
    assert torch.equal(*(seen["context", question] for question in questions))
    assert not torch.equal(*(seen["prompt", question] for question in questions))


@torch.inference_mode()
def test_beams_are_no_sequences_of_ours():
    """huggingface/transformers#48700: a quantized cache left its quantized part unordered when beams changed places.
    Ours knows no beams, and says so rather than to answer from another beam's keys."""
    model = build("Llama")
    ids = torch.randint(1, 96, (1, 20))
    adapter.install(model)
    caches = [parse("kivi:bits=4,group=16,residual=16").cache(layer, 2, 64) for layer in adapter.contexts(model)]
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with pytest.raises((AttributeError, NotImplementedError, ValueError)):
        model.generate(ids, num_beams=2, eos_token_id=None, **given(model, KVCache(caches, (0, 1))), **asked)


def words_twice(world, at):
    return [word for own in world.base[at] for word in (own, own)][:CAP]


def tokens_twice(world, at):
    text = " ".join(world.base[at])
    return "".join(2 * text[i : i + 5] for i in range(0, len(text), 5))[: 6 * CAP].split()


@pytest.fixture
def quick(monkeypatch):
    """As in test_garbled.py."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("twice", [words_twice, tokens_twice])
def test_every_token_twice_is_broken(quick, twice, sampled):
    """intel/llm-scaler#721: with fp8 keys every second token was the one before it once more. Half of the tokens said
    nothing, so what counts tokens called it faster."""
    world = World(f"twice {sampled}", 16, warm=sampled)
    found = checked(world.base, [twice(world, at) for at in range(16)], world.control)
    assert found.broken
    assert sign(found, "repetition").failed
    assert sign(found, "repetition").count == 16


def test_letters_and_words_twice_are_sane(quick):
    """Prose, code and tables have some."""
    world = World("sane", 32)
    sane = [" ".join(words) for words in world.base]
    sane += [" ".join(writer.write(world.rng, 150)) for writer in (GERMAN, RUSSIAN)]
    sane.append("".join(CHINESE.write(world.rng, 150)))
    sane.append("| n | n² |\n|---|---|\n" + "".join(f"| {i} | {i * i} |\n" for i in range(30)))
    assert max(map(stuttered, sane)) < 0.6
    assert stuttered("no no no no no") == 0, "too short to tell"


def test_a_model_that_stutters_by_itself_is_not_broken_by_a_method(quick):
    """The other side of intel/llm-scaler#721: what the uncompressed model does as well is no sign of the method."""
    world = World("stutters", 16)
    base = [words_twice(world, at) for at in range(16)]
    found = check(arm(base), arm([words[:-2] for words in base]), None)
    assert not found.broken
    assert sign(found, "repetition").n == 0


def test_the_tests_that_the_page_names_are_there():
    rows = [row for row in (ROOT / "docs" / "bug-reports.md").read_text().splitlines() if row.startswith("| [")]
    named = [(row, test) for row in rows for test in re.findall(r"`([^` ]+\.py::[^`]+)`", row)]
    assert {row for row, _ in named} == set(rows), "every report names a test"
    for _, test in named:
        file, *classes, function = test.split("::")
        text = (ROOT / file).read_text()
        assert re.search(rf"^ *def {function}\(", text, re.MULTILINE), test
        assert all(re.search(rf"^class {name}\b", text, re.MULTILINE) for name in classes), test
