"""Plain HTTP/1.1 to one server for httpx, over sockets that note when bytes arrive.

httpx's own transport hands bytes on after all of its work on them and on those of the streams before them: of 64 that
get a token at the same moment the median one hears of it 5 ms late, a bare socket 1 ms. And for each request its pool
looks at all pairs of idle connections, which takes seconds with 200. Here the time is taken where the event loop reads
the socket, and a request costs the same however many there are. HTTP itself is h11's, as it is there.
"""

from __future__ import annotations

import asyncio
import select
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import h11
import httpx

IDLE = 2.0
"""Seconds that an unused connection is kept. Servers drop theirs after 5, and a request that meets that moment is lost:
it may have been read, so it cannot be sent again."""
READ = 1 << 16
"""Bytes at a time."""


class Wire(httpx.AsyncBaseTransport):
    """A transport to one server, without proxies and without a limit on connections, which would queue requests. Only
    connecting has a timeout: whoever reads limits the time by itself."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._open: set[Connection] = set()
        self._idle: deque[Connection] = deque()
        """The one used last is last."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send it; the body of the response is yet to be read. Its ``extensions["connection"]`` is a `Connection`."""
        connection = self._free() or await self._connect(request.extensions["timeout"]["connect"])
        try:
            head = await connection.send(request)
        except BaseException:
            self._drop(connection)
            raise
        body, headers = _Body(self, connection), list(head.headers.raw_items())
        return httpx.Response(head.status_code, headers=headers, stream=body, extensions={"connection": connection})

    async def aclose(self) -> None:
        """Close all connections; who still listens to one gets an error."""
        for connection in list(self._open):
            self._drop(connection)
        self._idle.clear()

    def release(self, connection: Connection) -> None:
        """Keep a connection whose answer was read to its end, or close it."""
        if connection in self._open and connection.renew():
            self._idle.append(connection)
        else:
            self._drop(connection)

    def _free(self) -> Connection | None:
        while self._idle and self._idle[0].stale:
            self._drop(self._idle.popleft())
        while self._idle:
            connection = self._idle.pop()
            if not connection.stale:
                return connection
            self._drop(connection)
        return None

    async def _connect(self, timeout: float | None) -> Connection:
        loop = asyncio.get_running_loop()
        reader = _Reader(loop=loop)
        try:
            async with asyncio.timeout(timeout):
                transport, protocol = await loop.create_connection(
                    lambda: asyncio.StreamReaderProtocol(reader, loop=loop), self._host, self._port
                )
        except TimeoutError as error:
            raise httpx.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        connection = Connection(reader, asyncio.StreamWriter(transport, protocol, reader, loop))
        self._open.add(connection)
        return connection

    def _drop(self, connection: Connection) -> None:
        self._open.discard(connection)
        connection.close()


class Connection:
    """One socket, and how far the HTTP on it is."""

    arrived = 0.0
    """When the bytes that were read last came, ``time.perf_counter()``."""

    def __init__(self, reader: _Reader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.CLIENT)
        self._since = 0.0

    @property
    def stale(self) -> bool:
        """Whether it was idle for too long, the server closed it, or sent what nobody asked for. The socket is asked,
        too: the event loop may not have come to it yet."""
        gone = self._reader.at_eof() or self._reader.exception() is not None or self._reader.unread
        return bool(gone) or time.monotonic() > self._since + IDLE or self._readable()

    async def send(self, request: httpx.Request) -> h11.Response:
        """All of it; the head of the answer."""
        assert isinstance(request.stream, httpx.AsyncByteStream)
        body = b"".join([part async for part in request.stream])
        try:
            head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
            data = [self._http.send(event) or b"" for event in (head, h11.Data(data=body), h11.EndOfMessage())]
            self._writer.write(b"".join(data))
            await self._writer.drain()
        except h11.LocalProtocolError as error:
            raise httpx.LocalProtocolError(str(error)) from error
        except OSError as error:
            raise httpx.WriteError(str(error)) from error
        while not isinstance(event := await self._next(), h11.Response):
            pass  # 100 Continue
        return event

    async def body(self) -> AsyncIterator[bytes]:
        """What comes after the head, as the server cut it."""
        while isinstance(event := await self._next(), h11.Data):
            yield bytes(event.data)

    def renew(self) -> bool:
        """Make ready for another request. False where the last one is not over, the server wants no other, or sent more
        than its answer: that would be taken for the next one."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        if self._http.trailing_data[0] or self._reader.unread:
            return False
        self._http.start_next_cycle()
        self._since = time.monotonic()
        return True

    def close(self) -> None:
        """At once: what was not sent yet is not worth waiting for."""
        self._writer.transport.abort()

    def _readable(self) -> bool:
        at = self._writer.get_extra_info("socket")
        if not hasattr(select, "poll"):  # Windows
            return bool(select.select([at], [], [], 0)[0])
        look = select.poll()
        look.register(at, select.POLLIN)
        return bool(look.poll(0))

    async def _next(self) -> Any:
        while True:
            try:
                event = self._http.next_event()
                if event is not h11.NEED_DATA:
                    return event
                data = await self._reader.read(READ)
            except h11.RemoteProtocolError as error:
                raise httpx.RemoteProtocolError(str(error)) from error
            except OSError as error:
                raise httpx.ReadError(str(error)) from error
            if not data and self._http.their_state is h11.SEND_RESPONSE:
                raise httpx.RemoteProtocolError("the server closed it without an answer")
            self.arrived = self._reader.arrived
            self._reader.unread -= len(data)
            self._http.receive_data(data)


class _Reader(asyncio.StreamReader):
    arrived = 0.0
    unread = 0
    """Bytes."""

    def feed_data(self, data: Any) -> None:
        self.arrived = time.perf_counter()
        self.unread += len(data)
        super().feed_data(data)


class _Body(httpx.AsyncByteStream):
    def __init__(self, wire: Wire, connection: Connection) -> None:
        self._wire, self._connection = wire, connection

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._connection.body()

    async def aclose(self) -> None:
        self._wire.release(self._connection)
