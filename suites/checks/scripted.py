"""A server that answers by script, over real HTTP and nothing but asyncio: what clients have to bear with, and a whole
little "vLLM" for whoever starts servers.

``with Server() as server: server.url`` in this process, ``python -m suites.checks.scripted --port 8000`` in another.

The first word of the last message names a behaviour (``do_…`` of `Call`, or in a table), the next one may be its
argument; without a name the server's own behaviour holds. A normal answer is made of words that are chosen by a hash
of the messages: `answer` knows them, and mixed answers show.
"""

import argparse
import asyncio
import hashlib
import itertools
import json
import math
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass

TOKENS = 12  # of an answer without max_tokens
CALL = 56  # of a call, and 35 of them seen
CUT = object()  # the connection breaks
DONE = b"data: [DONE]\n\n"
REFUSALS = {
    "error-400": (400, '{"object": "error", "message": "the prompt is too long"}'),
    "error-500": (500, '{"error": {"message": "out of ' + "memory " * 200 + '", "code": 500}}'),
    "busy": (503, "<h1>down\nfor now</h1>"),
    "no-stream": (200, '{"object": "error", "message": "streaming is off"}'),
}
BREAKS = {  # what follows three tokens, or as many as the argument says
    "stall": [3600.0],
    "cut": [CUT],
    "end-early": [],
    "wrong-json": [b'data: {"choices": [{"delta": {"content"\n\n'],
    "wrong-shape": [b'data: {"choices": [{"delta": {"content": ["a", "list"]}}]}\n\n'],
    "error-event": [{"error": {"message": "the engine died", "code": 500}}, DONE],
    "ping": [b": ping\n\n", {"choices": [{"delta": {"role": "assistant", "content": None}}]}, 0.01] * 1000,
}
ENDS = {  # what follows the finish_reason of a whole answer; there is no usage
    "no-usage": [DONE],
    "no-done": [],
    "cut-after-finish": [CUT],
    "hung": [3600.0],
    "lingering": [DONE, 3600.0],
}


class Refused(Exception):
    """Status and text of an answer that is no stream, and its Retry-After."""


SPEECH = [" " + hashlib.sha256(f"{at}".encode()).hexdigest()[:5] for at in range(64)]
"""Words, of which each has two that may follow it, so that an answer has an order."""


def hash_of(text):
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def answer(messages, tokens=TOKENS):
    """The words of the normal answer to messages, a token each."""
    seed = json.dumps(list(messages), sort_keys=True)
    words, at = [], hash_of(seed) % len(SPEECH)
    for place in range(tokens):
        words.append(SPEECH[at])
        at = (5 * at + 1 + 2 * (hashlib.sha256(f"{seed}{place}".encode()).digest()[0] % 2)) % len(SPEECH)
    return words


def ids(words):
    """Token ids of an answer's words: of `SPEECH` from 1 on."""
    return [1 + SPEECH.index(word) if word in SPEECH else 1000 + hash_of(word) % 1000 for word in words]


def likelihoods(tokens):
    """What a model that writes such answers makes of a prompt: nothing of its first token, then by token id, as vLLM
    does."""
    found = [None]
    for before, token in itertools.pairwise(tokens):
        known = range(1, 1 + len(SPEECH))
        follows = [1 + (5 * (before - 1) + step) % len(SPEECH) for step in (1, 3)]
        logs = math.log(1 / 2 if token in follows else 1e-6) if before in known else math.log(1 / len(SPEECH))
        found.append({str(token): {"logprob": logs if token in known else math.log(1e-6), "rank": 1}})
    return found


class Call:
    """One request and its behaviours. A behaviour yields events, bytes as they are, and seconds to sleep."""

    def __init__(self, server, body):
        self.server, self.body, self.messages = server, body, body["messages"]
        self.text = str(self.messages[-1]["content"])
        self.cap = body.get("max_tokens") or TOKENS
        self.words = answer(self.messages, self.cap)
        self.prompt, self.cached = sum(len(str(m["content"]).split()) for m in self.messages), 0
        self.preempted = False
        self.name, self.argument = (*self.text.split(" "), "")[:2]
        if self.name not in REFUSALS | BREAKS | ENDS and not hasattr(self, "do_" + self.name.replace("-", "_")):
            self.name = server.behaviour

    def steps(self):
        if self.name in REFUSALS:
            raise Refused(*REFUSALS[self.name])
        if self.name in BREAKS:
            tokens = int(self.argument) if self.argument.isdigit() else 3
            return itertools.chain(self.said(self.words[:tokens]), BREAKS[self.name])
        if self.name in ENDS:
            return itertools.chain(self.said(self.words), [self.event(finish="stop")], ENDS[self.name])
        return getattr(self, "do_" + self.name.replace("-", "_"))()

    def event(self, finish=None, **delta):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        event = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": self.server.model, "choices": [choice]}
        if self.body.get("return_token_ids"):
            choice["token_ids"] = ids([delta["content"]] if delta.get("content") else [])
            event |= {"prompt_token_ids": [3000 + k for k in range(self.prompt)]} if "role" in delta else {}
        return event

    def usage(self, tokens):
        details = {"cached_tokens": self.cached}
        return {"prompt_tokens": self.prompt, "completion_tokens": tokens, "prompt_tokens_details": details}

    def said(self, words):
        """A role, then a word each ``itl``."""
        yield self.event(role="assistant", content="")
        for word in words:
            yield self.server.itl
            yield self.event(content=word)

    def end(self, finish, tokens=None):
        yield self.event(finish=finish)
        if self.body.get("stream_options", {}).get("include_usage"):
            yield self.event() | {"choices": [], "usage": self.usage(self.cap if tokens is None else tokens)}
        yield DONE

    def do_normal(self):
        yield from self.said(self.words)
        yield from self.end("length" if "max_tokens" in self.body else "stop")

    def do_short(self):
        """Ends after 5 tokens, unless it may not."""
        forced = self.body.get("ignore_eos", False)
        yield from self.said(self.words if forced else self.words[:5])
        yield from self.end("length" if forced else "stop", tokens=self.cap if forced else 5)

    def do_one_piece(self):
        """As behind a proxy that keeps a stream until it ends."""
        yield self.server.itl * len(self.words)
        yield self.event(content="".join(self.words))
        yield from self.end("length")

    def do_overstated(self):
        """Its usage says half as many tokens again."""
        yield from self.said(self.words)
        yield from self.end("length", tokens=3 * self.cap // 2)

    def do_replayed(self):
        """As behind a gateway that keeps whole answers: at once when it is asked the same once more."""
        again = self.server.seen[json.dumps(self.messages)] > 1
        yield from (self.event(content=word) for word in self.words) if again else self.said(self.words)
        yield from self.end("length")

    def do_halved(self):
        """Half of the prompt is lost on the way."""
        self.prompt //= 2
        yield from self.do_normal()

    def do_spilled(self):
        """What is preempted goes on with another answer."""
        if self.preempted:
            self.words = self.words[:2] + self.words[:1:-1]
        yield from self.do_normal()

    def do_flaky(self):
        """Refuses a fifth of what it is asked."""
        if hash_of(self.text) % 5 == 0:
            raise Refused(*REFUSALS["error-500"])
        yield from self.do_normal()

    def do_slow_first(self):
        yield float(self.argument)
        yield from self.do_normal()

    def do_busy_once(self):
        """Its argument is the Retry-After."""
        if self.server.seen[self.text] == 1:
            raise Refused(429, '{"detail": "busy"}', self.argument)
        yield from self.do_normal()

    def do_no_options(self):
        """An older server that does not know stream_options."""
        if "stream_options" in self.body:
            raise Refused(400, '{"error": {"message": "Extra inputs are not permitted: stream_options"}}')
        yield from self.do_normal()

    def do_empty(self):
        yield self.event(role="assistant", content="")
        yield from self.end("stop", tokens=0)

    def do_usage_last(self):
        """With the last word, as LMDeploy sends it; nulls until then."""
        for step in self.said(self.words[:-1]):
            yield step | {"usage": None} if isinstance(step, dict) else step
        yield self.event("stop", content=self.words[-1]) | {"usage": self.usage(self.cap)}
        yield DONE

    def do_reasoning(self):
        """Under the name that is its argument, or under ``both`` at once, as some versions of vLLM do."""
        names = ["reasoning_content", "reasoning"] if self.argument == "both" else [self.argument]
        yield from (self.event(**dict.fromkeys(names, word)) for word in self.words[:4])
        yield from self.said(self.words[4:])
        yield from self.end("stop")

    def do_tools(self):
        for name, arguments in ("look", ""), (None, '{"at": '), (None, '"x"}'):
            yield self.event(tool_calls=[{"index": 0, "function": {"name": name, "arguments": arguments}}])
        yield from self.end("tool_calls", tokens=3)

    def do_calls(self, arguments='{"summary": "It speaks.", "topics": ["war"], "year": 1812}'):
        """A call of the tool of --kv-workload tools."""
        for name, piece in ("record_message", ""), (None, arguments[:20]), (None, arguments[20:]):
            yield self.server.itl
            yield self.event(tool_calls=[{"index": 0, "function": {"name": name, "arguments": piece}}])
        yield from self.end("tool_calls", tokens=CALL)

    def do_half_calls(self):
        """The JSON has no end."""
        yield from self.do_calls('{"summary": "It speaks.", "topics": ["war"')

    def do_garbage(self):
        """At full speed, whatever is asked, to the last token."""
        yield from (self.event(content="!@ "[at % 3] * 2) for at in range(self.cap))
        yield from self.end("length")

    def do_several(self):
        """Three tokens a chunk."""
        yield from self.said("".join(self.words[at : at + 3]) for at in range(0, self.cap, 3))
        yield from self.end("stop")

    def do_pieces(self):
        """All that server-sent events allow, and characters of 4 bytes and of 2 escapes; cut every so many bytes."""
        stream = b": hello\r\n\r\nid: 7\r\n"
        for at, word in enumerate(["é😀", *self.words]):
            line, end = (b"data:", b"\r\n\r\n") if at % 2 else (b"data: ", b"\n\n")
            stream += line + json.dumps(self.event(content=word), ensure_ascii=False).encode() + end
        for half in "\ud83d", "\ude00":  # of another 😀
            stream += b"event: message\ndata: " + json.dumps(self.event(content=half)).encode() + b"\n\n"
        stream += b"data: " + json.dumps(self.event("stop")).encode() + b"\r\n\r\ndata:[DONE]\n\n"
        yield from (stream[at : at + int(self.argument)] for at in range(0, len(stream), int(self.argument)))

    def do_stamps(self):
        """Every token is the ``perf_counter`` of its sending, one clock for all processes; all streams go in step."""
        yield self.server.itl and self.server.itl - time.perf_counter() % self.server.itl
        for _ in range(self.cap):
            yield self.server.itl
            yield self.event(content=f" {time.perf_counter():.7f}")
        yield from self.end("stop")


@dataclass
class Server:
    """Serves in a thread of its own inside ``with``. ``calls`` are the chat requests so far: headers and bodies."""

    port: int = 0
    behaviour: str = "normal"
    itl: float = 0.0
    model: str = "scripted"
    cache_dtype: str = "auto"
    kv_tokens: int = 46592
    prefix_caching: bool = True
    preemptions: int = 0
    die_after: int = 0
    die_idle: int = 0
    """After so many looks at its metrics it ends, with nothing to do."""
    scores: bool = True
    """Whether it says how likely a prompt's tokens are."""

    def __post_init__(self):
        self.calls, self.paths, self.seen, self.cache, self.connections = [], [], Counter(), set(), 0
        self.counts = {"num_preemptions": self.preemptions, "prefix_cache_queries": 0, "prefix_cache_hits": 0}
        self.held = 0
        self._up, self._thread = threading.Event(), threading.Thread(target=lambda: asyncio.run(self.serve()))

    def __enter__(self):
        self._thread.start()
        self._up.wait()
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def serve(self):
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._connection, "127.0.0.1", self.port, backlog=1024)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        print(f"serving at {self.url}", flush=True)
        self._up.set()
        await self._end.wait()
        server.close()

    async def _connection(self, reader, writer):
        self.connections += 1
        try:
            while True:
                await self._request(reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass  # the client is gone, the server ends, or the client shall think so
        finally:
            writer.close()

    async def _request(self, reader, writer):
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        method, path, _ = first.split()
        self.paths.append(f"{method} {path}")
        try:
            if path == "/v1/completions" and self.scores:
                raise Refused(*self._scored(json.loads(body)))  # no refusal, but no stream either
            if path != "/v1/chat/completions":
                raise Refused(*self._page(path))
            call = Call(self, json.loads(body))
            self.calls.append((headers, call.body))
            await self._answer(writer, call)
        except Refused as refused:
            status, text, after = (*refused.args, "")[:3]
            head = f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\nRetry-After: {after}"
            writer.write(f"HTTP/1.1 {status} X\r\n{head}\r\n\r\n{text}".encode())
        idle = self.die_idle and self.paths.count("GET /metrics") >= self.die_idle
        if idle or (self.die_after and len(self.calls) >= self.die_after):
            await writer.drain()
            os._exit(1)

    def _page(self, path):
        if path == "/reset_prefix_cache":
            self.cache.clear()
        labels = f'cache_dtype="{self.cache_dtype}",kv_cache_size_tokens="{self.kv_tokens}",'
        labels += f'kv_cache_memory_bytes="1073741824",enable_prefix_caching="{self.prefix_caching}"'
        counts = [f'vllm:{name}_total{{engine="0"}} {count:.1f}\n' for name, count in self.counts.items()]
        pages = {"/health": "", "/reset_prefix_cache": "", "/v1/models": json.dumps({"data": [{"id": self.model}]})}
        pages["/metrics"] = f"vllm:cache_config_info{{{labels}}} 1.0\n" + "".join(counts)
        return (200, pages[path]) if path in pages else (404, '{"detail": "Not Found"}')

    def _scored(self, body):
        if body["prompt_logprobs"] > 20:
            return 400, '{"error": {"message": "Requested prompt logprobs, which is greater than max allowed: 20"}}'
        return 200, json.dumps({"choices": [{"text": "", "prompt_logprobs": likelihoods(body["prompt"])}]})

    async def _answer(self, writer, call):
        self.seen[call.text] += 1
        self.seen[json.dumps(call.messages)] += 1
        key = json.dumps([call.body.get("cache_salt"), call.messages])
        call.cached = call.prompt if self.prefix_caching and key in self.cache else 0
        self.cache.add(key)
        self.counts["prefix_cache_queries"] += call.prompt
        self.counts["prefix_cache_hits"] += call.cached
        self.held += call.prompt + call.cap
        call.preempted = self.held > self.kv_tokens
        self.counts["num_preemptions"] += call.preempted
        try:
            await self._stream(writer, call)
        finally:
            self.held -= call.prompt + call.cap

    async def _stream(self, writer, call):
        steps = call.steps()
        first = next(steps)  # or a refusal
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        due = self._loop.time()
        for step in itertools.chain([first], steps):
            if step is CUT:
                raise ConnectionError
            if isinstance(step, float):
                due += step
                await asyncio.sleep(due - self._loop.time())
            else:
                data = step if isinstance(step, bytes) else b"data: " + json.dumps(step).encode() + b"\n\n"
                writer.write(b"%x\r\n%s\r\n" % (len(data), data))
                await writer.drain()
        writer.write(b"0\r\n\r\n")


def main():
    parser = argparse.ArgumentParser()
    own = {"port": 0, "itl": 0.0, "model": "scripted", "cache_dtype": "auto", "kv_tokens": 46592, "preemptions": 0}
    for name, default in {**own, "die_after": 0, "die_idle": 0, "kv_cache_dtype": "auto", "start_delay": 0.0}.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    parser.add_argument("--garbage", dest="behaviour", action="store_const", const="garbage", default="normal")
    parser.add_argument("--no-prefix-caching", dest="prefix_caching", action="store_false")
    parser.add_argument("--ignore-option", action="store_true", help="accept --kv-cache-dtype and do nothing with it")
    given = vars(parser.parse_args())
    dtype, ignored, delay = (given.pop(name) for name in ("kv_cache_dtype", "ignore_option", "start_delay"))
    if dtype != "auto" and not ignored:
        given["cache_dtype"] = dtype
        given["kv_tokens"] *= 2 if dtype.startswith("fp8") else 1
    time.sleep(delay)
    asyncio.run(Server(**given).serve())


if __name__ == "__main__":
    main()
