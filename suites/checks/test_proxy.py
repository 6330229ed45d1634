"""``kvsuite route serve``: requests reach the servers that a policy chooses, and their streams come back unmixed."""

import asyncio
import json
import sys
from dataclasses import replace

import httpx
import pytest

from kvsuite.cli import main
from kvsuite.errors import UsageError
from kvsuite.predict.proxy import Backend, Proxy, policy
from kvsuite.predict.router import POLICIES
from suites.checks.scripted import Server, answer
from suites.checks.test_router import PLAIN, SMALL


class Client:
    """One connection to an ASGI application, as a server would hold it."""

    def __init__(self, body, path="/v1/chat/completions", headers=(), leaves_after=None):
        self.body, self.sent, self.leaves_after = (
            body if isinstance(body, bytes) else json.dumps(body).encode(),
            [],
            leaves_after,
        )
        self.scope = {
            "type": "http", "method": "POST", "path": path, "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"host", b"proxy"), *headers],
        }  # fmt: skip
        self._gone, self._read = asyncio.Event(), False

    async def receive(self):
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)
        if self.leaves_after is not None and len(self.sent) > self.leaves_after:
            self._gone.set()

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def whole(self):
        return self.sent[-1].get("more_body") is False

    @property
    def text(self):
        return b"".join(m.get("body", b"") for m in self.sent)

    @property
    def words(self):
        events = [json.loads(line[6:]) for line in self.text.split(b"\n") if line.startswith(b"data: {")]
        return [choice["delta"].get("content") or "" for e in events for choice in e["choices"]]


def asks(word, **more):
    return {"model": "m", "stream": True, "messages": [{"role": "user", "content": word}], **more}


def run(urls, clients, name="mixed, least loaded", fragile=(), careful=False):
    """The clients, answered together by a proxy in front of these servers: the first plain, the others compressed."""
    backends = [Backend(url, SMALL if at else PLAIN) for at, url in enumerate(urls)]

    async def go():
        async with httpx.AsyncClient(timeout=20, limits=httpx.Limits(max_connections=None)) as client:
            proxy = Proxy(backends, replace(policy(name), careful=careful), client, fragile)
            calls = (proxy(c.scope, c.receive, c.send) for c in clients)
            return await asyncio.gather(*calls, return_exceptions=True)

    return backends, asyncio.run(go())


@pytest.fixture
def two():
    with Server() as plain, Server() as small:
        yield plain, small


def test_200_streams_do_not_mix(two):
    clients = [Client(asks(f"number {at}", max_tokens=12)) for at in range(200)]
    backends, errors = run([s.url for s in two], clients)
    assert errors == [None] * 200
    for at, client in enumerate(clients):
        assert client.status == 200
        assert client.whole
        assert "".join(client.words) == "".join(answer(asks(f"number {at}")["messages"]))
        assert dict(client.sent[0]["headers"])[b"content-type"] == b"text/event-stream"
    assert sum(len(s.calls) for s in two) == 200
    assert min(len(s.calls) for s in two) >= 80, "least loaded shares them out"
    assert [b.load for b in backends] == [0, 0]


def test_streams_come_as_they_are_made():
    """The first chunk is sent on before the last one is there."""
    with Server(itl=0.05) as server:
        client = Client(asks("slowly", max_tokens=12), leaves_after=3)
        backends, _ = run([server.url], [client])
    assert 3 < len(client.sent) < 12
    assert not client.whole, "who leaves is not answered to the end"
    assert backends[0].load == 0


def test_a_server_that_breaks_costs_its_own_requests(two):
    good, bad = two
    bad.behaviour = "cut"
    clients = [Client(asks(f"number {at}")) for at in range(40)]
    backends, errors = run([good.url, bad.url], clients)
    broken = [c for c, error in zip(clients, errors, strict=True) if error is not None]
    assert len(broken) == len(bad.calls) > 10
    assert all(isinstance(e, httpx.HTTPError) for e in errors if e)
    assert not any(c.whole for c in broken)
    for at, client in enumerate(clients):
        if client not in broken:
            assert "".join(client.words) == "".join(answer(asks(f"number {at}")["messages"]))
    assert [b.load for b in backends] == [0, 0]


def test_a_server_that_is_not_there_costs_nothing(two):
    with Server() as gone:
        pass
    clients = [Client(asks(f"number {at}")) for at in range(20)]
    backends, errors = run([two[0].url, gone.url], clients)
    assert errors == [None] * 20
    assert all(c.status == 200 and c.whole for c in clients)
    assert len(two[0].calls) == 20
    assert backends[1].rests_until > 0
    none = Client(asks("x"))
    run([gone.url, gone.url], [none])
    assert none.status == 502
    assert "none of 2 servers can be reached" in json.loads(none.text)["error"]["message"]


def test_what_a_server_refuses_is_passed_on(two):
    two[0].behaviour = "error-400"
    client = Client(asks("x"))
    run([two[0].url], [client])
    assert client.status == 400
    assert b"the prompt is too long" in client.text


def test_fragile_types_stay_plain(two):
    header = [(b"x-kvsuite-type", b"summarization")]
    clients = [Client(asks(f"number {at}"), headers=header if at % 2 else ()) for at in range(40)]
    run([s.url for s in two], clients, fragile=["summarization"], careful=True)
    plain, small = two
    assert len(plain.calls) >= 20
    odd = [body["messages"][-1]["content"] for _, body in small.calls]
    assert odd
    assert all(int(word.split()[-1]) % 2 == 0 for word in odd)
    assert not any("x-kvsuite-type" in str(headers).lower() for headers, _ in plain.calls)


@pytest.mark.parametrize("body", [b"{", b"[1]", b"\xff"])
def test_what_is_no_request_is_refused(two, body):
    client = Client(body)
    run([two[0].url], [client])
    assert client.status == 400
    assert two[0].calls == []


def test_speed_as_a_policy_sees_it():
    quick, slow = Backend("", SMALL), Backend("", PLAIN)
    assert quick.rate(100) > slow.rate(100)
    quick.under_way += [[4000, 10]] * 40
    assert quick.load == 40
    assert quick.rate(100) == pytest.approx(1 / SMALL.step_seconds(41, 40 * 4010 + 100))
    assert quick.rate(100) < slow.rate(100)


def test_policies_that_need_lengths_are_not_served():
    assert policy("by throughput") in POLICIES
    for name in ("oracle", "by both", "by length", "plain, least loaded"):
        with pytest.raises(UsageError, match="unknown policy of a proxy"):
            policy(name)


def test_command_says_what_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["route", "serve", "--plain", "http://127.0.0.1:1"]) == 2
    assert "pip install 'kvsuite[proxy]'" in capsys.readouterr().err
