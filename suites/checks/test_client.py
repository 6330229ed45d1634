"""The client against a server that answers by script: what it makes of answers."""

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from kvsuite.engines import openai
from kvsuite.engines.openai import Client
from kvsuite.engines.request import Ask
from suites.checks import client_overhead
from suites.checks.asking import ask, user, words
from suites.checks.scripted import CALL, TOKENS, Server


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


def test_an_answer(server):
    reply = ask(server, "hello there")
    assert (reply.id, reply.text, reply.error, reply.finish) == ("a", words("hello there"), "", "stop")
    assert (reply.tokens, reply.counted, reply.prompt_tokens, reply.cached_tokens) == (TOKENS, "usage", 2, 0)
    assert (reply.reasoning, reply.tool_calls, reply.retries) == ("", "", 0)
    assert ask(server, "hello there").cached_tokens == 2


def test_times_are_those_of_the_chunks():
    with Server(itl=0.02) as server:
        before = time.perf_counter()
        reply = ask(server, "slow-first 0.1")
        after = time.perf_counter()
    assert before < reply.start < reply.start + reply.seconds < after
    assert reply.ttft >= 0.12, "the role, which came after 0.1 s, is no token"
    assert len(reply.gaps) == TOKENS - 1
    assert 0.1 + TOKENS * 0.02 <= reply.ttft + sum(reply.gaps) <= reply.seconds


def test_times_are_those_of_arrival(monkeypatch):
    """Not those of reading, which is late where other streams are served first."""
    read = httpx.Response.aiter_raw

    async def late(response):
        await asyncio.sleep(0.5)
        async for chunk in read(response):
            yield chunk

    monkeypatch.setattr(httpx.Response, "aiter_raw", late)
    with Server(itl=0.002) as server:
        begin = time.perf_counter()
        reply = ask(server, "hi", model="m")
        assert time.perf_counter() - begin > 0.5
    assert (reply.text, reply.error) == (words("hi"), "")
    assert 0 < reply.ttft <= reply.seconds < 0.4


def test_what_is_sent(server):
    async def go(url):
        tools = ({"type": "function", "function": {"name": "look"}},)
        async with Client(url, "mine", key="secret") as client:
            messages = ({"role": "system", "content": "be brief"}, *user("é"))
            await client.ask(Ask("a", messages, 5, 0.5, 7, tools, {"cache_salt": "s", "temperature": 0.9}))
            await client.ask(Ask("b", messages))

    paths = len(server.paths)
    asyncio.run(go(server.url + "/v1/"))
    assert server.paths[paths:] == ["POST /v1/chat/completions"] * 2, "a model that is named is not asked for"
    (headers, full), (_, least) = server.calls[-2:]
    assert headers["authorization"] == "Bearer secret"
    assert headers["accept-encoding"] == "identity", "a compressed stream would come in lumps"
    common = {
        "model": "mine", "stream": True, "stream_options": {"include_usage": True},
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "é"}],
    }  # fmt: skip
    assert least == common | {"temperature": 0.0}
    tools = [{"type": "function", "function": {"name": "look"}}]
    assert full == common | {"temperature": 0.9, "max_tokens": 5, "seed": 7, "tools": tools, "cache_salt": "s"}


def test_the_first_model_is_asked_for_once():
    with Server(model="tiny") as server:

        async def go():
            async with Client(server.url) as client:
                return await asyncio.gather(*(client.ask(Ask(str(at), user("x"))) for at in range(5)))

        assert not any(reply.error for reply in asyncio.run(go()))
        assert server.paths.count("GET /v1/models") == 1
        assert {body["model"] for _, body in server.calls} == {"tiny"}


def test_max_tokens_is_the_servers_business(server):
    reply = ask(server, "three", max_tokens=3)
    assert (reply.text, reply.finish, reply.tokens) == (words("three", 3), "length", 3)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 64, 1 << 20])
def test_events_are_found_however_they_are_cut(server, size):
    reply = ask(server, f"pieces {size}")
    assert (reply.error, reply.text) == ("", "é😀" + words(f"pieces {size}") + "😀")
    assert (reply.tokens, reply.counted, reply.finish) == (TOKENS + 3, "chunks", "stop")
    assert len(reply.gaps) == TOKENS + 2
    if size == 1 << 20:
        assert not any(reply.gaps), "what came at once has one time"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "both"])
def test_reasoning(server, name):
    reply = ask(server, f"reasoning {name}")
    text = words(f"reasoning {name}")
    assert (reply.reasoning, reply.text) == (text[:24], text[24:])
    assert len(reply.gaps) == TOKENS - 1, "thoughts are waited for like text"


def test_tool_calls(server):
    reply = ask(server, "tools")
    assert (reply.text, reply.tool_calls, reply.finish) == ("", 'look{"at": "x"}', "tool_calls")
    assert (reply.tokens, len(reply.gaps)) == (3, 2)


def test_an_empty_answer_is_an_answer(server):
    reply = ask(server, "empty")
    assert (reply.text, reply.error, reply.finish) == ("", "", "stop")
    assert (reply.tokens, reply.counted, reply.ttft, reply.gaps) == (0, "usage", 0.0, [])
    assert reply.seconds > 0


def test_several_tokens_a_chunk(server):
    reply = ask(server, "several")
    assert (reply.text, reply.tokens, len(reply.gaps)) == (words("several"), TOKENS, TOKENS // 3 - 1)


def test_garbage_is_passed_on(server):
    reply = ask(server, "garbage", max_tokens=500)
    assert (reply.error, reply.finish, reply.tokens) == ("", "length", 500)
    assert reply.text == ("!!@@  " * 167)[:1000]


def test_usage_in_the_last_chunk(server):
    reply = ask(server, "usage-last")
    assert (reply.text, reply.tokens, reply.counted) == (words("usage-last"), TOKENS, "usage")
    assert reply.prompt_tokens == 1


def test_without_usage_somebody_else_counts(server):
    reply = ask(server, "no-usage")
    assert (reply.tokens, reply.counted, reply.prompt_tokens, reply.cached_tokens) == (TOKENS, "chunks", None, None)
    reply = ask(server, "no-usage", count=lambda text: len(text.split()) * 2)
    assert (reply.tokens, reply.counted) == (2 * TOKENS, "tokenizer")
    reply = ask(server, "no-usage-but-normal", count=lambda text: TOKENS + 4)
    assert (reply.tokens, reply.counted, reply.usage_tokens) == (TOKENS, "usage", None), "it finds much the same"
    reply = ask(server, "no-usage-but-normal", count=lambda text: 99)
    assert (reply.tokens, reply.counted, reply.usage_tokens) == (99, "tokenizer", TOKENS), "it decides"


def test_a_call_has_more_tokens_than_are_seen_of_it(server):
    """vLLM's parsers take out the tags and names around its arguments, 21 tokens of 56: usage was overruled then."""
    reply = ask(server, "calls", count=lambda text: CALL - 21)
    assert reply.tool_calls
    assert (reply.tokens, reply.counted, reply.usage_tokens) == (CALL, "usage", None)
    reply = ask(server, "calls", count=lambda text: 99)
    assert (reply.tokens, reply.counted, reply.usage_tokens) == (99, "tokenizer", CALL), "fewer than are seen"


def test_a_server_without_stream_options():
    with Server(behaviour="no-options") as server:
        reply = ask(server, "hi", times=3)
        assert (reply.text, reply.error, reply.counted, reply.retries) == (words("hi"), "", "chunks", 0)
        assert ["stream_options" in body for _, body in server.calls] == [True, False, False, False]


def test_200_streams_at_once():
    with Server(itl=0.005) as server:

        async def go():
            async with Client(server.url) as client:
                asks = [Ask(str(at), user(f"prompt {at}"), 10 + at % 7) for at in range(200)]
                return await asyncio.gather(*map(client.ask, asks))

        replies = asyncio.run(go())
    for at, reply in enumerate(replies):
        assert (reply.id, reply.error, reply.tokens) == (str(at), "", 10 + at % 7)
        assert reply.text == words(f"prompt {at}", 10 + at % 7)
        assert len(reply.gaps) == 9 + at % 7


def test_streams_do_not_queue():
    """Fifty streams of 0.3 s: each has to have begun before the first is over."""
    with Server(itl=0.03) as server:

        async def go():
            async with Client(server.url, "m") as client:
                return await asyncio.gather(*(client.ask(Ask(str(at), user("x"), 10)) for at in range(50)))

        replies = asyncio.run(go())
    assert max(r.start + r.ttft for r in replies) < min(r.start + r.seconds for r in replies)


def test_pages(server):
    async def go():
        async with Client(server.url + "/v1") as client:
            return [await client.get(path) for path in ("/health", "/metrics", "/nothing")], await client.models()

    (health, metrics, nothing), models = asyncio.run(go())
    assert (health, nothing, models) == ((200, ""), (404, '{"detail": "Not Found"}'), ["scripted"])
    assert metrics[0] == 200
    assert 'cache_dtype="auto"' in metrics[1]


def test_the_prefix_cache_can_be_emptied():
    with Server() as server:

        async def go():
            async with Client(server.url) as client:
                cached = [(await client.ask(Ask("a", user("hi you")))).cached_tokens for _ in range(2)]
                assert (await client.post("/reset_prefix_cache"))[0] == 200
                return [*cached, (await client.ask(Ask("a", user("hi you")))).cached_tokens]

        assert asyncio.run(go()) == [0, 2, 0]


def test_a_proxy_for_the_world_has_no_business_here(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert ask(server, "hi").error == ""
    assert ask(server, "hi", model="x").error == ""


def test_a_server_elsewhere_may_need_it(server, monkeypatch):
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url)  # it answers what a proxy is asked: a whole URL is no path it knows

    async def go():
        async with Client("http://example.invalid", "m") as client:
            return await client.get("/health")

    assert asyncio.run(go())[0] == 404
    assert server.paths[-1] == "GET http://example.invalid/health"


def test_httpx_own_transport_serves_too(server, monkeypatch):
    """It is what proxies and https need."""
    monkeypatch.setattr(openai, "Wire", lambda *_: None)
    reply = ask(server, "pieces 9")
    assert (reply.error, reply.text, len(reply.gaps)) == ("", "é😀" + words("pieces 9") + "😀", TOKENS + 2)
    assert 0 < reply.ttft < reply.ttft + sum(reply.gaps) < reply.seconds
    assert ask(server, "cut").error.startswith("the connection broke (peer closed connection")


def test_the_scripted_server_is_a_program():
    command = [sys.executable, "-m", "suites.checks.scripted", "--kv-cache-dtype", "fp8_e4m3", "--die-after", "2"]
    command += ["--no-prefix-caching"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        try:
            url = process.stdout.readline().split()[-1]

            async def go():
                async with Client(url, retries=0) as client:
                    page = (await client.get("/metrics"))[1]
                    return page, [await client.ask(Ask("a", user("hi"))) for _ in range(3)]

            page, replies = asyncio.run(go())
            assert 'cache_dtype="fp8_e4m3",kv_cache_size_tokens="93184"' in page
            assert 'enable_prefix_caching="False"' in page
            assert [reply.text for reply in replies] == [words("hi"), words("hi"), ""]
            assert replies[2].error
            assert process.wait(5) == 1
        finally:
            process.kill()


def test_no_token_is_stamped_before_it_was_sent():
    """By the client or by the bare socket reader that it is measured against, at 64 streams."""
    with client_overhead.server() as url:
        for (sent, came), *others in client_overhead.measure(url, 1):
            assert others == []
            assert sent.shape == (client_overhead.STREAMS, client_overhead.TOKENS)
            assert (came > sent).all()
            assert (came[:, 1:] >= came[:, :-1]).all()
