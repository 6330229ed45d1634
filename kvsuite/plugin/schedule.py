"""In which order servers are visited, and what they are asked there: the same in every arm."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from kvsuite import tasks, workloads
from kvsuite.engines.request import Ask
from kvsuite.plugin.options import Options
from kvsuite.plugin.servers import AGAIN, CONVERSATIONS, Servers
from kvsuite.tasks import Sample, Task
from kvsuite.workloads import Arrivals, Turn

T = TypeVar("T")
DIGEST = "digest"
OPEN = 32
"""Requests of a leg whose load has no concurrency."""
FOLLOW_UPS = (
    "What else does it say?",
    "Why does that matter? Explain it in a few sentences.",
)
"""What a conversation goes on with."""
TURNS = 1 + len(FOLLOW_UPS)
WARM_UP = 16
"""Tokens of an answer that only warms a server up."""


@dataclass(frozen=True)
class Period:
    """One turn of one arm. Legs of a timed one are counted within its block: 0 and 1."""

    arm: str
    block: int = 0
    half: int = 0
    timed: bool = False
    answers: bool = False
    """Whether the tasks are answered, too: once per arm."""


def visits(arms: Sequence[str], blocks: int, timed: bool, answers: bool) -> list[Period]:
    """A B C, then C B A, ``blocks`` times: what drifts while they run meets all arms alike."""
    if not timed:
        return [Period(arm, answers=answers) for arm in arms]
    found = []
    for block in range(blocks):
        for half, order in enumerate((arms, list(reversed(arms)))):
            first = answers and block == half == 0
            found += [Period(arm, block, half, timed=True, answers=first) for arm in order]
    return found


@dataclass(frozen=True)
class Cell:
    """One load that is timed."""

    name: str
    arrivals: Arrivals
    length: int
    """Tokens of its prompts; 0 where the workload has its own."""


def cells(options: Options, servers: Servers) -> list[Cell]:
    """Every load of a run."""
    loads = [servers.arrivals] if servers.arrivals else [Arrivals("closed", concurrency=n) for n in options.batch]
    if servers.workload is not None:
        return [Cell(f"{load} {servers.workload.name}", load, 0) for load in loads]
    more = f" {CONVERSATIONS}" * servers.talks
    return [Cell(f"{load} {length} tokens{more}", load, length) for load in loads for length in options.length]


def task_asks(task: Task, samples: Sequence[Sample], options: Options, arm: str) -> list[Ask]:
    """A task's samples as requests. The A/A arm's come in another order and, where answers are sampled, with other
    seeds: what is noise to whoever asks."""
    temperature = options.temperature if task.evaluation == "length" else 0.0
    asks = [_ask(s, temperature, options, repeat=int(arm == AGAIN)) for s in samples]
    return _reordered(asks, f"{options.seed}") if arm == AGAIN else asks


def width(options: Options, arm: str) -> int:
    """How many samples of a task are asked at a time: of the A/A arm another number, since servers round differently
    in other batches."""
    return options.width if arm != AGAIN else max(options.width // 2, 1) if options.width > 1 else 2


def load_asks(
    cell: Cell, options: Options, servers: Servers, draw: int, arm: str, tokens: Callable[[str], int]
) -> list[Ask]:
    """What a cell asks: other prompts in every draw, such as a block's, and the same in every arm."""
    count = servers.requests or (2 * cell.arrivals.concurrency if cell.arrivals.kind == "closed" else OPEN)
    file = servers.workload
    if file is None:
        texts = max(cell.arrivals.concurrency, -(-count // TURNS)) if servers.talks else count
        asks = _digests(cell, f"{options.seed} {cell.name} {draw}", texts, options, tokens)
        asks = [turn for ask in asks for turn in _turns(ask)] if servers.talks else asks
    elif file.suffix == ".jsonl":
        asks = [replace(a, max_tokens=a.max_tokens or options.cap) for a in workloads.read(file)]
    else:
        asks = workloads.sharegpt(file, count, 1_000 * options.seed + draw, tokens, options.cap)
    if servers.forced:
        asks = [replace(a, extra={**a.extra, "ignore_eos": True}) for a in asks]
    if arm != AGAIN or cell.arrivals.kind == "trace":  # at a trace's own times there is no other order
        return asks
    talks = _reordered(workloads.conversations(asks), f"{options.seed} {draw}")
    return [asks[place] for talk in talks for place in talk]


def warm_up(cell: Cell, options: Options, tokens: Callable[[str], int]) -> list[Ask]:
    """Requests whose short answers nobody looks at, of prompts that come in no load."""
    warm = replace(cell, length=cell.length or min(options.length))
    asks = _digests(warm, "warm-up", 2 * cell.arrivals.concurrency, options, tokens)
    return [replace(a, max_tokens=WARM_UP) for a in asks]


def _digests(cell: Cell, seed: str, count: int, options: Options, tokens: Callable[[str], int]) -> list[Ask]:
    number = random.Random(seed).randrange(1 << 30)
    return [_ask(s, 0.0, options) for s in tasks.task(DIGEST).samples(count, [cell.length], number, tokens)]


def _turns(first: Ask) -> list[Turn]:
    """A conversation about a text: every turn begins with all that was said before, the answers to which are the text's
    own first sentences, so that every arm is asked the same."""
    said, sentences = list(first.messages), str(first.messages[0]["content"]).split(". ")
    where: dict[str, Any] = {"cluster": first.cluster or first.id, "conversation": first.id}
    found = [Turn(f"{first.id} turn 1", tuple(said), first.max_tokens, **where)]
    for turn, question in enumerate(FOLLOW_UPS):
        said += [{"role": "assistant", "content": f"{sentences[turn % len(sentences)]}."}]
        said += [{"role": "user", "content": question}]
        found.append(Turn(f"{first.id} turn {turn + 2}", tuple(said), first.max_tokens, **where))
    return found


def _ask(sample: Sample, temperature: float, options: Options, repeat: int = 0) -> Ask:
    said = [*sample.before, ("user", sample.context + sample.question + sample.opening)]
    messages = tuple({"role": role, "content": text} for role, text in said)
    seed = random.Random(f"{options.seed} {sample.id} {repeat}").randrange(1 << 31) if temperature else None
    cap = min(sample.max_new_tokens, options.cap)
    return Ask(sample.id, messages, cap, temperature, seed, cluster=sample.cluster)


def _reordered(asks: Sequence[T], key: str) -> list[T]:
    shuffled = list(asks)
    random.Random(f"again {key}").shuffle(shuffled)
    return shuffled if shuffled != list(asks) else shuffled[::-1]
