"""Which server a request goes to: policies, simulated on the same requests, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.random import Generator

from kvsuite.analysis.resample import Floats
from kvsuite.analysis.stats import Estimate
from kvsuite.errors import UsageError
from kvsuite.predict.fleet import Request, Server, Target, simulator
from kvsuite.predict.laws import Law
from kvsuite.readers.run import answers
from kvsuite.records import Run
from kvsuite.workloads import Arrivals

if TYPE_CHECKING:
    from simpy import Event

Choose = Callable[[Request, Sequence[Target], Generator], Target]
Fleet = Literal["plain", "compressed", "mixed"]


def least_loaded(request: Request, servers: Sequence[Target], rng: Generator) -> Target:
    """Fewest requests that are not done; of several such servers any."""
    least = min(s.load for s in servers)
    return _any([s for s in servers if s.load == least], rng)


def at_random(request: Request, servers: Sequence[Target], rng: Generator) -> Target:
    """Any."""
    return _any(servers, rng)


def by_throughput(request: Request, servers: Sequence[Target], rng: Generator) -> Target:
    """The most tokens a second for this request, as its server is now."""
    return max(servers, key=lambda s: s.rate(request.prompt))


def by_length(request: Request, servers: Sequence[Target], rng: Generator) -> Target:
    """The method that is expected to give the shortest answer; of its servers the least loaded."""
    shortest = min(request.told[s.law.method] for s in servers)
    return least_loaded(request, [s for s in servers if request.told[s.law.method] == shortest], rng)


def by_both(request: Request, servers: Sequence[Target], rng: Generator) -> Target:
    """The shortest expected latency: prefill time + expected length ÷ decode throughput."""
    return min(servers, key=lambda s: expected(request, s, request.told[s.law.method]))


def by_both_blind(request: Request, servers: Sequence[Target], rng: Generator) -> Target:
    """Likewise, with one expected length whatever the method: what is left of routing where a predictor cannot tell
    one method's answer from another's."""
    return min(servers, key=lambda s: expected(request, s, request.told[servers[0].law.method]))


def expected(request: Request, server: Target, length: float) -> float:
    """Seconds. (The paper's text has a product of length and throughput, which grows with speed.)"""
    return server.law.prefill_seconds(request.prompt) + length / server.rate(request.prompt)


def oracle(request: Request, servers: Sequence[Target], rng: Generator) -> Target:
    """Greedy with all true lengths: the server that would be done first with this request if nobody came after it."""
    return min((s for s in servers if isinstance(s, Server)), key=lambda s: s.forecast(request))


def _any(servers: Sequence[Target], rng: Generator) -> Target:
    return servers[int(rng.integers(len(servers)))] if len(servers) > 1 else servers[0]


@dataclass(frozen=True)
class Policy:
    """A way to route on a fleet."""

    name: str
    fleet: Fleet
    choose: Choose
    careful: bool = False
    """Whether requests of fragile types stay on the uncompressed servers."""

    def server(self, request: Request, servers: Sequence[Target], plain: str, rng: Generator) -> Target:
        """Where a request goes; ``plain`` is the uncompressed method."""
        own = [s for s in servers if s.law.method == plain] if self.careful and request.fragile else []
        return self.choose(request, own or servers, rng)


POLICIES = (
    Policy("plain, least loaded", "plain", least_loaded),
    Policy("compressed, least loaded", "compressed", least_loaded),
    Policy("mixed, at random", "mixed", at_random),
    Policy("mixed, least loaded", "mixed", least_loaded),
    Policy("by throughput", "mixed", by_throughput),
    Policy("by length", "mixed", by_length),
    Policy("by both", "mixed", by_both),
    Policy("by both, blind", "mixed", by_both_blind),
    Policy("by both, fragile plain", "mixed", by_both, careful=True),
    Policy("oracle", "mixed", oracle),
)
"""The first is what all are compared with."""


class Texts(Protocol):
    """Where requests' lengths come from."""

    def draw(self, n: int, methods: Sequence[str], rng: Generator) -> tuple[Floats, dict[str, Floats]]:
        """Tokens of ``n`` prompts, and of each method's answers; all (n,) and whole."""


@dataclass(frozen=True)
class Stated:
    """Lengths by a law: log-normal prompts and answers. A prompt has a length of its own, and each method's answer
    scatters around it; the compressed one's is longer or shorter by a factor."""

    prompt: float = 80.0
    """Median, tokens."""
    prompt_spread: float = 1.2
    """Standard deviation of the logarithm, as in the following."""
    answer: float = 210.0
    answer_spread: float = 0.85
    noise: float = 0.5
    """Of one answer around its prompt's length: two of one method differ by √2 times this."""
    factor: float = 1.0
    """Of the compressed methods' answers."""
    longest: int = 1024
    """Of prompts, and of answers, which are capped."""

    def draw(self, n: int, methods: Sequence[str], rng: Generator) -> tuple[Floats, dict[str, Floats]]:
        """The first method is the uncompressed one."""
        prompts = self.prompt * np.exp(self.prompt_spread * rng.standard_normal(n))
        level = self.answer * np.exp(self.answer_spread * rng.standard_normal(n))
        found = {}
        for at, method in enumerate(methods):
            own = level * (self.factor if at else 1.0) * np.exp(self.noise * rng.standard_normal(n))
            found[method] = np.clip(np.rint(own), 1, self.longest)
        return np.clip(np.rint(prompts), 4, self.longest), found


@dataclass(frozen=True)
class Chats:
    """A run's answers to chats: prompts are drawn with replacement, each with every method's answer to it."""

    prompts: Floats
    """(m,)"""
    lengths: Mapping[str, Floats]

    @classmethod
    def of(cls, run: Run, methods: Sequence[str]) -> Chats:
        """Raises UsageError where not all methods answered the same chats."""
        good = [a for a in answers(run, "length") if a.status == "ok" and not a.repeat and a.length]
        known = {m: {(a.task, a.sample): a for a in good if a.method == m} for m in methods}
        shared = [key for key in known[methods[0]] if all(key in known[m] for m in methods)]
        if not shared:
            raise UsageError(
                f"{run.folder} holds no chats that {' and '.join(methods)} answered: lengths are not known"
            )
        lengths = {m: np.array([float(known[m][key].length) for key in shared]) for m in methods}
        return cls(np.array([float(known[methods[0]][key].prompt_tokens) for key in shared]), lengths)

    def draw(self, n: int, methods: Sequence[str], rng: Generator) -> tuple[Floats, dict[str, Floats]]:
        """See `Texts`."""
        at = rng.integers(len(self.prompts), size=n)
        return self.prompts[at], {m: self.lengths[m][at] for m in methods}


@dataclass(frozen=True)
class Setup:
    """What is simulated. The first law is the uncompressed cache's, the second the compressed one's."""

    laws: tuple[Law, Law]
    texts: Texts
    arrivals: Arrivals
    times: Sequence[float] | None = None
    """A trace's own."""
    plain: int = 1
    compressed: int = 3
    """Servers of the mixed fleet; the others have as many of one kind."""
    requests: int = 1000
    batch: int = 256
    memory: float = 60_000.0
    error: float = 0.3
    """Standard deviation of the logarithm of predicted over true lengths."""
    fragile: float = 0.25
    """Share of requests of fragile types."""
    ttft: float = 0.5
    itl: float = 0.05
    """The objective, seconds: to the first token, and a token after it, mean of the request."""

    def fleet(self, kind: Fleet) -> list[Law]:
        """One law a server."""
        plain, compressed = self.laws
        servers = self.plain + self.compressed
        counts = {"plain": (servers, 0), "compressed": (0, servers), "mixed": (self.plain, self.compressed)}[kind]
        return [plain] * counts[0] + [compressed] * counts[1]

    def draw(self, seed: int) -> list[Request]:
        """The requests of a seed: the same for every policy."""
        rng = np.random.default_rng([seed, 0])
        methods = [law.method for law in self.laws]
        times = self.times or self.arrivals.times(self.requests, seed)
        if times is None:
            raise UsageError(
                f"arrivals {self.arrivals} are no arrivals at times of their own: poisson, constant, bursts"
            )
        prompts, lengths = self.texts.draw(len(times), methods, rng)
        told = {m: (lengths[m] * np.exp(self.error * rng.standard_normal(len(times)))).tolist() for m in methods}
        fragile = (rng.random(len(times)) < self.fragile).tolist()
        own = {m: lengths[m].astype(int).tolist() for m in methods}
        return [
            Request(at, prompt, {m: own[m][i] for m in methods}, {m: told[m][i] for m in methods}, fragile[i])
            for i, (at, prompt) in enumerate(zip(times, prompts.astype(int).tolist(), strict=True))
        ]


def simulate(setup: Setup, policy: Policy, seed: int) -> list[Request]:
    """The requests of a seed, answered."""
    env = simulator().Environment()
    servers = [Server(env, law, setup.batch, setup.memory) for law in setup.fleet(policy.fleet)]
    requests, rng = setup.draw(seed), np.random.default_rng([seed, 1])

    def arrive() -> Iterator[Event]:
        for request in requests:
            yield env.timeout(request.at - env.now)
            chosen = policy.server(request, servers, setup.laws[0].method, rng)
            next(s for s in servers if s is chosen).submit(request)

    env.process(arrive())
    env.run()
    return requests


FIGURES = ("mean", "p50", "p95", "p99", "tokens", "slo", "exposed")


def figures(setup: Setup, done: Sequence[Request]) -> dict[str, float]:
    """Of one seed: seconds end to end, tokens of an answer, the share of requests within the objective, and that of
    fragile ones which a compressed server answered."""
    seconds = np.array([r.done - r.at for r in done])
    fragile = [r.method != setup.laws[0].method for r in done if r.fragile]
    p50, p95, p99 = (float(x) for x in np.quantile(seconds, (0.5, 0.95, 0.99)))
    return {
        "mean": float(seconds.mean()),
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "tokens": sum(r.made for r in done) / len(done),
        "slo": sum(_within(setup, r) for r in done) / len(done),
        "exposed": sum(fragile) / len(fragile) if fragile else math.nan,
    }


def _within(setup: Setup, r: Request) -> bool:
    return r.first - r.at <= setup.ttft and r.done - r.first <= setup.itl * max(r.made - 1, 0)


@dataclass(frozen=True)
class Outcome:
    """One policy over seeds."""

    policy: Policy
    figures: dict[str, Estimate]
    means: Floats
    """(seeds,), seconds end to end."""

    def ratio(self, other: Outcome) -> Estimate:
        """Mean seconds over another policy's on the same requests, with the 95 % interval of seeds."""
        logs = np.log(self.means / other.means)
        found = over_seeds(logs)
        return replace(found, mean=math.exp(found.mean), low=math.exp(found.low), high=math.exp(found.high))


def over_seeds(values: Floats) -> Estimate:
    """A mean and its 95 % t-interval. (n,)"""
    known = values[np.isfinite(values)]
    if len(known) < 2:
        return Estimate.of(float(known.mean()) if len(known) else math.nan, math.nan, 0)
    return Estimate.of(float(known.mean()), float(known.std(ddof=1)) / math.sqrt(len(known)), len(known) - 1)


def outcomes(setup: Setup, seeds: int, policies: Sequence[Policy] = POLICIES) -> list[Outcome]:
    """Every policy on the same requests, ``seeds`` times anew."""
    found = []
    for policy in policies:
        each = [figures(setup, simulate(setup, policy, seed)) for seed in range(seeds)]
        columns = {name: np.array([one[name] for one in each]) for name in FIGURES}
        found.append(Outcome(policy, {name: over_seeds(x) for name, x in columns.items()}, columns["mean"]))
    return found
