"""Asking a scripted server one thing, for the checks of the client."""

import asyncio

from kvsuite.engines.openai import Client
from kvsuite.engines.request import Ask
from suites.checks.scripted import TOKENS, answer


def user(content):
    return ({"role": "user", "content": content},)


def words(content, tokens=TOKENS):
    return "".join(answer(user(content), tokens))


def ask(server, content, *, times=1, max_tokens=None, extra=(), **options):
    """One reply to one content by a client of its own, the last of ``times``."""

    async def go():
        async with Client(server.url, **options) as client:
            for _ in range(times):
                reply = await client.ask(Ask("a", user(content), max_tokens, extra=dict(extra)))
            return reply

    return asyncio.run(go())
