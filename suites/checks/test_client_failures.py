"""The client against a server that fails by script: what it says, and when it asks again."""

import asyncio
import importlib
import re
import socket
import sys
import time
from email.utils import formatdate

import pytest

from kvsuite.engines import openai
from kvsuite.engines.openai import Client
from kvsuite.engines.request import Ask
from kvsuite.errors import UsageError
from suites.checks.asking import ask, user, words
from suites.checks.scripted import Server


@pytest.fixture(scope="module")
def server():
    with Server() as server:
        yield server


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(openai, "BACKOFF", 0.02)
    monkeypatch.setattr(openai, "LINGER", 0.1)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("cut", "the connection broke (peer closed connection without sending complete message body "),
        ("end-early", "the stream ended before the answer did after 3 chunks"),
        (
            "wrong-json",
            'the server sent what is no part of an answer: {"choices": [{"delta": {"content" after 3 chunks',
        ),
        ("wrong-shape", "the server sent what is no part of an answer: "),
        ("error-event", "the server reported: the engine died after 3 chunks"),
    ],
)
def test_a_stream_that_breaks(server, content, error):
    calls = len(server.calls)
    reply = ask(server, content)
    assert reply.error.startswith(error)
    assert (reply.text, reply.finish, reply.retries) == (words(content, 3), "", 0)
    assert len(server.calls) == calls + 1, "a stream that has begun is never asked for again"


@pytest.mark.parametrize("content", ["no-done", "cut-after-finish", "hung", "lingering"])
def test_an_answer_that_says_it_is_finished_is_whole(server, content):
    begin = time.perf_counter()
    patience = 1 if content == "hung" else 30
    reply = ask(server, content, between=patience)
    assert (reply.error, reply.text, reply.finish) == ("", words(content), "stop")
    waited = time.perf_counter() - begin - reply.seconds
    assert waited >= patience if content == "hung" else waited < patience, "seconds are those to its last event"


def test_no_first_token(server):
    reply = ask(server, "stall 0", first=0.2)
    assert (reply.error, reply.text, reply.ttft) == ("no token within 0.2 s", "", 0.0)
    assert 0.1 <= reply.seconds < 30  # its start is after connecting


def test_no_next_token(server):
    reply = ask(server, "stall 5", between=0.2, count=lambda text: len(text.split()))
    assert reply.error == "no token within 0.2 s after 5 tokens"
    assert reply.text == words("stall 5", 5)
    assert 0.2 <= reply.seconds < 30


def test_a_client_that_had_no_time_to_read_says_so(server, monkeypatch):
    monkeypatch.setattr(openai, "LATE", 0.1)

    async def go():
        async with Client(server.url, "m", first=0.2) as client:
            asked = asyncio.create_task(client.ask(Ask("a", user("stall 0"))))
            await asyncio.sleep(0.1)
            time.sleep(0.5)
            return await asked

    said = asyncio.run(go()).error
    assert re.fullmatch(r"no token within 0\.2 s, and this client was \d+\.\d s late itself", said)
    assert ask(server, "stall 0", first=0.2).error == "no token within 0.2 s"


def test_comments_and_roles_are_no_tokens(server):
    assert ask(server, "ping 0", first=0.2).error == "no token within 0.2 s"
    assert ask(server, "ping 2", between=0.2).error == "no token within 0.2 s after 2 chunks"


def test_no_end():
    with Server(itl=0.05) as slow:
        assert ask(slow, "hi", first=0.3, between=0.3).error == "", "0.6 s in all, but never 0.3 without a token"
        reply = ask(slow, "hi", first=0.2, between=0.2, total=0.3)
        assert reply.error.startswith("not finished within 0.3 s after ")
        assert 2 <= reply.tokens <= 6
        assert ask(slow, "stall 0", first=0.2, total=0.1).error == "not finished within 0.1 s"


def test_a_server_error_is_told_and_not_repeated(server):
    calls = len(server.calls)
    reply = ask(server, "error-500")
    assert reply.error.startswith("HTTP 500: out of memory memory")
    assert len(reply.error) < 330
    assert len(server.calls) == calls + 1


def test_no_stream(server):
    assert ask(server, "no-stream").error == "HTTP 200, but no stream: streaming is off"


def test_busy_once_with_a_time_to_return(server):
    reply = ask(server, "busy-once 1")
    assert (reply.text, reply.error, reply.retries) == (words("busy-once 1"), "", 1)
    assert 1 <= reply.ttft < 30, "the clock starts with the first attempt"


def test_busy_once_without(server):
    reply = ask(server, "busy-once")
    assert (reply.text, reply.error, reply.retries) == (words("busy-once"), "", 1)
    assert reply.ttft < 30


def test_a_time_to_return_that_is_too_late(server):
    reply = ask(server, "busy-once 3600")
    assert (reply.error, reply.retries) == ("HTTP 429: busy (come back in 3600 s)", 0)
    assert reply.seconds < 30


def test_a_date_to_return_at():
    assert 28 < openai._seconds(formatdate(time.time() + 30, usegmt=True)) <= 30
    assert openai._seconds(formatdate(time.time() - 30, usegmt=True)) == 0
    assert openai._seconds("0.5") == 0.5
    assert openai._seconds("soon") is openai._seconds("") is None


@pytest.mark.parametrize("retries", [0, 2])
def test_always_busy(server, retries):
    calls = len(server.calls)
    reply = ask(server, "busy", retries=retries)
    assert (reply.error, reply.retries) == ("HTTP 503: <h1>down for now</h1>", retries)
    assert len(server.calls) == calls + retries + 1


def test_nobody_there():
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"

        async def go():
            async with Client(url, "m", retries=2) as client:
                with pytest.raises(OSError, match=f"^{url}/health: "):
                    await client.get("/health")
                return await client.ask(Ask("a", user("hi"))), await Client(url, retries=0).ask(Ask("b", user("hi")))

        reply, nameless = asyncio.run(go())
    assert reply.error.startswith("no connection: ")
    assert reply.retries == 2
    assert nameless.error.startswith(f"{url}/v1/models: ")


def test_a_server_that_comes_up_late():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]

    async def go():
        async with Client(f"http://127.0.0.1:{port}", "m", retries=6) as client:
            reply = asyncio.create_task(client.ask(Ask("a", user("hi"))))
            await asyncio.sleep(0.1)
            with Server(port=port):
                return await reply

    reply = asyncio.run(go())
    assert (reply.text, reply.error) == (words("hi"), "")
    assert reply.retries >= 1
    assert reply.ttft > 0.1


def test_no_connection_in_time(monkeypatch):
    async def never(*_, **__):
        await asyncio.sleep(3600)

    async def go():
        async with Client("http://127.0.0.1:9", "m", connect=0.1) as client:
            monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", never)
            return await client.ask(Ask("a", user("hi")))

    reply = asyncio.run(go())
    assert (reply.error, reply.retries) == ("no connection within 0.1 s", 0)


def test_a_refusal_for_another_reason_is_told_and_not_remembered(server):
    async def go():
        async with Client(server.url) as client:
            return [await client.ask(Ask(content, user(content))) for content in ("error-400", "hi", "error-400")]

    calls = len(server.calls)
    refused, fine, again = asyncio.run(go())
    assert refused.error == again.error == "HTTP 400: the prompt is too long"
    assert fine.counted == "usage"
    assert len(server.calls) - calls == 4, "once it took stream_options, they are not to blame"


def test_a_server_that_names_no_model(server, monkeypatch):
    async def go():
        async with Client(server.url) as client:
            with monkeypatch.context() as patch:
                patch.setattr(server, "_page", lambda path: (404, '{"detail": "Not Found"}'))
                replies = await asyncio.gather(*(client.ask(Ask(str(at), user("hi"))) for at in range(3)))
            return *replies, await client.ask(Ask("later", user("hi")))

    asked = len(server.paths)
    *nameless, later = asyncio.run(go())
    assert {reply.error for reply in nameless} == {f"{server.url}/v1/models names no model (HTTP 404: Not Found)"}
    assert server.paths[asked:] == ["GET /v1/models"] * 2 + ["POST /v1/chat/completions"]
    assert later.text == words("hi")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "localhost:8000", "", "ftp://x", "http://", "http://[::1"])
def test_a_url_that_is_none(url):
    with pytest.raises(UsageError, match="is not the URL of a server"):
        Client(url)


@pytest.mark.parametrize("options", [{"first": 0}, {"between": -1}, {"total": float("nan")}, {"retries": -1}])
def test_times_that_are_none(options):
    with pytest.raises(UsageError, match="timeouts must be over 0"):
        Client("http://127.0.0.1:1", **options)


@pytest.mark.parametrize("key", ["secret\n", "schlüssel"])
def test_a_key_that_no_header_can_hold(key):
    with pytest.raises(UsageError, match="key is made of printable ASCII characters"):
        Client("http://127.0.0.1:1", key=key)


def test_without_httpx(monkeypatch):
    for name in ("kvsuite.engines.openai", "kvsuite.engines.wire"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(UsageError, match=r"needs httpx: pip install 'kvsuite\[client\]'$"):
        importlib.import_module("kvsuite.engines.openai")


def test_who_gives_up_can_go_on(server):
    async def go():
        async with Client(server.url, "m") as client:
            task = asyncio.create_task(client.ask(Ask("a", user("stall 1"))))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return (await client.ask(Ask("b", user("hi")))).text

    assert asyncio.run(go()) == words("hi")


def test_no_request_is_sent_where_another_one_was():
    with Server() as server:

        async def go():
            async with Client(server.url) as client:
                for content in ("one", "empty", "two", "cut", "three"):
                    await client.ask(Ask("a", user(content)))
                    yield server.connections

        async def counts():
            return [count async for count in go()]

        assert asyncio.run(counts()) == [2, 3, 4, 5, 6]  # the first names the model


@pytest.mark.parametrize("seconds", [0.3, 0.6])
def test_connecting_is_no_part_of_the_times_unless_the_server_has_no_room(monkeypatch, seconds):
    async def go(server):
        loop = asyncio.get_running_loop()
        connect = loop.create_connection

        async def slowly(*args):
            await asyncio.sleep(seconds)
            return await connect(*args)

        monkeypatch.setattr(loop, "create_connection", slowly)
        async with Client(server.url, "scripted") as client:
            return await client.ask(Ask("a", user("hi")))

    with Server() as server:
        reply = asyncio.run(go(server))
    assert 0 < reply.ttft <= reply.seconds
    assert (reply.ttft < 0.3) == (seconds < openai.PROMPT)
    assert (reply.ttft >= 0.6) == (seconds > openai.PROMPT)
