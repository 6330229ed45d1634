"""pytest -m throughput: what the client adds to the times it takes. Its streams and those of a bare socket reader take
turns with one server in another process, which writes into every token when it was sent."""

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kvsuite.engines.request import Ask

pytestmark = pytest.mark.throughput

STREAMS, TOKENS, ITL, ROUNDS = 64, 80, 0.025, 4
ASK = Ask("stream", ({"role": "user", "content": "stamps"},), TOKENS)


@pytest.fixture
def url():
    pytest.importorskip("httpx")
    command = [sys.executable, "-m", "suites.checks.scripted", "--itl", str(ITL)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as server:
        yield server.stdout.readline().split()[-1]
        server.kill()


async def bare(url):
    """When the tokens of one stream were sent and when they came, with as little in between as asyncio allows."""
    reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
    body = json.dumps({"messages": ASK.messages, "max_tokens": TOKENS}).encode()
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    sent, came = [], []
    while len(sent) < TOKENS:
        data, now = await reader.read(1 << 16), time.perf_counter()
        times = [float(part.split(b'"')[0]) for part in data.split(b'"content": "')[1:]]
        sent += times
        came += [now] * len(times)
    writer.close()
    return sent, came


def round_of(one):
    """Sent and came, each (streams, tokens), of all streams at once."""

    async def go():
        return await asyncio.gather(*(one() for _ in range(STREAMS)))

    return np.array(asyncio.run(go())).swapaxes(0, 1)


def client_round(url):
    from kvsuite.engines.openai import Client

    async def go():
        async with Client(url, "scripted") as client:
            replies = await asyncio.gather(*(client.ask(ASK) for _ in range(STREAMS)))
        assert not any(reply.error for reply in replies)
        came = [reply.start + reply.ttft + np.cumsum([0, *reply.gaps]) for reply in replies]
        return np.array([[reply.text.split() for reply in replies], came], dtype=float)

    return asyncio.run(go())


def figures(rounds):
    """Mean time between tokens as a multiple of the server's, and a sentence."""
    sent, came = np.concatenate(rounds, axis=1)
    delay = 1e3 * np.quantile(came - sent, [0.5, 0.95])
    between = [1e3 * np.diff(times) for times in (came, sent)]
    mean, tail = ([f(x) for x in between] for f in (np.mean, lambda x: np.quantile(x, 0.95)))
    ratio = mean[0] / mean[1]
    return ratio, (
        f"ITL mean {mean[0]:.2f} ms (sent {mean[1]:.2f}, × {ratio:.4f}), p95 {tail[0]:.1f} (sent {tail[1]:.1f}), "
        f"late by {delay[0]:.2f} ms (p95 {delay[1]:.2f})"
    )


def test_client_overhead(benchmark, url):
    """In the quietest of at most 3 sessions: other work on the machine delays whoever reads."""
    ratios = []

    def session():
        ours, theirs = [], []
        for _ in range(ROUNDS + 1):  # the first warms both up
            theirs.append(round_of(lambda: bare(url)))
            ours.append(client_round(url))
        (mine, said), (_, other) = figures(ours[1:]), figures(theirs[1:])
        print(f"{STREAMS} streams of a token each {1e3 * ITL:g} ms · client: {said} · bare socket: {other}")
        ratios.append(mine)

    benchmark.pedantic(session, rounds=1)
    while ratios[-1] > 1.02 and len(ratios) < 3:
        session()
    assert ratios[-1] <= 1.02, ratios
