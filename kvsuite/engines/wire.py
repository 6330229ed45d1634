"""Plain HTTP/1.1 to one server for httpx, over sockets that note when bytes arrive.

httpx's own transport hands bytes on after all of its work on them and on those of the streams before them: of 64 that
get a token at the same moment the median one hears of it 5 ms late, a bare socket 1 ms. Here the time is taken where
the event loop reads the socket. HTTP itself is h11's, as it is there.

Each request has a connection of its own. HTTP/1.1 does not number answers: what a server sends late on a connection
that was used before is read as the answer to the next request, and a request that meets the moment at which the server
closes an idle connection is lost.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import h11
import httpx

READ = 1 << 16
"""Bytes at a time."""


class Wire(httpx.AsyncBaseTransport):
    """A transport to one server, without proxies and without a limit on connections, which would queue requests. Only
    connecting has a timeout: whoever reads limits the time by itself."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._open: set[Connection] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send it; the body of the response is yet to be read. Its ``extensions["connection"]`` is a `Connection`."""
        connection = await self._connect(request.extensions["timeout"]["connect"])
        try:
            head = await connection.send(request)
        except BaseException:
            self.drop(connection)
            raise
        body, headers = _Body(self, connection), list(head.headers.raw_items())
        return httpx.Response(head.status_code, headers=headers, stream=body, extensions={"connection": connection})

    async def aclose(self) -> None:
        """Close all connections; who still listens to one gets an error."""
        for connection in list(self._open):
            self.drop(connection)

    def drop(self, connection: Connection) -> None:
        """Close a connection whose answer was read, or shall not be."""
        self._open.discard(connection)
        connection.close()

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


class Connection:
    """One socket, and how far the HTTP on it is."""

    arrived = 0.0
    """When the bytes that were read last came, ``time.perf_counter()``."""
    sent = 0.0
    """When the request was written, after connecting."""

    def __init__(self, reader: _Reader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = h11.Connection(h11.CLIENT)

    async def send(self, request: httpx.Request) -> h11.Response:
        """All of it; the head of the answer."""
        assert isinstance(request.stream, httpx.AsyncByteStream)
        body = b"".join([part async for part in request.stream])
        try:
            head = h11.Request(method=request.method, target=request.url.raw_path, headers=request.headers.raw)
            data = [self._http.send(event) or b"" for event in (head, h11.Data(data=body), h11.EndOfMessage())]
            self.sent = time.perf_counter()
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

    def close(self) -> None:
        """At once: what was not sent yet is not worth waiting for."""
        self._writer.transport.abort()

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
            self._http.receive_data(data)


class _Reader(asyncio.StreamReader):
    arrived = 0.0

    def feed_data(self, data: Any) -> None:
        self.arrived = time.perf_counter()
        super().feed_data(data)


class _Body(httpx.AsyncByteStream):
    def __init__(self, wire: Wire, connection: Connection) -> None:
        self._wire, self._connection = wire, connection

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._connection.body()

    async def aclose(self) -> None:
        self._wire.drop(self._connection)
