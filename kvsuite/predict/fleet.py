"""Servers of a fleet, simulated event by event (simpy): continuous batching under a limit of sequences and of memory.

A server prefills a prompt as soon as it has room, one after the other, while decoding waits; then every step gives each
running sequence a token. Steps are not events: as a step's seconds are linear in sequences and tokens, so many of them
as change nothing are one stretch, which an arrival ends at its next step. Where a step would pass the memory, the
youngest sequence gives its memory back and is prefilled again when another one has ended.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from kvsuite.errors import UsageError
from kvsuite.predict.laws import Law

if TYPE_CHECKING:
    from simpy import Environment, Event

    Waits = Generator[Event, Any, None]

NEEDED = "the router's simulation needs simpy: pip install 'kvsuite[predict]'"


def simulator() -> ModuleType:
    """simpy. Raises UsageError where it is not installed."""
    try:
        import simpy
    except ImportError as error:
        raise UsageError(NEEDED) from error
    return simpy


@dataclass(eq=False)
class Request:
    """One request, and what became of it. Times are seconds from the start."""

    at: float
    """When it arrives."""
    prompt: int
    """Tokens."""
    lengths: Mapping[str, int]
    """Method → tokens of the answer that it gives, 1 at least."""
    told: Mapping[str, float]
    """Method → tokens that a predictor expects."""
    fragile: bool = False
    """Whether its task is of a type that compression breaks."""
    method: str = ""
    """Whose server answered it."""
    made: int = 0
    """Tokens of the answer so far, those of the stretch under way left out."""
    first: float = math.nan
    """When its first token came."""
    done: float = math.nan


class Target:
    """What a policy sees of a server."""

    law: Law

    @property
    def load(self) -> int:
        """Requests that are not done."""
        raise NotImplementedError

    def rate(self, prompt: int) -> float:
        """Tokens a second that one more request of so many tokens would get now, if it ran beside all that are here."""
        raise NotImplementedError


class Server(Target):
    """One replica. ``batch`` is the most sequences that run at once, ``memory`` the tokens of uncompressed cache that
    it holds."""

    def __init__(self, env: Environment, law: Law, batch: int, memory: float = math.inf) -> None:
        self.env, self.law, self.batch, self.memory = env, law, batch, memory
        self.waiting: deque[Request] = deque()
        self.running: list[tuple[int, int, Request]] = []
        """A heap: the step that makes its last token, the order of admission, the request."""
        self.preempted = 0
        self._prefilling: Request | None = None
        self._steps = self._order = 0
        self._tokens = 0  # in the caches of all that run, when the stretch began
        self._begun = 0.0
        self._stretch = 0  # steps that were planned; 0 while there is no stretch
        self._wake = env.event()
        env.process(self._serve())

    @property
    def load(self) -> int:
        """Requests that are not done."""
        return len(self.waiting) + len(self.running) + (self._prefilling is not None)

    def submit(self, request: Request) -> None:
        """Take a request. Raises UsageError for one that could never be held."""
        length = request.lengths[self.law.method]
        if (need := self.law.held(request.prompt + length)) > self.memory:
            raise UsageError(f"a request of {need:,.0f} tokens does not fit a server's memory of {self.memory:,.0f}")
        request.method = self.law.method
        self.waiting.append(request)
        if not self._wake.triggered:
            self._wake.succeed()

    def rate(self, prompt: int) -> float:
        """Tokens a second that one more request of so many tokens would get now, if it ran beside all that are here."""
        ahead = [*self.waiting, *([self._prefilling] if self._prefilling else [])]
        tokens = self._tokens + len(self.running) * self._elapsed() + sum(r.prompt + r.made for r in ahead) + prompt
        return 1 / self.law.step_seconds(self.load + 1, tokens)

    def forecast(self, request: Request) -> float:
        """Seconds until it would be done if nobody came after it and there were room for all: by true lengths."""
        law, elapsed = self.law, self._elapsed()
        steps = request.lengths[law.method] - 1
        own = law.steps_seconds(steps, 1, request.prompt + 1) + law.prefill_seconds(request.prompt)
        ahead = [*self.waiting, *([self._prefilling] if self._prefilling else [])]
        others = [(r.lengths[law.method] - r.made, r.prompt + r.made) for r in ahead]
        own += sum(law.prefill_seconds(tokens) for _, tokens in others)
        for end, _, r in self.running:
            left = end - self._steps - elapsed
            others.append((left, r.prompt + r.lengths[law.method] - left))
        _, each, token = law.step
        held = float(request.prompt)
        for left, tokens in others:
            shared = left if left < steps else steps
            own += shared * (each + token * (tokens + (shared - 1) / 2))
            held += min(tokens, law.budget)
        return own * max(1.0, (len(others) + 1) / self.batch, law.share * held / self.memory)

    def _serve(self) -> Waits:
        while True:
            if not self.load:
                self._wake = self.env.event()
                yield self._wake
            while self._admissible():
                yield from self._prefill(self.waiting.popleft())
            if self.running:
                self._make_room()
                yield from self._decode()

    def _admissible(self) -> bool:
        if not self.waiting or len(self.running) >= self.batch:
            return False
        if not self.running:
            return True
        one = self.waiting[0]
        return self._held(0) + self.law.held(one.prompt + one.made + 1) <= self.memory

    def _prefill(self, one: Request) -> Waits:
        self._prefilling = one
        yield self.env.timeout(self.law.prefill_seconds(one.prompt + one.made))
        self._prefilling = None
        one.made += 1
        if math.isnan(one.first):
            one.first = self.env.now
        left = one.lengths[self.law.method] - one.made
        if left <= 0:
            one.done = self.env.now
            return
        self._order += 1
        self._tokens += one.prompt + one.made
        heapq.heappush(self.running, (self._steps + left, self._order, one))

    def _decode(self) -> Waits:
        """One stretch of steps."""
        n = len(self.running)
        self._begun = self.env.now
        self._stretch = max(1, min(self.running[0][0] - self._steps, self._room()))
        end = self._begun + self._seconds(self._stretch)
        if self.waiting or n >= self.batch:  # nobody who comes could be let in
            yield self.env.timeout(end - self._begun)
        else:
            self._wake = self.env.event()
            yield self.env.timeout(end - self._begun) | self._wake
            if self.env.now < end:
                self._stretch = min(self._elapsed() + 1, self._stretch)
                yield self.env.timeout(max(self._begun + self._seconds(self._stretch) - self.env.now, 0.0))
        self._steps += self._stretch
        self._tokens += n * self._stretch
        self._stretch = 0
        while self.running and self.running[0][0] <= self._steps:
            _, _, one = heapq.heappop(self.running)
            one.made, one.done = one.lengths[self.law.method], self.env.now
            self._tokens -= one.prompt + one.made

    def _make_room(self) -> None:
        """Before a step that would not fit, the youngest go back to the queue."""
        while len(self.running) > 1 and self._held(1) > self.memory:
            place = max(range(len(self.running)), key=lambda at: self.running[at][1])
            end, _, one = self.running.pop(place)
            heapq.heapify(self.running)
            one.made = one.lengths[self.law.method] - (end - self._steps)
            self._tokens -= one.prompt + one.made
            self.waiting.appendleft(one)
            self.preempted += 1

    def _room(self) -> int:
        """Steps that surely fit."""
        if math.isinf(self.memory):
            return self.running[0][0]
        return int((self.memory - self._held(0)) / (len(self.running) * self.law.share))

    def _held(self, further: int) -> float:
        """Memory of all that run, so many steps from now."""
        if math.isinf(self.law.budget):
            return self.law.share * (self._tokens + further * len(self.running))
        lengths = (r.prompt + r.lengths[self.law.method] - end + self._steps for end, _, r in self.running)
        return sum(self.law.held(length + further) for length in lengths)

    def _seconds(self, steps: int) -> float:
        return self.law.steps_seconds(steps, len(self.running), self._tokens)

    def _elapsed(self) -> int:
        """Whole steps of the stretch that are over."""
        if not self._stretch:
            return 0
        seconds, n = self.env.now - self._begun, len(self.running)
        one, growth = self.law.step_seconds(n, self._tokens), self.law.step[2] * n / 2
        linear = one - growth
        steps = (
            seconds / linear if growth <= 0 else (math.sqrt(linear**2 + 4 * growth * seconds) - linear) / (2 * growth)
        )
        return min(int(steps + 1e-9), self._stretch)
