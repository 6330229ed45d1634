"""What a server says while it answers: its events, and the reply they add up to."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from kvsuite import disk
from kvsuite.engines.request import Reply
from kvsuite.errors import sentence

LONGEST = 300
"""Characters of a server's message that are kept."""
LARGEST = 1 << 24
"""Bytes of one event, and of an answer that is no stream; characters and token ids of an answer."""
MOST = 1 << 53
"""What is no count of tokens and no token's id any more."""


class Failure(Exception):
    """Why there is no answer, in one sentence. ``again``: nothing was done yet, so asking once more does no harm;
    ``after`` is how many seconds the server asked to wait with it."""

    def __init__(self, text: str, status: int = 0, again: bool = False, after: float | None = None) -> None:
        super().__init__(sentence(text))
        self.status, self.again, self.after = status, again, after


class Events:
    """The payloads of server-sent events, from bytes cut anywhere. Lines end with LF or CRLF. An event whose empty line
    never comes is none: it may be half."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        """Of a line whose end has not come."""
        self._data: list[bytes] = []
        """Of an event whose end has not come."""
        self._size = 0
        """Bytes of both."""

    def feed(self, chunk: bytes) -> list[bytes]:
        """What these bytes complete. Comments, and fields other than data, are dropped. Raises Failure where an event
        has more than `LARGEST` bytes."""
        *lines, rest = chunk.split(b"\n")
        if lines:
            lines[0] = b"".join([*self._rest, lines[0]])
            self._rest = []
        self._rest.append(rest)
        self._size += len(chunk)
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line:
                events.append(b"\n".join(self._data))
                self._data, self._size = [], len(rest)
        if self._size > LARGEST:
            raise Failure(f"the server sent an event of more than {LARGEST:,} bytes")
        return [event for event in events if event]


class StreamParser:
    """One reply while it comes in."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.done = False
        """Whether [DONE] came."""
        self.end = 0.0
        """When the last event arrived."""
        self.tokens: int | None = None
        """As the server counts them, where it does."""
        self.chunks = 0
        """That brought something."""
        self._last = 0.0
        self._size = 0
        """Of all that is kept."""
        self._parts: tuple[list[str], list[str], list[str]] = ([], [], [])

    @property
    def whole(self) -> bool:
        """Whether the server said that this is all."""
        return self.done or bool(self.reply.finish)

    def hear(self, data: bytes, at: float) -> bool:
        """Take in one event that arrived at ``at``, ``time.perf_counter()``; whether it brought something or ended all.
        Raises Failure for one that reports an error, for one that cannot be read, and where the answer has more than
        `LARGEST` characters or token ids."""
        self.end = at
        if data.strip() == b"[DONE]":
            self.done = True
            return True
        try:
            event = disk.parsed(data)
            if event.get("error") or event.get("object") == "error":
                raise Failure(f"the server reported: {error_message(event)}")
            choice = (event.get("choices") or [{}])[0]
            pieces = _pieces(choice.get("delta") or {})
            self._use(event.get("usage") or {})
            prompt_ids, ids = _ids(event.get("prompt_token_ids")), _ids(choice.get("token_ids"))
            finish = choice.get("finish_reason") or ""
            if not isinstance(finish, str):
                raise TypeError("this is no reason")
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise Failure(
                f"the server sent what is no part of an answer: {error_message(data.decode(errors='replace'))}"
            ) from error
        self._size += sum(map(len, (*pieces, prompt_ids, ids)))
        if self._size > LARGEST:
            raise Failure(f"the server sent an answer of more than {LARGEST:,} characters")
        self.reply.prompt_ids += prompt_ids
        self.reply.ids += ids
        self.reply.finish = finish or self.reply.finish
        if not any(pieces):
            return False
        if self.chunks:
            self.reply.gaps.append(at - self._last)
        else:
            self.reply.ttft = at - self.reply.start
        self._last = at
        self.chunks += 1
        for part, piece in zip(self._parts, pieces, strict=True):
            part.append(piece)
        return True

    def close(self) -> str:
        """Put the reply's texts together. Returns all of them, in their order, for who counts tokens."""
        reply = self.reply
        reply.reasoning, reply.text, reply.tool_calls = (_join(part) for part in self._parts)
        return reply.reasoning + reply.text + reply.tool_calls

    def _use(self, usage: Mapping[str, Any]) -> None:
        reply, details = self.reply, usage.get("prompt_tokens_details") or {}
        self.tokens = _number(usage.get("completion_tokens"), self.tokens)
        reply.prompt_tokens = _number(usage.get("prompt_tokens"), reply.prompt_tokens)
        reply.cached_tokens = _number(details.get("cached_tokens"), reply.cached_tokens)


def error_message(answer: Any) -> str:
    """The message in what a server answered, whatever it is wrapped in, on one line and not too long."""
    if isinstance(answer, str):
        with contextlib.suppress(ValueError):
            answer = disk.parsed(answer)
    while isinstance(answer, dict):
        answer = next((answer[name] for name in ("error", "message", "detail") if answer.get(name)), str(answer))
    line = " ".join(str(answer).split())
    return line if len(line) <= LONGEST else line[:LONGEST] + "…"


def _pieces(delta: Mapping[str, Any]) -> tuple[str, str, str]:
    """Reasoning, text and tool calls. Raises TypeError for what is no text. Some servers send reasoning under both of
    its names at once."""
    calls = ""
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        calls += (function.get("name") or "") + (function.get("arguments") or "")
    thought = delta.get("reasoning_content") or delta.get("reasoning") or ""
    return thought + "", (delta.get("content") or "") + "", calls


def _number(found: Any, before: int | None) -> int | None:
    return found if type(found) is int and 0 <= found < MOST else before


def _ids(found: Any) -> list[int]:
    """Token ids. Raises TypeError for what are none."""
    ids = [] if found is None else found
    if type(ids) is not list or not all(type(token) is int and 0 <= token < MOST for token in ids):
        raise TypeError("these are no token ids")
    return ids


def _join(parts: Sequence[str]) -> str:
    """A character that JSON writes as two escapes can be cut between them: only together they are one."""
    text = "".join(parts)
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
