"""What a task is, and how one is found by name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvsuite import environment
from kvsuite.errors import UsageError, first_line
from kvsuite.registry import Registry, classes

Type = Literal["qa", "summarization", "few-shot", "synthetic", "code", "chat", "text"]

Evaluation = Literal["samples", "length", "divergence", "throughput"]
PROMPT_END = 400


@dataclass(frozen=True)
class Sample:
    """One prompt with its reference. ``context`` + ``question`` is the user's message."""

    id: str
    context: str
    question: str
    reference: str
    max_new_tokens: int
    cluster: str = ""
    """The document it was made of, where several samples can be made of one: they are not independent."""
    before: tuple[tuple[str, str], ...] = ()
    """Role and text of the messages before the user's."""
    chance: float = 0.0
    """What guessing scores on average: an answer that names any one of what could be right."""
    opening: str = ""
    """The first words of the answer, which are given."""
    plain: bool = False
    """Whether it is asked without the model's chat template, as a text to be continued."""

    @property
    def prompt_hash(self) -> str:
        """The first 16 digits of the sha256 of all messages, as a JSON list of role and text."""
        said = [*self.before, ("user", self.context + self.question)]
        said += [("assistant", self.opening)] if self.opening else []
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]

    @property
    def prompt_end(self) -> str:
        """The last ``PROMPT_END`` characters of the user's message: what is recorded of it."""
        return (self.context + self.question)[-PROMPT_END:]


FRAME = 160
"""Tokens that a chat template and an answer need beside a prompt, or a document's continuation."""


class Task:
    """A named set of samples with a scorer."""

    name: str
    type: Type
    evaluation: Evaluation = "samples"
    """What its answers are for: their scores, their lengths, or the time they take; *divergence*: there is no answer,
    the reference is forced through every arm's cache."""
    fitted: Mapping[str, int] = {}
    """What was done to how many of its samples so that they fit the model; written to ``run.json``."""

    limit: int | None = None
    """The most tokens that a prompt and its answer can have; the run says, which knows the model. None: not known."""
    cap: float = math.inf
    """The most tokens of an answer; the run says."""

    def room(self, answer: int) -> float:
        """The tokens that a prompt may have before an answer of at most so many; infinite where nobody knows."""
        return math.inf if self.limit is None else self.limit - FRAME - min(answer, self.cap)

    literal: bool = True
    """Whether a reference is an answer as the model would write it, which can be forced."""

    @property
    def spelled(self) -> str:
        """Canonical text: the name, and how answers are scored where that was chosen."""
        return self.name

    def fetch(self) -> Iterable[Path]:
        """Make sure its texts are here and name their files. Raises UsageError that says what to run."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """What its texts are, in a hash."""
        return environment.fingerprint(self.fetch())

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        """``count`` samples; prompts of about ``lengths`` tokens in turn, as ``tokens`` counts them. The same arguments
        give the same samples."""
        raise NotImplementedError

    def references(self) -> Mapping[str, str]:
        """Of a task of chats, good answers by sample id, which nothing scores by; samples may have none."""
        return {}

    def score(self, sample: Sample, answer: str) -> float | None:
        """From 0 to 1, or None where there is nothing to compare with."""
        raise NotImplementedError


def after_thinking(text: str) -> str:
    """What an answer says after its thinking aloud, which ends at ``</think>`` (Qwen3, DeepSeek-R1; some templates
    open it in the prompt); empty where the answer ended before."""
    _, end, answer = text.rpartition("</think>")
    return answer.strip() if end else "" if text.lstrip().startswith("<think>") else text


SCORED = 1 << 16
"""Characters of an answer that are scored, its first ones; what a server sends has 256 times as many at most."""


def scored(task: Task, sample: Sample, text: str) -> tuple[float | None, str]:
    """The score of what an answer says after its thinking, and why there is none where its scorer failed, which costs
    that answer alone."""
    try:
        return task.score(sample, after_thinking(text)[:SCORED]), ""
    except Exception as error:
        return None, f"its score: {first_line(error)}"


TASKS = Registry(
    "task", "tasks", classes(Task), ("kvsuite.tasks",), ("base", "hub", "jsonl", "messages", "reference", "rows")
)
_FILES: dict[str, Task] = {}
"""The tasks that the user named by what they are made of, by name."""


def names() -> list[str]:
    """All tasks that have a name of their own."""
    return sorted(TASKS.names())


def made() -> list[str]:
    """The tasks that were made of the user's prompts, and of published benchmarks."""
    return list(_FILES)


def task(name: str) -> Task:
    """The task of that name; ``jsonl:FILE`` and ``hub:NAME`` make one, which from then on has the name of the file, or
    NAME; ``reference:TASK`` makes one of another's references. Raises UsageError with the nearest known name, and for a
    file that is not whole."""
    if name.startswith("reference:"):
        from kvsuite.tasks.reference import Reference

        return Reference(task(name.removeprefix("reference:")))
    if name.startswith(("jsonl:", "hub:")):
        return _made(name)
    if name in _FILES:
        return _FILES[name]
    module = TASKS.module(name)
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Task) and getattr(value, "name", "") == name:
            return value()
    raise UsageError(f"{module.__name__} defines no task {name!r}")


def _made(spec: str) -> Task:
    from kvsuite.tasks.hub import Hub
    from kvsuite.tasks.jsonl import Jsonl

    made: Hub | Jsonl = Hub.parse(spec) if spec.startswith("hub:") else Jsonl.parse(spec)
    known = _FILES.get(made.name)
    if made.name in names() or (isinstance(known, (Hub, Jsonl)) and known.source != made.source):
        raise UsageError(f"--kv-tasks {spec}: there is a task {made.name!r} already; give the file another name")
    if known is None or isinstance(made, Jsonl):  # a benchmark keeps the rows that it has loaded
        _FILES[made.name] = made
    return _FILES[made.name]
