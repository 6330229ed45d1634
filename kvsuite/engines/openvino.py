"""openvino: OpenVINO GenAI's continuous batching on this machine's CPU, asked like a server.

It runs in a process of its own (openvino_worker.py): ``step()`` holds Python's lock for as long as it computes, up to
seconds, and requests could be neither sent nor timed meanwhile. What that process stamps is comparable, since both
read one clock. A crash costs the engine, not the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import multiprocessing
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvsuite.engines.openvino_model import RECENT, START
from kvsuite.engines.openvino_worker import serve
from kvsuite.engines.request import Ask, Reply
from kvsuite.errors import UsageError, unknown

BLOCK = 32
"""Tokens in a block of the CPU's cache; what is evicted or skipped are blocks."""
WORDS = {
    "keys": ("by-channel", "by-token"),
    "compute": ("bf16", "f16", "f32"),
    "scores": ("norm-sum", "sum"),
    "anchor": ("alternating", "mean", "ones", "random", "zeros"),
    "sparse": ("trishape", "xattention"),
    "prefix": ("on", "off"),
}
NUMBERS = {
    "group": 1, "eviction": BLOCK, "start": BLOCK, "recent": BLOCK, "window": 0, "crush": 1, "sparse_start": BLOCK,
    "sparse_recent": BLOCK, "cache": 1, "blocks": 8, "batched_tokens": BLOCK, "threads": 1,
}  # fmt: skip
"""The least value; those of 32 have to be multiples of it."""
NEEDS = {
    "keys": "kv", "group": "kv", "start": "eviction", "recent": "eviction", "scores": "eviction", "window": "eviction",
    "crush": "eviction", "anchor": "crush", "sparse_start": "sparse", "sparse_recent": "sparse", "threshold": "sparse",
}  # fmt: skip
PRECISIONS = ("f16", "f32", "u4", "u8")


def parse(text: str) -> dict[str, str]:
    """What stands behind ``openvino:``, checked: ``NAME=VALUE`` pairs with commas. Raises UsageError.

    * ``kv``: f16, f32 (with compute=f32), u8, u4, or KEYS/VALUES such as u8/u4. Left out, OpenVINO stores u8.
      ``keys``: by-channel or by-token, how keys are quantized; ``group``: numbers that share a scale (values, and keys
      by token). ``compute``: bf16, f16, f32.
    * ``eviction``: tokens a sequence may keep once its prompt is in; of these ``start`` (32) first and ``recent`` (128)
      last ones always stay. ``scores``: sum or norm-sum (sum; GenAI's own default, norm-sum, fails at some short
      prompts) of the attention from the prompt's last ``window`` tokens (8; 0: all) and from the answer. ``crush``:
      blocks that KVCrush keeps beyond those, if so many are evicted at once, by likeness to its ``anchor`` (random).
    * ``sparse``: trishape (a prompt sees its ``sparse_start`` first and ``sparse_recent`` last tokens only) or
      xattention (``threshold``, a share).
    * ``cache``: GB of KV cache (1; OpenVINO gives u4 half of it), or ``blocks`` of 32 tokens. ``prefix``: on or off
      (off). ``batched_tokens``: most tokens in one step (256). ``threads``: of the CPU.
    """
    found: dict[str, str] = {}
    for pair in filter(None, (p.strip() for p in text.split(","))):
        name, _, value = (piece.strip() for piece in pair.partition("="))
        if name in found:
            raise UsageError(f"openvino: {name} is given twice")
        found[name] = value
    check(found)
    return found


def check(options: Mapping[str, str]) -> None:
    """Refuse what OpenVINO does not know, would ignore without a word, or takes only to fail at the first request.
    Raises UsageError."""
    for name, value in options.items():
        if name not in {"kv", "threshold", *WORDS, *NUMBERS}:
            raise unknown("option of openvino", name, ["kv", "threshold", *WORDS, *NUMBERS])
        if name in WORDS and value not in WORDS[name]:
            raise unknown(f"value of openvino's {name}", value, WORDS[name])
        if name in NUMBERS:
            _number(name, value)
        if name in NEEDS and NEEDS[name] not in options:
            raise UsageError(f"openvino: {name}={value} acts only together with {NEEDS[name]}=")
    for precision in options.get("kv", "u8").split("/", 1):
        if precision not in PRECISIONS:
            raise unknown("value of openvino's kv", precision, PRECISIONS)
    if "/" in options.get("kv", "") and "f" in options["kv"]:
        raise UsageError(f"openvino: kv={options['kv']}: of keys and values, both are quantized or neither is")
    if not {"keys", "group"}.isdisjoint(options) and options["kv"].startswith("f"):
        raise UsageError(f"openvino: keys and group are for quantized caches, not for kv={options['kv']}")
    if "cache" in options and "blocks" in options:
        raise UsageError("openvino: cache= and blocks= both give the size of the cache; one can be used")
    _check_shares(options)


def _check_shares(options: Mapping[str, str]) -> None:
    kept = {name: int(options.get(name, usual)) for name, usual in (("start", START), ("recent", RECENT))}
    if "eviction" in options and int(options["eviction"]) <= sum(kept.values()):
        said = f"eviction={options['eviction']} leaves nothing to choose beside start={kept['start']}"
        raise UsageError(f"openvino: {said} and recent={kept['recent']} tokens, which always stay")
    mode = options.get("sparse")
    for name, own in (("sparse_start", "trishape"), ("sparse_recent", "trishape"), ("threshold", "xattention")):
        if name in options and mode != own:
            raise UsageError(f"openvino: {name} is for sparse={own}")
    with contextlib.suppress(ValueError):
        if 0 < float(options.get("threshold", 0.5)) <= 1:
            return
    raise UsageError(f"openvino: threshold is a share over 0 and up to 1, not {options['threshold']!r}")


def _number(name: str, value: str) -> None:
    least = NUMBERS[name]
    if not value.isdecimal() or int(value) < least:
        raise UsageError(f"openvino: {name} is a whole number from {least}, not {value!r}")
    if least == BLOCK and int(value) % BLOCK:
        raise UsageError(f"openvino: {name} is a multiple of {BLOCK}, the tokens of a block, not {value}")


class OpenVino:
    """A Backend. ``model``: a GGUF file or a folder in OpenVINO's format. ``options``: as `parse` gives them.
    ``startup``: seconds it may take to load."""

    def __init__(self, model: Path, options: Mapping[str, str], startup: float = 600.0) -> None:
        check(options)
        self.model, self.options, self.startup = model, dict(options), startup
        self._facts: dict[str, Any] = {}
        self._dead = "it was not started"
        self._numbers = itertools.count()
        self._waiting: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[Reply]]] = {}
        self._process: Any = None
        self._thread: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        """Whether it answers: started, and neither stopped nor failed since."""
        return not self._dead

    def start(self) -> None:
        """Load the model and answer one request to see what runs; seconds. Raises UsageError where that fails."""
        if importlib.util.find_spec("openvino_genai") is None:
            raise UsageError("openvino is not there: pip install openvino-genai")
        if not self.model.exists():
            raise UsageError(f"openvino: the model {str(self.model)!r} does not exist")
        self.stop()
        context = multiprocessing.get_context("spawn")
        self._asks, (self._replies, answers) = context.Queue(), context.Pipe(duplex=False)
        work = (str(self.model), self.options, self._asks, answers)
        self._process = context.Process(target=serve, args=work, name="openvino", daemon=True)
        self._process.start()
        answers.close()  # the only other end is the worker's: its death is the pipe's end
        try:
            if self._replies.poll(self.startup):
                kind, said = self._replies.recv()
            else:
                kind, said = "failed", f"it took over {self.startup:g} s"
        except EOFError:
            self._process.join()
            kind, said = "failed", f"it ended with code {self._process.exitcode}"
        except BaseException:
            self.stop()
            raise
        if kind == "failed":
            self.stop()
            raise UsageError(f"openvino with {self._named()} cannot run {self.model.name}: {said}")
        self._facts, self._dead = said, ""
        self._thread = threading.Thread(target=self._read, name="openvino replies", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the process, which frees its memory; who still waits is told. Twice does no harm."""
        if self._process is None:
            return
        self._dead = self._dead or "it was stopped"
        self._process.kill()  # nothing of it has to be kept, and a step cannot be interrupted
        if self._thread is not None:
            self._thread.join()
        self._process.join()
        self._asks.close()
        self._asks.cancel_join_thread()
        self._replies.close()
        self._process = self._thread = None

    def facts(self) -> dict[str, Any]:
        """What runs, as the engine reports it, in the words of the servers' profiles; tokens, bytes. ``compressed`` is
        about what is stored and read, whatever the options say. ``proof`` is there once eviction was seen."""
        return dict(self._facts)

    def counters(self) -> dict[str, float]:
        """``preemptions`` since it was started, which GenAI does not count itself: how often an answer that had begun
        got no token in a step. Its scheduler gives each one before it reads any prompt, unless the cache is full and
        blocks are taken from the youngest, or are computed again (scheduler.hpp of openvino.genai at da1db864). One
        that loses its place before its first token is not seen."""
        return {"preemptions": float(self._facts.get("preemptions", 0))}

    async def ask(self, ask: Ask) -> Reply:
        """The whole answer. Seconds are wall time; they begin here and end when the engine has the token."""
        start, number = time.perf_counter(), next(self._numbers)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reply] = loop.create_future()
        try:
            message = json.dumps((number, dataclasses.asdict(ask), start))
        except (TypeError, ValueError) as error:
            return Reply(ask.id, start=start, error=f"the request cannot be sent: {error}")
        self._waiting[number] = loop, future
        if self._dead:  # after the entry was made, so that either this or `_read` sees it
            self._waiting.pop(number, None)
            return Reply(ask.id, start=start, error=f"openvino: {self._dead}")
        self._put(message)
        try:
            reply = await future
        except asyncio.CancelledError:
            if self._waiting.pop(number, None):
                self._put(json.dumps((number, None, 0.0)))
            raise
        reply.id, reply.start = ask.id, start
        reply.seconds = reply.seconds or time.perf_counter() - start
        return reply

    def _put(self, message: str) -> None:
        with contextlib.suppress(ValueError):  # stopped meanwhile: `_read` tells who waits
            self._asks.put(message)

    def _read(self) -> None:
        """Until the worker is gone: give every reply to the loop that waits for it."""
        process = self._process
        try:
            while True:
                number, body, seen = self._replies.recv()
                if number is None:
                    self._dead = self._dead or body
                    break
                self._facts |= seen
                self._give(number, body)
        except (EOFError, OSError):
            process.join()
            self._dead = self._dead or f"its process ended with code {process.exitcode}"
        for number in list(self._waiting):
            self._give(number, Reply("", error=f"openvino: {self._dead}"))

    def _give(self, number: int, reply: Reply) -> None:
        loop, future = self._waiting.pop(number, (None, None))
        if loop is not None and future is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(_settle, future, reply)

    def _named(self) -> str:
        return ",".join(f"{k}={v}" for k, v in self.options.items()) or "no options"


def _settle(future: asyncio.Future[Reply], reply: Reply) -> None:
    if not future.done():  # it is where the asking task was cancelled
        future.set_result(reply)
