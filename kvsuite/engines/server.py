"""One arm of a comparison of servers: what serves it, started and stopped here unless it is a URL."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvsuite.engines import probe
from kvsuite.engines.process import Process, free_port
from kvsuite.engines.profile import NONE, Profile, choose
from kvsuite.engines.request import Ask, Reply
from kvsuite.engines.stream import LARGEST
from kvsuite.errors import UsageError

if TYPE_CHECKING:
    from kvsuite.engines.openai import Client
    from kvsuite.engines.openvino import OpenVino

ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
BETWEEN = 60.0
"""Seconds between two tokens, and for a page, at most."""
GRACE = 5.0
"""Seconds that a client has to say in its own words that time is up."""
POLL = 0.25
"""Seconds between two questions whether a server is ready."""


@dataclass(frozen=True)
class Spec:
    """What serves: a URL, a command, or an engine in this process."""

    kind: Literal["url", "command", "openvino"]
    text: str
    words: tuple[str, ...] = ()
    """Of a command, without the assignments before it."""
    environment: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Raises UsageError, one sentence, for what cannot serve."""
        text = text.strip()
        if re.match(r"https?://", text):
            return cls("url", text)
        if text == "openvino" or text.startswith("openvino:"):
            from kvsuite.engines.openvino import parse

            parse(text.partition(":")[2])  # a mistake in it is told now
            return cls("openvino", text)
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UsageError(f"the command {text!r} cannot be read: {error}") from error
        own: list[tuple[str, str]] = []
        while words and (match := ASSIGNMENT.fullmatch(words[0])):
            own.append((match[1], match[2]))
            words.pop(0)
        if not words or "{port}" not in text:
            raise UsageError(f"{text!r} is no server: write a URL, openvino:kv=…, or a command that contains {{port}}")
        if shutil.which(words[0], path=dict(own).get("PATH", os.environ.get("PATH"))) is None:
            raise UsageError(f"the program {words[0]!r} of the command {text!r} is not there")
        if sys.platform == "win32":  # the keeper needs process groups and signals
            raise UsageError(f"on Windows kvsuite starts no server: start {text!r} yourself and name its URL")
        return cls("command", text, tuple(words), tuple(own))

    @property
    def needs_model(self) -> bool:
        """Whether a model's folder or file has to be named to it."""
        return self.kind == "openvino" or "{model}" in self.text


@dataclass
class Server:
    """A spec, up or down. ``model`` gives the path that ``{model}`` stands for; ``log`` is where a command's output
    goes; ``startup`` is how many seconds it may take until it answers."""

    name: str
    spec: Spec
    log: Path
    model: Callable[[], Path]
    profile_name: str = ""
    startup: float = 600.0
    timeout: float = 600.0
    count: Callable[[str], int] | None = None
    """Counts the tokens of a text where the server does not say them."""
    profile: Profile = NONE
    command: str = ""
    served: str = ""
    """The model, as the server calls it."""
    _client: Client | None = None
    _engine: OpenVino | None = None
    _process: Process | None = None
    _began: int = 0
    counted: dict[str, float] = field(default_factory=dict)
    """What it had counted when it was last looked at; a server that counts less than that was started again."""

    @property
    def up(self) -> bool:
        """Whether it can be asked: started, and not dead since."""
        if self._engine is not None:
            return self._engine.alive
        return self._client is not None and (self._process is None or self._process.alive)

    @property
    def where(self) -> str:
        """Where to read more of it."""
        return f"nothing answers at {self.spec.text} any more" if self.spec.kind == "url" else f"see {self.log}"

    @property
    def ended(self) -> bool:
        """Whether it was started here, and is down though nobody stopped it."""
        return not self.up and (self._engine is not None or self._process is not None)

    async def start(self) -> None:
        """Until it answers. Raises UsageError with the end of its log where it does not."""
        await self.stop()
        self.counted = {}
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        if self.spec.kind == "openvino":
            from kvsuite.engines.openvino import OpenVino, parse

            self.command, self.profile, path = self.spec.text, choose("openvino"), self.model()
            self._engine = OpenVino(path, parse(self.spec.text.partition(":")[2]), self.startup)
            await asyncio.to_thread(self._engine.start)
            self.served = path.name
            return
        url = self.spec.text
        if self.spec.kind == "command":
            url = self._run()
        from kvsuite.engines.openai import Client

        key, total, between = os.environ.get("OPENAI_API_KEY"), self.timeout, min(self.timeout, BETWEEN)
        client = Client(url, key=key, first=total, total=total, between=between, count=self.count)
        self._client = client
        self.command = self.command if self._process else self.spec.text
        self.profile = choose(self.profile_name, self.spec.text if self._process else "")
        await self._ready(client)
        if self.profile is NONE:
            _, metrics = await client.get("/metrics")
            self.profile = choose("", metrics=metrics)
        self.served = (await client.models())[0]

    def _run(self) -> str:
        port = free_port()
        fill = {"{port}": str(port), "{model}": str(self.model()) if self.spec.needs_model else ""}

        def filled(word: str) -> str:
            for mark, value in fill.items():
                word = word.replace(mark, value)
            return word

        words = [filled(word) for word in self.spec.words]
        own = {name: filled(value) for name, value in self.spec.environment}
        self.command = shlex.join([*(f"{k}={v}" for k, v in own.items()), *words])
        self._began = self.log.stat().st_size if self.log.is_file() else 0
        self._process = Process(words, self.log, own)
        self._process.start()
        return f"http://127.0.0.1:{port}"

    async def _ready(self, client: Client) -> None:
        deadline, said = time.monotonic() + self.startup, "nothing"
        while time.monotonic() < deadline:
            if self._process is not None and not self._process.alive:
                raise UsageError(
                    f"{self.name}: the server ended with code {self._process.returncode} before it answered: "
                    f"{self._process.reason()} (log: {self.log})"
                )
            try:
                status, text = await client.get(self.profile.ready)
                if status == 200 and await client.models():
                    return
                said = f"{status} {text[:80]}"
            except (OSError, UsageError) as error:
                said = str(error) or type(error).__name__
            if self._process is None:
                raise UsageError(f"{self.name}: no server answers at {self.spec.text} ({said})")
            await asyncio.sleep(POLL)
        raise UsageError(f"{self.name}: no answer within {self.startup:g} s ({said}; log: {self.log})")

    async def stop(self) -> None:
        """Stop what was started here; a URL is left alone. Twice does no harm."""
        client, engine, process = self._client, self._engine, self._process
        self._client, self._engine, self._process = None, None, None
        try:
            if client is not None:
                await client.close()
            if engine is not None:
                await asyncio.to_thread(engine.stop)
        finally:
            if process is not None:
                await asyncio.to_thread(process.stop)

    async def ask(self, ask: Ask) -> Reply:
        """An answer; a server that is down gives a failed one."""
        backend, start = self._engine or self._client, time.perf_counter()
        if backend is None:
            return Reply(ask.id, start=start, error="the server is down")
        try:
            async with asyncio.timeout(self.timeout + GRACE):  # a client has its own
                return await backend.ask(ask)
        except TimeoutError:
            return Reply(ask.id, start=start, seconds=self.timeout, error=f"no answer within {self.timeout:g} s")

    async def facts(self) -> dict[str, Any]:
        """What it runs with (``probe.facts``); what an engine in this process knows of itself."""
        if self._engine is not None:
            return self._engine.facts()
        return await probe.facts(self.profile, self._page, self._said())

    async def counters(self) -> tuple[dict[str, float], bool]:
        """What it counted since it started, and whether others than ``start`` started it again since it was last
        looked at."""
        found = {} if self._client is None else await probe.counters(self.profile, self._page)
        found = found if self._engine is None else self._engine.counters()
        again = any(found.get(name, value) < value for name, value in self.counted.items())
        self.counted = found
        return found, again

    async def answers(self) -> bool:
        """Whether it is ready now."""
        if self._client is None:
            return self.up
        status, _ = await self._page(self.profile.ready)
        return status == 200

    async def forget(self) -> bool:
        """Empty its prefix cache. False where there is no way."""
        if not self.profile.reset or self._client is None:
            return False
        try:
            status, _ = await self._client.post(self.profile.reset)
        except OSError:
            return False
        return status == 200

    async def likelihoods(self, prompt: Sequence[int], answer: Sequence[int]) -> list[float]:
        """How likely its model finds every token of an answer behind a prompt, nats. Raises UsageError or OSError where
        it does not say."""
        if self._client is None or not self.profile.scores:
            raise UsageError(f"{self.name} does not say how likely tokens are")
        return await self._client.likelihoods(self.profile.scores, prompt, answer)

    async def _page(self, path: str) -> tuple[int, str]:
        try:
            return await self._client.get(path) if self._client else (0, "")
        except OSError:
            return 0, ""

    def _said(self) -> str:
        """The first `LARGEST` bytes of its log since it was started: there it says what it runs with."""
        if self._process is None or not self.log.is_file():
            return ""
        with self.log.open("rb") as file:
            file.seek(self._began)
            return file.read(LARGEST).decode(errors="replace")
