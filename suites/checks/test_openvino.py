"""OpenVINO in its process: the grammar, and a stand-in for GenAI everywhere; the real one where it is installed."""

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kvsuite import models
from kvsuite.engines.openvino import OpenVino, check, parse
from kvsuite.engines.openvino_model import shape
from kvsuite.engines.request import Ask
from kvsuite.engines.server import Server, Spec
from kvsuite.errors import UsageError

FAKE = Path(__file__).with_name("fake_genai.py")
CLIENT = """
import os, pathlib, sys, time
from kvsuite.engines.openvino import OpenVino

model, parent = pathlib.Path(sys.argv[1]), os.getppid()
if __name__ == "__main__":
    OpenVino(model, {"threads": "14"}).start()
elif sys.argv[2] == "starting":  # this is the worker, which reads its parent's file first
    (model / "pid").write_text(str(os.getpid()))
    os.kill(parent, 9)
    while os.getppid() == parent:
        time.sleep(0.01)
"""


def ask(number, text, tokens=20, **more):
    return Ask(str(number), ({"role": "user", "content": text},), tokens, **more)


def answers(engine, *asks):
    async def all_at_once():
        return await asyncio.wait_for(asyncio.gather(*map(engine.ask, asks)), timeout=100)

    return asyncio.run(all_at_once())


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Starts engines on the stand-in; the worker imports it, too, since it is given this process' path."""
    shutil.copy(FAKE, tmp_path / "openvino_genai.py")
    (tmp_path / "openvino.py").write_text("__version__ = 'fake'\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    config = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "max_position_embeddings": 150}
    config["num_key_value_heads"] = 1  # 2 × 4 numbers a token
    (model / "config.json").write_text(str(config).replace("'", '"'))
    started = []

    def start(text="kv=f16", **limits):
        engine = OpenVino(model, parse(text), **limits)
        started.append(engine)
        engine.start()
        return engine

    yield start
    for engine in started:
        engine.stop()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kw=u8", "unknown option of openvino 'kw': did you mean 'kv'?"),
        ("kv=u9", "unknown value of openvino's kv 'u9'"),
        ("kv", "unknown value of openvino's kv ''"),
        ("kv=f16/u8", "both are quantized or neither is"),
        ("kv=u8,kv=u4", "kv is given twice"),
        ("kv=f16,keys=by-token", "keys and group are for quantized caches"),
        ("keys=by-token", "keys=by-token acts only together with kv="),
        ("scores=sum", "scores=sum acts only together with eviction="),
        ("eviction=512,scores=mean", "unknown value of openvino's scores 'mean'"),
        ("eviction=512,anchor=mean", "anchor=mean acts only together with crush="),
        ("eviction=500", "eviction is a multiple of 32"),
        ("eviction=h2o", "eviction is a whole number from 32, not 'h2o'"),
        ("eviction=160", "eviction=160 leaves nothing to choose beside start=32 and recent=128"),
        ("eviction=192,start=64", "start=64 and recent=128"),
        ("sparse=trishape,threshold=.5", "threshold is for sparse=xattention"),
        ("sparse=xattention,sparse_start=32", "sparse_start is for sparse=trishape"),
        ("sparse=xattention,threshold=2", "threshold is a share over 0 and up to 1, not '2'"),
        ("sparse=xattention,threshold=nan", "threshold is a share"),
        ("cache=0.5", "cache is a whole number from 1, not '0.5'"),
        ("cache=1,blocks=64", "cache= and blocks= both give the size"),
        ("prefix=yes", "unknown value of openvino's prefix 'yes'"),
        ("threads=-1", "threads is a whole number from 1"),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(text, said):
    with pytest.raises(UsageError) as error:
        parse(text)
    assert said in str(error.value)


def test_options_are_read():
    text = "kv=u8/u4, group=32,eviction=512,scores=norm-sum,window=0,crush=2,anchor=mean,threads=2,prefix=on"
    found = parse(text)
    assert found == dict(pair.strip().split("=") for pair in text.split(","))
    assert parse("") == {}
    assert parse("eviction=96,start=32,recent=32")["eviction"] == "96"
    with pytest.raises(UsageError, match="unknown option"):
        OpenVino(Path("model"), {"kvs": "u8"})
    check({"sparse": "xattention", "threshold": "1"})


def test_the_size_of_a_token_is_read_from_either_format(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"text_config": {"num_hidden_layers": 3, "num_attention_heads": 8, "head_dim": 16}}'
    )
    assert shape(tmp_path) == (3 * 2 * 8 * 16, None)
    assert shape(tmp_path / "nothing") == (None, None)

    def text(said):
        return struct.pack("<Q", len(said)) + said.encode()

    def number(name, value):
        return text(f"llama.{name}") + struct.pack("<II", 4, value)

    numbers = {"block_count": 30, "context_length": 8192, "embedding_length": 576, "attention.head_count": 9}
    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("bc"),
        text("scores") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3),
        *(number(name, value) for name, value in numbers.items()),
        number("attention.head_count_kv", 3),
    ]
    file = tmp_path / "a.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs))
    assert shape(file) == (30 * 2 * 3 * 64, 8192)
    file.write_bytes(file.read_bytes()[:-1])
    assert shape(file) == (None, None)


def test_an_answer_has_exact_counts_and_times(fake):
    engine = fake()
    before = time.perf_counter()
    stopped, capped, empty = answers(engine, ask(0, "one two 3"), ask(1, "go on", 5), ask(2, "0"))
    took = time.perf_counter() - before
    assert (stopped.id, stopped.text, stopped.finish, stopped.tokens) == ("0", "11 12 13", "stop", 4)
    assert (stopped.prompt_tokens, stopped.counted, stopped.error) == (3, "tokenizer", "")
    assert len(stopped.gaps) == 2  # the end of the text is a token, but brings none
    assert (capped.text, capped.finish, capped.tokens, len(capped.gaps)) == ("11 12 13 14 15", "length", 5, 4)
    assert (empty.text, empty.tokens, empty.ttft, empty.gaps) == ("", 1, 0.0, [])
    for reply in (stopped, capped):
        assert reply.start >= before
        assert all(gap >= 0.002 for gap in reply.gaps)  # a step takes that long
        assert 0 < reply.ttft <= reply.ttft + sum(reply.gaps) <= reply.seconds + 1e-9 < took
    assert capped.seconds == pytest.approx(capped.ttft + sum(capped.gaps))


def test_requests_share_steps(fake):
    engine = fake()
    replies = answers(engine, *(ask(i, "go on", 50) for i in range(16)))
    began, ended = max(r.start + r.ttft for r in replies), min(r.start + r.seconds for r in replies)
    assert began < ended


def test_facts_say_what_was_measured_and_not_what_was_asked_for(fake):
    plain, default, halved = fake(), fake(""), fake("kv=u4,blocks=40")
    facts = plain.facts()
    assert (facts["kv_dtype"], facts["block_size"], facts["kv_tokens"], facts["kv_bytes"]) == ("f16", 4, 1000, 16000)
    assert (facts["kv_bits"], facts["max_len"], facts["threads"], facts["compressed"]) == (16, 150, 2, False)
    assert facts["features"]["inference precision"] == "bf16"
    facts = default.facts()
    assert (facts["kv_dtype"], facts["kv_bits"], facts["compressed"]) == ("u8", 9, True)
    facts = halved.facts()
    assert (facts["kv_tokens"], facts["kv_bytes_per_token"], facts["kv_bytes_counted"]) == (160, 6, 160 * 12)


def test_sixteen_bits_that_evict_are_compressed_and_eviction_is_seen(fake):
    engine = fake("kv=f16,eviction=96,start=32,recent=32")
    assert engine.facts()["compressed"]
    answers(engine, ask(0, "a few words 20"))
    assert "proof" not in engine.facts()
    answers(engine, ask(0, "word " * 110, 30))
    assert (engine.facts()["proof"], engine.facts()["evicted_tokens"]) == ("96 tokens of 139", 43)
    engine = fake("kv=f16")
    answers(engine, ask(0, "word " * 110, 30))
    assert "proof" not in engine.facts()


def test_a_prompt_that_is_not_read_yet_is_not_taken_for_evicted(fake):
    engine = fake("kv=f16,eviction=160,start=32,recent=32")
    answers(engine, ask(0, "go on", 100), *(ask(i, "word " * 120, 5) for i in range(1, 4)))
    assert "proof" not in engine.facts()


def test_answers_that_go_without_a_token_in_a_step_are_counted(fake):
    """Once each, however many steps they wait; who is new, or ends, does not wait."""
    engine = fake()
    answers(engine, *(ask(i, f"go {i}") for i in range(4)), ask(4, "word " * 120, 5))
    assert engine.counters() == {"preemptions": 0}
    replies = answers(engine, ask(0, "it waits"), ask(1, "go on"), ask(2, "that waits"))
    assert [len(reply.gaps) for reply in replies] == [19, 19, 19]
    assert engine.counters() == {"preemptions": 2}
    answers(engine, ask(0, "it waits"))
    assert engine.counters() == {"preemptions": 3}
    engine.start()
    assert engine.counters() == {"preemptions": 0}
    engine = fake("batched_tokens=32")
    answers(engine, ask(0, "it waits"), *(ask(i, "go on", 100) for i in range(1, 33)))
    assert engine.counters() == {"preemptions": 0}, "33 wait for a step that has 32 tokens"


def test_what_an_engine_counts_its_server_counts(fake, tmp_path):
    fake()
    server = Server("m", Spec.parse("openvino:kv=f16"), tmp_path / "log", lambda: tmp_path / "model")

    async def counted():
        await server.start()
        first = await server.counters()
        await server.ask(ask(0, "it waits"))
        try:
            return first, await server.counters()
        finally:
            await server.stop()

    assert asyncio.run(counted()) == (({"preemptions": 0}, False), ({"preemptions": 1}, False))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (ask(0, "word " * 149, 2), "the prompt has at least 149 tokens and 2 are to come; there is room for 150"),
        (ask(0, "word " * 300, None), "the prompt has at least 200 tokens"),
        (ask(0, "go on", extra={"cache_salt": "a"}), "OpenVINO has no 'cache_salt'"),
        (ask(0, "go ignored"), "the KV cache of 1000 tokens was full after 1 tokens"),
        (Ask("0", ({"content": 1},)), "expected str"),
        (Ask("0", ({"content": (i for i in "a")},)), "the request cannot be sent"),
    ],
)
def test_a_request_that_cannot_be_answered_fails_alone(fake, asked, said):
    engine = fake()
    failed, other = answers(engine, asked, ask(1, "go 2"))
    assert said in failed.error
    assert failed.id == "0"
    assert (other.text, other.error) == ("11 12", "")


def test_a_prompt_that_would_end_the_engine_is_refused(fake):
    engine = fake("eviction=96,start=32,recent=32,scores=norm-sum")
    lengths = {n: bool(answers(engine, ask(0, "word " * n, 1))[0].error) for n in (32, 33, 39, 40)}
    assert lengths == {32: False, 33: True, 39: True, 40: False}


def test_no_limit_is_the_models_own(fake):
    (reply,) = answers(fake(), ask(0, "word " * 100, None))
    assert (reply.tokens, reply.finish) == (50, "length")


@pytest.mark.parametrize(("word", "said"), [("raise", "a step failed: Check 'x' failed: no luck"), ("crash", "code 3")])
def test_when_the_engine_fails_all_who_wait_are_told(fake, word, said):
    engine = fake()
    replies = answers(engine, ask(0, "go on", 100), ask(1, f"go {word}"))
    assert all(said in reply.error for reply in replies)
    assert not engine.alive
    assert said in answers(engine, ask(2, "go 1"))[0].error
    engine.start()
    assert engine.alive
    assert answers(engine, ask(3, "go 1"))[0].text == "11"


def test_who_is_cancelled_leaves_the_batch(fake):
    engine = fake()

    async def leave():
        waiting = [asyncio.create_task(engine.ask(ask(0, text, 140))) for text in ("go late", "go late", "go on")]
        await asyncio.sleep(0.05)
        for task in waiting[:2]:
            task.cancel()
        left = await asyncio.gather(*waiting, return_exceptions=True)
        return left, await engine.ask(ask(4, "go 1"))

    left, after = asyncio.run(leave())
    assert [isinstance(x, asyncio.CancelledError) for x in left] == [True, True, False]
    assert (left[2].tokens, after.text) == (140, "11")
    assert not engine._waiting


def test_stopping_tells_who_waits_and_leaves_no_process(fake):
    engine = fake()
    pid = engine._process.pid

    async def stop():
        waiting = asyncio.create_task(engine.ask(ask(0, "go on", 140)))
        await asyncio.sleep(0.02)
        await asyncio.to_thread(engine.stop)
        return await waiting

    assert asyncio.run(stop()).error == "openvino: it was stopped"
    engine.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def until(said, seconds):
    deadline = time.monotonic() + seconds
    while not (answer := said()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return answer


def lives(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process at its parent's end")
@pytest.mark.parametrize("when", ["starting", "hanging"])
def test_the_worker_dies_with_its_client(fake, tmp_path, when):
    """Which is killed while OpenVINO hangs, or before the worker could ask for a signal."""
    (tmp_path / "client.py").write_text(CLIENT)
    (noted := tmp_path / "model" / "pid").touch()
    command = [sys.executable, str(tmp_path / "client.py"), str(tmp_path / "model"), when]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with (tmp_path / "log").open("w+") as log, subprocess.Popen(command, env=environment, stderr=log) as client:
        pid = 0
        try:
            pid = int(until(noted.read_text, 60) or 0)
            assert pid, (tmp_path / "log").read_text()
            if when == "hanging":
                client.kill()
            assert client.wait(60) == -signal.SIGKILL
            assert until(lambda: not lives(pid), 10)
        finally:
            client.kill()
            if lives(pid):
                os.kill(pid, signal.SIGKILL)


def test_what_cannot_be_started_is_a_usage_error(fake, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="kv=f32 cannot run model: expect kvcache type bf16, current: f32"):
        fake("kv=f32")
    with pytest.raises(UsageError, match="it ended with code 4"):
        fake("threads=13")
    with pytest.raises(UsageError, match=r"cannot run model: it took over 0\.5 s"):
        fake("threads=14", startup=0.5)
    with pytest.raises(UsageError, match="does not exist"):
        OpenVino(tmp_path / "no", {}).start()
    assert "was not started" in answers(OpenVino(tmp_path, {}), ask(0, "go"))[0].error
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install openvino-genai"):
        OpenVino(tmp_path, {}).start()


@pytest.fixture(scope="module")
def gguf():
    pytest.importorskip("openvino_genai", reason="openvino-genai is not installed")
    try:
        return models.default_gguf()
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def plain(gguf):
    engine = OpenVino(gguf, parse("kv=f16,blocks=100,threads=1"))
    engine.start()
    yield engine
    engine.stop()


def test_real_sixteen_bits(plain):
    facts = plain.facts()
    assert (facts["kv_dtype"], facts["kv_bits"], facts["compressed"]) == ("f16", 16, False)
    assert (facts["kv_tokens"], facts["kv_bytes_per_token"], facts["max_len"]) == (3200, 23040, 8192)
    assert facts["threads"] == 1
    capital = ask("capital", "What is the capital of France?", 40)
    paris, story = answers(plain, capital, ask("story", "Tell me a story.", 25))
    assert ("Paris" in paris.text, paris.finish, paris.prompt_tokens) == (True, "stop", 37)
    assert len(paris.gaps) == paris.tokens - 2
    assert (story.finish, story.tokens, len(story.gaps)) == ("length", 25, 24)
    same = [reply.text for reply in (answers(plain, capital)[0], answers(plain, capital)[0])]
    assert same[0] == same[1]


def test_real_preemptions_are_seen(gguf, plain):
    """Five answers with their prompts need some 770 tokens: of 3,200, and of 384."""
    asks = [ask(i, f"{'Count. ' * 20} Begin at {i}.", 100, extra={"ignore_eos": True}) for i in range(5)]
    before = plain.counters()
    roomy = answers(plain, *asks)
    assert plain.counters() == before == {"preemptions": 0}
    engine = OpenVino(gguf, parse("kv=f16,blocks=12,threads=1"))
    engine.start()
    try:
        tight = answers(engine, *asks)
        assert engine.counters()["preemptions"] > 0
    finally:
        engine.stop()
    assert [reply.tokens for reply in (*roomy, *tight)] == [100] * 10


def test_real_sampling_follows_its_seed(plain):
    drawn = [answers(plain, ask(0, "Tell me a story.", 15, temperature=1.0, seed=s))[0].text for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_real_prompts_that_do_not_fit_are_refused(plain):
    long, rest = answers(plain, ask(0, "word " * 9000), ask(1, "Say yes.", 3))
    assert "there is room for 3200" in long.error
    assert rest.tokens == 3


def test_real_death_is_noticed(gguf):
    """And what OpenVINO stores by itself: eight bits."""
    engine = OpenVino(gguf, parse("eviction=96,start=32,recent=32,blocks=64,threads=1"))
    engine.start()
    try:
        facts = engine.facts()
        assert (facts["kv_dtype"], facts["kv_bits"], facts["compressed"]) == ("u8", 9.5, True)
        (reply,) = answers(engine, ask(0, "Count from 1 to 300.", 250, extra={"ignore_eos": True}))
        assert (reply.error, reply.tokens) == ("", 250)
        facts = engine.facts()
        assert facts["evicted_tokens"] > 100
        assert facts["proof"].startswith(("96 tokens of", "128 tokens of"))

        async def kill():
            waiting = asyncio.create_task(engine.ask(ask(0, "Tell me a story.", 900)))
            await asyncio.sleep(0.3)
            os.kill(engine._process.pid, signal.SIGKILL)
            return await waiting

        assert "code -9" in asyncio.run(kill()).error
        assert not engine.alive
    finally:
        engine.stop()
