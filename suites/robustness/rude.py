"""A server that answers chat requests in every way it should not: ``python -m suites.robustness.rude [PACE]`` serves on
a free port of 127.0.0.1 and prints its URL. The last message of a request is ``KIND NUMBER``; an answer's words carry
the number. ``/asked`` counts the requests that were read by their number."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import resource
import socket
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from kvsuite.engines.stream import LARGEST

WORDS = 20
"""Of an answer."""
PACE = 1.0
"""Seconds between two of them."""
HTTP = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream%s\r\n"
HEAD = HTTP % b"" + b"Transfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"
RESET, CLOSE, HALF, HOLD = object(), object(), object(), object()
"""Ends of a connection: a reset, a close that no header announced, one of the sending half alone, none from here."""

Step = bytes | float | object
Kind = Callable[["Call"], Iterator[Step]]


def word(number: int, at: int) -> str:
    """One word of an answer, with a character that is one byte in Latin-1 and two in UTF-8."""
    return f" {number}·{at}"


def whole(number: int) -> str:
    """The right answer."""
    return "".join(word(number, at) for at in range(WORDS))


def chunk(data: bytes) -> bytes:
    """A chunk of HTTP."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(text: str, finish: str | None = None) -> bytes:
    """A part of an answer."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}, ensure_ascii=False).encode() + b"\n\n"


@dataclass
class Call:
    """One request: its number, how often it came, and the seconds between two words."""

    number: int
    times: int
    pace: float
    dice: random.Random

    def events(self, words: int = WORDS) -> list[bytes]:
        """Of an answer, or of its beginning."""
        said = [event(word(self.number, at)) for at in range(words)]
        return [*said, event("", "stop"), DONE] if words == WORDS else said

    def spoken(self, words: int = WORDS, head: bytes = HEAD) -> Iterator[Step]:
        """These, one each ``pace``."""
        yield head
        for said in self.events(words):
            yield self.pace
            yield chunk(said)
        if words == WORDS:
            yield END

    def unasked(self) -> bytes:
        """A whole answer to a number below 0, which nobody asked for."""
        other = Call(-1 - self.number, 1, 0.0, self.dice)
        return b"".join(step for step in other.spoken() if isinstance(step, bytes))


Error = str | tuple[str, ...]
KINDS: dict[str, tuple[Error, Kind]] = {}
"""Name → how the error begins that an answer is to end with, empty where it is right; and its steps: bytes, seconds to
wait, an end of the connection."""
LIMITS = "no token within", "not finished within"
"""What ends an answer of any size where bytes come slowly."""


def kind(error: Error = "") -> Callable[[Kind], Kind]:
    def add(made: Kind) -> Kind:
        KINDS[made.__name__.replace("_", "-")] = (error, made)
        return made

    return add


@kind()
def normal(call: Call) -> Iterator[Step]:
    yield from call.spoken()


@kind()
def late(call: Call) -> Iterator[Step]:
    """Answers come out of the order of their requests."""
    yield call.dice.uniform(0, 10 * call.pace)
    yield from call.spoken()


@kind()
def cut_anywhere(call: Call) -> Iterator[Step]:
    """Events, characters and chunks are cut at any byte, and lines end with CR LF."""
    stream = HEAD + b"".join(chunk(said.replace(b"\n", b"\r\n")) for said in call.events()) + END
    while stream:
        size = call.dice.choice((1, 2, 3, 100, 300))
        yield stream[:size]
        yield call.pace / 4
        stream = stream[size:]


@kind()
def one_chunk(call: Call) -> Iterator[Step]:
    """Of a megabyte, most of it comments."""
    yield HEAD + chunk((b": " + b"x" * 50_000 + b"\n").join(call.events())) + END


@kind()
def comments(call: Call) -> Iterator[Step]:
    """Keep a connection alive."""
    for step in call.spoken():
        yield step
        if isinstance(step, float):
            yield chunk(b": keep-alive\n\n")


@kind()
def wrong_charset(call: Call) -> Iterator[Step]:
    """Events are UTF-8, whatever the header says."""
    yield from call.spoken(head=HEAD.replace(b"stream", b"stream; charset=iso-8859-1"))


@kind()
def says_packed(call: Call) -> Iterator[Step]:
    yield from call.spoken(head=HTTP % b"" + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n")


@kind()
def busy(call: Call) -> Iterator[Step]:
    """At first."""
    if call.times == 1:
        yield b"HTTP/1.1 503 X\r\nRetry-After: 0\r\nContent-Length: 4\r\n\r\nbusy"
    else:
        yield from call.spoken()


@kind()
def goes(call: Call) -> Iterator[Step]:
    """Without having said so: the connection looks as if another request could use it."""
    yield from call.spoken()
    yield CLOSE


@kind()
def says_more(call: Call) -> Iterator[Step]:
    """An answer that nobody asked for follows, to a number below 0."""
    *steps, end = call.spoken()
    yield from steps
    assert isinstance(end, bytes)
    yield end + call.unasked()


@kind()
def says_more_later(call: Call) -> Iterator[Step]:
    """The same, when another request may have been sent on that connection."""
    yield from call.spoken()
    yield 2 * call.pace
    yield call.unasked()


@kind("the stream ended before the answer did after 3 chunks")
def short_length(call: Call) -> Iterator[Step]:
    """What the header does not count follows, and begins as another answer would."""
    said = b"".join(call.events(3))
    yield HTTP % b"" + b"Content-Length: %d\r\n\r\n" % len(said) + said
    yield from Call(-1 - call.number, 1, 0.0, call.dice).spoken()


@kind("no token within")
def loris_head(call: Call) -> Iterator[Step]:
    """A byte at a time, and no end."""
    for at in range(15_000):
        yield (HEAD[:-2] + b"X-Long: " * 2000)[at : at + 1]
        yield call.pace


@kind("no token within")
def loris_body(call: Call) -> Iterator[Step]:
    yield HEAD
    while True:
        yield chunk(b"data: "[:1])
        yield call.pace


@kind("no token within")
def pings(call: Call) -> Iterator[Step]:
    yield from call.spoken(3)
    while True:
        yield chunk(b": keep-alive\n\n")
        yield call.pace


@kind("no token within")
def continues(call: Call) -> Iterator[Step]:
    while True:
        yield b"HTTP/1.1 100 Continue\r\n\r\n" * 10
        yield call.pace


@kind("no token within")
def silent(call: Call) -> Iterator[Step]:
    """Half open: the other side is gone and nobody said so."""
    yield HOLD


@kind("no token within")
def stops(call: Call) -> Iterator[Step]:
    yield from call.spoken(3)
    yield HOLD


@kind("the connection broke")
def reset(call: Call) -> Iterator[Step]:
    yield from call.spoken(call.dice.randrange(1, WORDS))
    yield RESET


@kind("the connection broke")
def reset_first(call: Call) -> Iterator[Step]:
    yield RESET


@kind("the connection broke")
def closes(call: Call) -> Iterator[Step]:
    yield from call.spoken(3)
    yield CLOSE


@kind("the connection broke")
def half_closes(call: Call) -> Iterator[Step]:
    """It sends no more, and reads on."""
    yield from call.spoken(3)
    yield HALF
    yield HOLD


@kind("the server sent what is no part of an answer")
def latin(call: Call) -> Iterator[Step]:
    """No UTF-8."""
    yield from call.spoken(2)
    yield chunk(event(word(call.number, 2)).decode().encode("latin-1"))
    yield HOLD


@kind("the server sent what is no part of an answer")
def half_json(call: Call) -> Iterator[Step]:
    yield from call.spoken(3)
    yield chunk(b'data: {"choices": [{"delta": {"content": "\n\n')
    yield HOLD


@kind("the stream ended before the answer did (it came packed: gzip)")
def packed(call: Call) -> Iterator[Step]:
    """Though nobody asked for that."""
    yield HEAD.replace(b"\r\n\r\n", b"\r\nContent-Encoding: gzip\r\n\r\n")
    yield chunk(gzip.compress(b"".join(call.events()))) + END


@kind("the stream ended before the answer did")
def packed_secretly(call: Call) -> Iterator[Step]:
    yield HEAD + chunk(gzip.compress(b"".join(call.events()))) + END


@kind("the server reported: it burns")
def error_event(call: Call) -> Iterator[Step]:
    yield from call.spoken(3)
    yield chunk(b'data: {"error": {"message": "it burns"}}\n\n') + END


@kind("the connection broke")
def junk(call: Call) -> Iterator[Step]:
    """No HTTP."""
    yield call.dice.randbytes(2000) + b"\r\n\r\n"
    yield HOLD


@kind("the connection broke")
def wrong_chunks(call: Call) -> Iterator[Step]:
    yield from call.spoken(3)
    yield b"-1\r\nwhat\r\n"
    yield HOLD


@kind("the connection broke")
def long_head(call: Call) -> Iterator[Step]:
    yield HEAD[:-2] + b"X-Long: " + b"x" * (1 << 20) + b"\r\n\r\n"
    yield HOLD


@kind("the connection broke")
def gigantic_chunk(call: Call) -> Iterator[Step]:
    """It ends before its size is there."""
    yield HEAD + b"7fffffffffffffff\r\n" + b"".join(call.events(3))
    yield CLOSE


@kind(("the server sent an event of more than", *LIMITS))
def gigantic_event(call: Call) -> Iterator[Step]:
    yield from call.spoken(3)
    yield chunk(b"data: ")
    yield from _much(b"x" * (1 << 16))


@kind(("the server sent an answer of more than", *LIMITS))
def endless(call: Call) -> Iterator[Step]:
    yield HEAD
    yield from _much(event(" x" * (1 << 15)))


def _much(data: bytes) -> Iterator[Step]:
    for _ in range(2 * LARGEST // len(data)):
        yield chunk(data)
        yield 0.0
    yield HOLD


class Rude:
    """The server; it listens until its process ends."""

    def __init__(self, pace: float) -> None:
        self.pace, self.asked, self.dice = pace, Counter[int](), random.Random(0)

    async def serve(self) -> None:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=1024)
        print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        gone = asyncio.create_task(self._requests(reader, writer))
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            await gone
        writer.close()

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = next((line for line in head.split("\r\n") if line.startswith("content-length:")), ":0")
            body = await reader.readexactly(int(length.partition(":")[2]))
            if head.startswith("get /asked"):
                said = json.dumps(self.asked).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(said), said))
                continue
            name, number = json.loads(body)["messages"][-1]["content"].split()
            self.asked[int(number)] += 1
            call = Call(int(number), self.asked[int(number)], self.pace, random.Random(int(number)))
            for step in KINDS[name][1](call):
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, bytes):
                    writer.write(step)
                    await writer.drain()
                elif step is HALF:
                    writer.write_eof()
                elif step is HOLD:
                    await reader.read()
                    return
                elif step is CLOSE:
                    return
                else:
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    writer.transport.abort()
                    return


def descriptors() -> int:
    """As many files as this process may open at most, from now on."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


if __name__ == "__main__":
    descriptors()
    asyncio.run(Rude(float(sys.argv[1]) if sys.argv[1:] else PACE).serve())
