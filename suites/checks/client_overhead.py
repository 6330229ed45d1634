"""What the client adds to the times it takes: ``python -m suites.checks.client_overhead``. Its streams and those of a
bare socket reader take turns with one server in another process, which writes into every token when it was sent."""

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from kvsuite.engines.request import Ask

STREAMS, TOKENS, ITL, ROUNDS = 64, 80, 0.025, 8
ASK = Ask("stream", ({"role": "user", "content": "stamps"},), TOKENS)


@contextlib.contextmanager
def server():
    """Its URL."""
    command = [sys.executable, "-m", "suites.checks.scripted", "--itl", str(ITL)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.kill()


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
    """In ms: how late a token is stamped (median of all), the p95 of the times between stamps (in the round where it is
    least, since other work on the machine only adds to it), and a sentence."""
    sent, came = 1e3 * np.array(rounds).swapaxes(0, 1)
    late, tails = came - sent, [[np.quantile(np.diff(r), 0.95) for r in times] for times in (came, sent)]
    return (
        np.median(late),
        min(tails[0]),
        (
            f"late by {np.median(late):.2f} ms (p95 {np.quantile(late, 0.95):.2f}), ITL p95 {min(tails[0]):.2f} to "
            f"{max(tails[0]):.2f} (sent {min(tails[1]):.2f} to {max(tails[1]):.2f})"
        ),
    )


def measure(url, rounds):
    """What came of our streams and of a bare socket reader's, in turn."""
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(round_of(lambda: bare(url)))
        ours.append(client_round(url))
    return ours, theirs


def main():
    """Print two figures that a bad client changes. The mean of its ITL is none: of a delay that stays the same no
    difference of stamps knows, and their mean only sees the first stamp and the last. No limit is set: who waits for a
    core is late by all of its work, whatever the client does."""
    with server() as url:
        ours, theirs = measure(url, ROUNDS + 1)  # the first warms both up
    (late, tail, said), (bare_late, bare_tail, other) = figures(ours[1:]), figures(theirs[1:])
    added = 100 * (late - bare_late) / (1e3 * ITL)
    figure = f"a token's stamp {added:.2f} % of the ITL later, p95 of the ITL × {tail / bare_tail:.4f}"
    print(f"{STREAMS} streams of a token each {1e3 * ITL:g} ms · client: {said} · bare socket: {other} · {figure}")


if __name__ == "__main__":
    main()
