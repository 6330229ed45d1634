"""A proxy in front of real OpenAI-compatible servers (ASGI): each request is streamed from where a policy sends it.

A policy is told what the proxy knows of a server: the requests under way, the tokens that came of them, and the
method's law of times. Nobody tells it how long an answer will be, so the policies are those that need not know.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kvsuite.errors import UsageError, unknown
from kvsuite.predict.fleet import Request, Target
from kvsuite.predict.laws import Law
from kvsuite.predict.router import POLICIES, Policy

if TYPE_CHECKING:
    import httpx

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

SERVED = ("mixed, at random", "mixed, least loaded", "by throughput", "by both, blind")
REST = 5.0
"""Seconds in which a server that could not be reached is not asked."""
LETTERS = 4
"""Of a token, as requests are counted before anyone has tokenized them."""
UNKNOWN = 256
"""Tokens that an answer is expected to have, where a request names no maximum below it."""
TYPE = b"x-kvsuite-type"
"""The header in which a client may say what type of task it asks for."""
HOP = (b"host", b"content-length", b"connection", b"transfer-encoding", TYPE)
"""Headers that are not passed on."""


@dataclass(eq=False)
class Backend(Target):
    """One server."""

    url: str
    law: Law
    under_way: list[list[int]] = field(default_factory=list)
    """Of each request the tokens of its prompt, and those that have come."""
    rests_until: float = 0.0

    @property
    def load(self) -> int:
        """Requests under way."""
        return len(self.under_way)

    def rate(self, prompt: int) -> float:
        """See `Target.rate`."""
        tokens = sum(asked + made for asked, made in self.under_way) + prompt
        return 1 / self.law.step_seconds(self.load + 1, tokens)


def policy(name: str) -> Policy:
    """One that needs no lengths. Raises UsageError with the nearest known name."""
    known = {p.name: p for p in POLICIES if p.name in SERVED}
    if name not in known:
        raise unknown("policy of a proxy", name, known)
    return known[name]


class Proxy:
    """The ASGI application. The first backend's method is the uncompressed one."""

    def __init__(
        self, backends: Sequence[Backend], policy: Policy, client: httpx.AsyncClient, fragile: Sequence[str] = ()
    ) -> None:
        """``fragile`` are the types of task that a careful policy keeps on the uncompressed servers."""
        if not backends:
            raise UsageError("a proxy needs a server behind it")
        self.backends, self.policy, self.client = list(backends), policy, client
        self.fragile, self.plain = frozenset(fragile), backends[0].law.method
        self._rng = np.random.default_rng()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request: refused in a sentence, or passed on; what a client leaves is not answered to the end."""
        if scope["type"] != "http":
            return
        body = await _body(receive)
        try:
            asked = self._request(scope, body)
        except ValueError as error:
            await _refuse(send, 400, str(error))
            return
        relay = asyncio.ensure_future(self._pass_on(scope, body, asked, send))
        left = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({relay, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
            if not relay.done():
                relay.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await relay  # raises what broke, so that the client's connection breaks

    def _request(self, scope: Message, body: bytes) -> Request:
        """What a policy is told of it. Raises ValueError for what is no JSON object."""
        found = json.loads(body or b"{}")
        if not isinstance(found, dict):
            raise ValueError("the request is no JSON object")
        said = found.get("messages", found.get("prompt", ""))
        most = found.get("max_completion_tokens") or found.get("max_tokens") or UNKNOWN
        length = min(int(most), UNKNOWN) if isinstance(most, (int, float)) else UNKNOWN
        kind = dict(scope["headers"]).get(TYPE, b"").decode("latin-1")
        methods = {b.law.method for b in self.backends}
        prompt = len(json.dumps(said, ensure_ascii=False)) // LETTERS + 1
        told = dict.fromkeys(methods, float(length))
        return Request(0.0, prompt, dict.fromkeys(methods, length), told, kind in self.fragile)

    async def _pass_on(self, scope: Message, body: bytes, asked: Request, send: Send) -> None:
        """To one backend after the other, until one can be reached."""
        tried: list[Backend] = []
        while len(tried) < len(self.backends):
            left = [b for b in self.backends if b not in tried]
            now = time.monotonic()
            awake = [b for b in left if b.rests_until <= now] or left
            backend = self.policy.server(asked, awake, self.plain, self._rng)
            assert isinstance(backend, Backend)
            tried.append(backend)
            if await self._stream(backend, scope, body, asked, send):
                return
        await _refuse(send, 502, f"none of {len(tried)} servers can be reached")

    async def _stream(self, backend: Backend, scope: Message, body: bytes, asked: Request, send: Send) -> bool:
        """Whether the backend was reached. What breaks later breaks the client's stream, too: half an answer is not
        asked for again."""
        import httpx

        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in HOP]
        url = backend.url + scope["path"] + ("?" + scope["query_string"].decode() if scope["query_string"] else "")
        counts = [asked.prompt, 0]
        backend.under_way.append(counts)
        started = False
        try:
            async with self.client.stream(scope["method"], url, content=body, headers=headers) as answer:
                kept = [(k.lower(), v) for k, v in answer.headers.raw if k.lower() not in HOP]
                await send({"type": "http.response.start", "status": answer.status_code, "headers": kept})
                started = True
                async for chunk in answer.aiter_raw():
                    counts[1] += chunk.count(b"data: ")
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except httpx.ConnectError:
            backend.rests_until = time.monotonic() + REST
            return False
        except httpx.HTTPError as error:
            if started:
                raise
            await _refuse(send, 502, f"{backend.url} broke off: {type(error).__name__}")
        finally:
            backend.under_way.remove(counts)
        return True


async def _body(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def _left(receive: Receive) -> None:
    """Until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _refuse(send: Send, status: int, why: str) -> None:
    """An error as OpenAI's servers write it."""
    body = json.dumps({"error": {"message": why, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
