"""What is asked, and when: arrivals, traces of real traffic, and ShareGPT's prompts.

A trace has one JSON object a line: ``messages`` as in OpenAI's chat completions, and if wanted ``id``, ``at`` (seconds
from the trace's start), ``conversation``, ``tools``, ``max_tokens``, ``temperature`` and ``seed``. The lines of one
conversation are asked in order. Their history is what the trace says, never what the model answered, so that every arm
is asked the same.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

from kvsuite import disk
from kvsuite.engines.request import Ask
from kvsuite.errors import UsageError, unknown
from kvsuite.readers.base import load_json

Kind = Literal["closed", "constant", "poisson", "bursts", "trace"]
FORMS: dict[str, str] = {
    "closed": "closed:8, always 8 in flight",
    "constant": "constant:2, evenly 2 a second",
    "poisson": "poisson:2.5, independently of each other, 2.5 a second on average",
    "bursts": "bursts:8@0.5, 8 at once, and that 0.5 times a second",
    "trace": "trace, at the times a trace says",
}


@dataclass(frozen=True)
class Turn(Ask):
    """A request with its place in a workload."""

    at: float | None = None
    """Seconds from the start before which it is not asked."""
    conversation: str = ""
    """Requests of one conversation wait for each other; without a name it is alone."""


@dataclass(frozen=True)
class Arrivals:
    """When requests are sent: ``concurrency`` always in flight (closed loop), or at times that do not ask what is still
    in flight (open loop). Raises UsageError for a rate that is not over 0, a burst or a concurrency below 1."""

    kind: Kind
    rate: float = 1.0
    """Arrivals per second: of requests, or of whole bursts."""
    burst: int = 1
    """Requests that arrive at once."""
    concurrency: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise unknown("kind of arrivals", self.kind, get_args(Kind))
        if not 0 < self.rate < math.inf:
            raise UsageError(f"requests cannot arrive at a rate of {self.rate:g} a second: it must be over 0")
        if min(self.burst, self.concurrency) < 1:
            raise UsageError(f"{min(self.burst, self.concurrency)} requests at once are none: it must be 1 at least")

    @classmethod
    def parse(cls, text: str) -> Arrivals:
        """From ``closed:8``, ``constant:2``, ``poisson:2.5``, ``bursts:8@0.5`` or ``trace``. Raises UsageError."""
        kind, _, value = text.partition(":")
        if kind not in FORMS:
            raise unknown("kind of arrivals", kind, FORMS)
        try:
            match kind:
                case "closed":
                    return cls("closed", concurrency=_parsed(int, value))
                case "constant" | "poisson":
                    return cls(kind, rate=_parsed(float, value))
                case "bursts":
                    burst, _, rate = value.partition("@")
                    return cls("bursts", burst=_parsed(int, burst), rate=_parsed(float, rate))
            if text != "trace":
                raise UsageError("it takes no number")
        except UsageError as error:
            raise UsageError(f"arrivals {text!r} are not of the form {FORMS[kind]}: {error}") from None
        return cls("trace")

    def __str__(self) -> str:
        """What ``parse`` reads."""
        rate = repr(float(self.rate)).removesuffix(".0")
        values = {"closed": f":{self.concurrency}", "bursts": f":{self.burst}@{rate}", "trace": ""}
        return self.kind + values.get(self.kind, f":{rate}")

    def times(self, n: int, seed: int) -> list[float] | None:
        """Seconds from the start of ``n`` arrivals, ascending; None for a closed loop, and for a trace, which has its
        own. The same seed gives the same times in every arm; at twice the rate, the same in half the time."""
        if self.kind in ("closed", "trace"):
            return None
        if self.kind == "poisson":
            rng = random.Random(f"arrivals {seed}")
            return list(accumulate(rng.expovariate(self.rate) for _ in range(n)))
        return [at // self.burst / self.rate for at in range(n)]


def _parsed(kind: Callable[[str], Any], text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"{text!r} is not a {'whole number' if kind is int else 'number'}") from None


def conversations(asks: Sequence[Ask]) -> list[list[int]]:
    """The places in ``asks`` of every conversation's requests, in the order in which conversations begin."""
    found: dict[str | int, list[int]] = {}
    for place, ask in enumerate(asks):
        name = ask.conversation if isinstance(ask, Turn) else ""
        found.setdefault(name or place, []).append(place)
    return list(found.values())


def schedule(asks: Sequence[Ask], arrivals: Arrivals, seed: int = 0) -> list[float]:
    """Seconds from the start before which each request is not sent.

    In an open loop it is conversations that arrive; between their requests the trace's pauses stay. A closed loop knows
    no times and is all zeros: waiting would leave fewer in flight. Raises UsageError if a trace's times are wanted that
    the requests do not have.
    """
    due = [0.0] * len(asks)
    if arrivals.kind == "closed":
        return due
    talks = conversations(asks)
    starts = arrivals.times(len(talks), seed) or [_at(asks[places[0]]) for places in talks]
    for start, places in zip(starts, talks, strict=True):
        begun = _at(asks[places[0]], 0.0)
        for place in places:
            due[place] = start + (_at(asks[place], begun) - begun)
    return due


def _at(ask: Ask, otherwise: float | None = None) -> float:
    at = ask.at if isinstance(ask, Turn) and ask.at is not None else otherwise
    if at is None:
        raise UsageError(f"request {ask.id} has no time 'at', so it cannot be sent at the times of a trace")
    return at


def read(path: str | Path) -> list[Turn]:
    """The requests of a trace, in the order of its lines; those without an id are called ``line-7``. Raises UsageError
    with file and line for what is cut off, unknown, of the wrong kind, out of order or there twice."""
    turns: list[Turn] = []
    ids: set[str] = set()
    begun: dict[str, float] = {}
    for number, line in disk.lines(Path(path)):
        try:
            turn = _turn(number, disk.parsed(line))
            if turn.id in ids:
                raise UsageError(f"the id {turn.id!r} is there twice")
            if turn.at is not None and turn.conversation:
                if turn.at < begun.get(turn.conversation, 0.0):
                    raise UsageError(f"conversation {turn.conversation!r} goes back in time to {turn.at:g} s")
                begun[turn.conversation] = turn.at
        except UsageError as error:
            raise UsageError(f"{path}, line {number}: {error}") from None
        except ValueError as error:
            raise UsageError(f"{path}, line {number} cannot be read as JSON; is it cut off? {error}") from None
        ids.add(turn.id)
        turns.append(turn)
    if not turns:
        raise UsageError(f"{path} holds no requests")
    return turns


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return (_whole(value) or isinstance(value, float)) and abs(value) < MOST


MOST = 1e12
"""Seconds, or degrees, that no one means."""
FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "id": ("a text or a whole number", lambda x: _whole(x) or (isinstance(x, str) and bool(x))),
    "conversation": ("a text or a whole number", lambda x: _whole(x) or (isinstance(x, str) and bool(x))),
    "at": ("seconds from 0", lambda x: _number(x) and x >= 0),
    "messages": ("a list of messages with a role and a content or tool_calls", lambda x: bool(x) and _messages(x)),
    "tools": ("a list of objects", lambda x: isinstance(x, list) and all(isinstance(tool, dict) for tool in x)),
    "max_tokens": ("a whole number from 1", lambda x: _whole(x) and x >= 1),
    "temperature": ("a number from 0", lambda x: _number(x) and x >= 0),
    "seed": ("a whole number", _whole),
}
"""What a line of a trace may have, and what it must be."""


def _turn(number: int, row: Any) -> Turn:
    if not isinstance(row, dict):
        raise UsageError("this is not a JSON object")
    found = {name: value for name, value in row.items() if value is not None}
    for name, value in found.items():
        if name not in FIELDS:
            raise unknown("field", name, FIELDS)
        what, right = FIELDS[name]
        if not right(value):
            raise UsageError(f"{name} must be {what}, not {json.dumps(value)[:60]}")
    if "messages" not in found:
        raise UsageError("it has no messages")
    return Turn(
        id=str(found.get("id", f"line-{number}")),
        messages=tuple(found["messages"]),
        max_tokens=found.get("max_tokens"),
        temperature=float(found.get("temperature", 0.0)),
        seed=found.get("seed"),
        tools=tuple(found.get("tools", ())),
        at=float(found["at"]) if "at" in found else None,
        conversation=str(found.get("conversation", "")),
        cluster=str(found.get("conversation", "")),
    )


def _messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and message.keys() & {"content", "tool_calls"}
        for message in value
    )


SHAREGPT = 1 << 30
"""Bytes: the file that is published has 673 million."""
SHORTEST, LONGEST_PROMPT, LONGEST = 4, 1024, 2048
"""Tokens: of a prompt and of an answer at least, of a prompt at most, of both together at most."""


def sharegpt(
    path: str | Path, n: int, seed: int, tokens: Callable[[str], int], max_tokens: int | None = None
) -> list[Ask]:
    """``n`` prompts of ShareGPT's JSON by vLLM's rule: conversations of two turns or more, shuffled by the seed; the
    first turn is the prompt, whoever spoke, and the second its answer, if their lengths are within the bounds above.

    ``tokens`` counts a text as the model's tokenizer does by itself, special tokens included; then the same seed gives
    vLLM's prompts. Their ids are places in the file. The recorded answer only decides whether its prompt is taken: ours
    end by themselves or at ``max_tokens``. Where there are too few, vLLM repeats prompts, which then are in its prefix
    cache; here that is a UsageError, as is a file of something else.
    github.com/vllm-project/vllm, vllm/benchmarks/datasets/datasets.py: ShareGPTDataset, is_valid_sequence (003cf029).
    """
    found: list[Ask] = []
    for place, prompt, answer in _shuffled(Path(path), seed):
        if len(found) == n:
            break
        asked, answered = tokens(prompt), tokens(answer)
        if min(asked, answered) >= SHORTEST and asked <= LONGEST_PROMPT and asked + answered <= LONGEST:
            found.append(Ask(f"sharegpt-{place}", ({"role": "user", "content": prompt},), max_tokens))
    if len(found) < n:
        raise UsageError(f"{path} holds {len(found)} prompts of the right length, not {n}")
    return found


def _shuffled(path: Path, seed: int) -> Iterator[tuple[int, str, str]]:
    """Place, first turn and second turn of the conversations that have two."""
    rows = load_json(path, SHAREGPT)
    listed = isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
    if not listed or not all(isinstance(row.get("conversations", []), list) for row in rows):
        raise UsageError(f"{path} is not a list of ShareGPT's conversations")
    long = [(place, row["conversations"]) for place, row in enumerate(rows) if len(row.get("conversations", ())) >= 2]
    random.Random(seed).shuffle(long)  # the same order as vLLM's, which shuffles such a list by such a seed
    for place, turns in long:
        try:
            first, second = (turn["value"] for turn in turns[:2])
        except (TypeError, KeyError):
            first = second = None
        if not isinstance(first, str) or not isinstance(second, str):
            raise UsageError(f"{path}: conversation {place} has a turn without a text 'value'")
        yield place, first, second
