"""A streaming client of OpenAI's chat completions, as vLLM, SGLang, LMDeploy and llama.cpp serve them."""

from __future__ import annotations

import asyncio
import email.utils
import ipaddress
import json
import math
import random
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from kvsuite import disk
from kvsuite.engines.request import Ask, Reply
from kvsuite.engines.stream import LARGEST, Events, Failure, StreamParser, error_message
from kvsuite.errors import UsageError, sentence

try:
    import httpx

    from kvsuite.engines.wire import Connection, Wire
except ImportError as error:
    raise UsageError("asking a server needs httpx: pip install 'kvsuite[client]'") from error

BACKOFF = 0.5
"""Seconds before the first retry, twice as many before the next; by chance half as many up to 1.5 times, so that those
who were refused together do not return together."""
IDLE = 2.0
"""Seconds that an unused connection over TLS or a proxy is kept, so that few requests wait for its handshakes; servers
drop theirs after 5. Others are used once."""
JSON = {"Content-Type": "application/json"}
APART, BESIDE = 1.2, 4
"""How many times as many tokens usage may count as a tokenizer does that reads the text once more, and how many beside:
special tokens, and pieces that are put together otherwise."""
LATE = 1.0
"""Seconds by which a timeout may come too late before that is told: who had no time to read may have missed a token."""
LINGER = 0.5
"""Seconds that a stream has to end after [DONE]; a server that is left sooner takes it for an answer broken off."""
PROMPT = 0.5
"""Seconds. Connecting that takes less is no part of the times: a client that keeps connections would not wait for it. A
server without room for another one lets its clients try again after 1 s, and that is counted. So is all connecting over
TLS or through a proxy."""


class Client:
    """Asks one server, any number of things at a time. It belongs to the event loop that uses it first.

    ``url`` is the server's root, with or without /v1; ``model`` the one to ask for, else the first that it names.
    Seconds: ``connect`` for a connection; ``first`` to the first token and ``total`` to the end, both from the first
    attempt; ``between`` tokens. ``count`` counts the tokens of a text; it is used where the server does not say them,
    and where it says far more or fewer.
    Raises UsageError for what is no URL or no time.
    """

    def __init__(
        self,
        url: str,
        model: str = "",
        *,
        key: str | None = None,
        connect: float = 10,
        first: float = 120,
        between: float = 60,
        total: float = 600,
        count: Callable[[str], int] | None = None,
        retries: int = 3,
    ) -> None:
        if not all(seconds > 0 for seconds in (connect, first, between, total)) or retries < 0:
            raise UsageError("a client's timeouts must be over 0 seconds, its retries at least 0")
        self.url, self.model = url.rstrip("/").removesuffix("/v1").rstrip("/"), model
        self.connect, self.first, self.between, self.total = connect, first, between, total
        self.count, self.retries = count, retries
        self._http = _http(self.url, key, connect)
        self._usage: bool | None = None
        """Whether the server takes ``stream_options``; None before it has shown."""
        self._naming: asyncio.Task[list[str]] | None = None
        self._counting = asyncio.Lock()

    async def ask(self, ask: Ask) -> Reply:
        """The answer; where it fails, what came of it and the ``error``. Asks again only where nothing was done yet: no
        connection, 429 and 503. Its clock starts with the first attempt; see `PROMPT`."""
        heard = StreamParser(reply := Reply(ask.id, start=time.perf_counter()))
        try:
            self.model = self.model or await self._name()
            await self._insist(ask, heard)
        except (Failure, OSError, UsageError) as error:
            reply.error = str(error)
        reply.seconds = (time.perf_counter() if reply.error else heard.end) - reply.start
        await self._count(heard)
        if reply.error and heard.chunks:
            reply.error += f" after {reply.tokens} {'chunks' if reply.counted == 'chunks' else 'tokens'}"
        return reply

    async def _count(self, heard: StreamParser) -> None:
        """The reply's tokens: as the server counts them, unless a tokenizer is here and does not find them so."""
        reply, text, said = heard.reply, heard.close(), heard.tokens
        read: int | None = None
        if self.count is not None:
            async with self._counting:  # in a thread, as other streams run on; one at a time, as tokenizers have state
                read = await asyncio.to_thread(self.count, text) if text else 0
        parsed = bool(reply.tool_calls)  # a call's tags, name and brackets are tokens that the server took out
        if said is not None and (read is None or reply.error or _alike(said, read) or (parsed and said > read)):
            reply.tokens = said
        elif read is not None:
            reply.tokens, reply.counted, reply.usage_tokens = read, "tokenizer", said
        else:
            reply.tokens, reply.counted = heard.chunks, "chunks"

    async def models(self) -> list[str]:
        """The models that it serves. Raises UsageError where it names none, OSError where nothing answers."""
        status, text = await self.get("/v1/models")
        try:
            names = [str(model["id"]) for model in disk.parsed(text)["data"]]
        except (ValueError, TypeError, KeyError):
            names = []
        if status != 200 or not names:
            raise UsageError(f"{self.url}/v1/models names no model (HTTP {status}: {error_message(text)})")
        return names

    async def get(self, path: str) -> tuple[int, str]:
        """Status and text of a page such as ``/metrics``. Raises OSError, one sentence, where nothing answers."""
        return await self._page("GET", path)

    async def post(self, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
        """The same of a POST with a body as JSON, or without, such as ``/reset_prefix_cache``."""
        return await self._page("POST", path, b"" if body is None else json.dumps(body).encode())

    async def likelihoods(self, field: str, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """How likely the server's model finds every token of an answer behind a prompt, both as ids: log-probabilities,
        nats. ``field`` asks for them: vLLM's is ``prompt_logprobs``. Raises UsageError where the server has none,
        OSError where nothing answers."""
        known = {"model": self.model or await self._name(), "prompt": [*prompt, *answer], "max_tokens": 1, field: 1}
        status, text = await self.post("/v1/completions", known)
        try:
            found = disk.parsed(text)["choices"][0][field][-len(answer) :]
            logs = [float(at[str(token)]["logprob"]) for at, token in zip(found, answer, strict=True)]
            if not all(map(math.isfinite, logs)):
                raise ValueError("a likelihood is not finite")
            return logs
        except (ValueError, TypeError, KeyError, IndexError):
            said = error_message(text)
            raise UsageError(f"{self.url}/v1/completions has no likelihoods (HTTP {status}: {said})") from None

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _name(self) -> str:
        """The first model, by one question for all who want to know; one that failed is put again."""
        if self._naming is None or self._naming.done():
            self._naming = asyncio.create_task(self.models())
        return (await asyncio.shield(self._naming))[0]

    async def _page(self, method: str, path: str, body: bytes = b"") -> tuple[int, str]:
        try:
            async with asyncio.timeout(self.between):
                asked = self._http.stream(method, path, content=body, headers=JSON if body else None)
                async with asked as response:
                    return response.status_code, await _text(response)
        except TimeoutError:
            raise TimeoutError(f"{self.url}{path}: no answer within {self.between:g} s") from None
        except httpx.HTTPError as error:
            raise ConnectionError(sentence(f"{self.url}{path}: {_reason(error)}")) from error

    async def _insist(self, ask: Ask, heard: StreamParser) -> None:
        """Until there is an answer. Raises Failure where there is none."""
        clock, usage = asyncio.get_running_loop().time, self._usage is not False
        body = self._body(ask, usage)  # before the clock starts: a long prompt takes milliseconds
        begin, heard.reply.start = clock(), (begun := time.perf_counter())
        end = begin + self.total
        try:
            async with asyncio.timeout_at(min(begin + self.first, end)) as limit:
                while True:
                    try:
                        await self._attempt(body, heard, limit, end, begun)
                    except Failure as failure:
                        if usage and not self._usage and failure.status in (400, 422):
                            usage, body = False, self._body(ask, False)  # if it was not that, the server says so again
                            continue
                        await self._pause(failure, heard.reply, limit)
                    else:
                        self._usage = usage
                        return
        except TimeoutError:
            if heard.whole:
                return
            late = clock() - (limit.when() or end)
            said = f", and this client was {late:.1f} s late itself" if late > LATE else ""
            if limit.when() == end:
                raise Failure(f"not finished within {self.total:g} s{said}") from None
            raise Failure(f"no token within {self.between if heard.chunks else self.first:g} s{said}") from None

    async def _attempt(
        self, body: bytes, heard: StreamParser, limit: asyncio.Timeout, end: float, begun: float
    ) -> None:
        """Send it once and listen to the end, moving the limit on with every token. ``begun``: when the first attempt
        was; connecting is left out of the times where that took no longer than it must."""
        try:
            async with self._http.stream("POST", "/v1/chat/completions", content=body, headers=JSON) as response:
                wire = response.extensions.get("connection")
                first = heard.reply.start == begun and not heard.reply.retries
                if first and isinstance(wire, Connection) and wire.sent - begun < PROMPT:
                    heard.reply.start = wire.sent
                if response.status_code != 200 or "json" in response.headers.get("content-type", ""):
                    raise await _refusal(response)
                await self._listen(response, heard, limit, end)
                packing = response.headers.get("content-encoding", "")
        except httpx.ConnectTimeout:
            raise Failure(f"no connection within {self.connect:g} s") from None
        except httpx.ConnectError as error:
            raise Failure(f"no connection: {_reason(error)}", again=True) from error
        except httpx.HTTPError as error:
            if not heard.whole:
                raise Failure(f"the connection broke ({_reason(error)})") from error
        if not heard.whole:
            raise Failure("the stream ended before the answer did" + f" (it came packed: {packing})" * bool(packing))

    async def _listen(self, response: httpx.Response, heard: StreamParser, limit: asyncio.Timeout, end: float) -> None:
        clock, events = asyncio.get_running_loop().time, Events()
        wire = response.extensions.get("connection")
        async for chunk in response.aiter_raw():  # aiter_lines would decode and split it before we see the clock
            at = wire.arrived if isinstance(wire, Connection) else time.perf_counter()
            moved = [heard.hear(data, at) for data in events.feed(chunk) if not heard.done]
            if any(moved):
                limit.reschedule(min(clock() + (LINGER if heard.done else self.between), end))

    async def _pause(self, failure: Failure, reply: Reply, limit: asyncio.Timeout) -> None:
        """Wait for another attempt. Raises the failure where there shall be none, or none in time."""
        pause, when = failure.after, limit.when()
        if pause is None:
            pause = BACKOFF * 2**reply.retries * random.uniform(0.5, 1.5)
        late = when is not None and asyncio.get_running_loop().time() + pause >= when
        if not failure.again or late or reply.retries >= self.retries:
            raise failure
        reply.retries += 1
        await asyncio.sleep(pause)

    def _body(self, ask: Ask, usage: bool) -> bytes:
        body = {
            "model": self.model,
            "messages": [dict(message) for message in ask.messages],
            "stream": True,
            "temperature": ask.temperature,
        }
        if usage:
            body["stream_options"] = {"include_usage": True}
        if ask.max_tokens is not None:
            body["max_tokens"] = ask.max_tokens
        if ask.seed is not None:
            body["seed"] = ask.seed
        if ask.tools:
            body["tools"] = [dict(tool) for tool in ask.tools]
        return json.dumps({**body, **ask.extra}).encode()


def _http(url: str, key: str | None, connect: float) -> httpx.AsyncClient:
    """One for all streams, without a limit on connections: a limit would queue requests, and hide that."""
    try:
        at = httpx.URL(url)
    except httpx.InvalidURL:
        at = httpx.URL("")
    if at.scheme not in ("http", "https") or not at.host:
        raise UsageError(f"{url!r} is not the URL of a server: write it like http://127.0.0.1:8000")
    if key and not (key.isascii() and key.isprintable()):
        raise UsageError("a server's key is made of printable ASCII characters")
    here = _loopback(at.host)
    direct = at.scheme == "http" and (here or not urllib.request.getproxies())
    headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
    return httpx.AsyncClient(
        base_url=at,
        headers=headers | ({"Connection": "close"} if direct else {}),
        timeout=httpx.Timeout(None, connect=connect),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=20, keepalive_expiry=IDLE),
        trust_env=not here,  # a proxy for the world outside has no business here
        transport=Wire(at.host, at.port or 80) if direct else None,
    )


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _refusal(response: httpx.Response) -> Failure:
    """What an answer says that is no stream."""
    status = response.status_code
    why = error_message(await _text(response)) or response.reason_phrase
    text = f"HTTP {status}{', but no stream' if status == 200 else ''}: {why}"
    after = _seconds(response.headers.get("retry-after", ""))
    if after is not None:
        text += f" (come back in {after:.0f} s)"
    return Failure(text, status, status in (429, 503), after)


async def _text(response: httpx.Response) -> str:
    """The body of an answer that is no stream, as UTF-8: packed or in other characters nobody was asked to send it.
    Raises httpx.ReadError where it has more than `LARGEST` bytes."""
    pieces, size = [], 0
    async for chunk in response.aiter_raw():
        pieces.append(chunk)
        size += len(chunk)
        if size > LARGEST:
            raise httpx.ReadError(f"it sent more than {LARGEST:,} bytes")
    return b"".join(pieces).decode(errors="replace")


def _seconds(after: str) -> float | None:
    """Retry-After: seconds or a date; None for what is neither."""
    try:
        return max(0.0, float(after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    except ValueError:
        return None


def _alike(said: int, read: int) -> bool:
    return said <= APART * read + BESIDE and read <= APART * said + BESIDE


def _reason(error: httpx.HTTPError) -> str:
    return str(error).rstrip(".") or type(error).__name__
