"""jsonl: a task of the user's own prompts, ``--kv-tasks jsonl:FILE`` or ``jsonl:FILE#SCORER``.

A line is a JSON object with ``prompt``, or with ``messages`` as in OpenAI's chat completions, the last one the user's.
It may have a ``reference``, an ``id`` and ``max_new_tokens``; other keys are overlooked. With references the task is
one of ``samples``, scored by SCORER (qa-f1 unless given); without any it is one of ``length``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from kvsuite import disk, scorers
from kvsuite.errors import UsageError, unknown
from kvsuite.tasks.base import Evaluation, Sample, Task, Type

LONGEST = 1 << 16
"""Tokens of an answer: the run's cap decides."""
ROLES = ("system", "developer", "user", "assistant")


class Jsonl(Task):
    """Prompts of a file, shuffled by the seed. They have the length they have; no more can be had than the file has."""

    def __init__(self, file: Path, scorer: str, rows: Sequence[Sample]) -> None:
        """``scorer`` is empty where there are no references."""
        self.file, self.scorer, self._rows = file, scorer, rows
        self.name = file.stem
        self.type = cast(Type, scorers.BY_NAME[scorer][1]) if scorer else "chat"
        self.evaluation: Evaluation = "samples" if scorer else "length"

    @classmethod
    def parse(cls, spec: str) -> Jsonl:
        """Of ``jsonl:FILE#SCORER``. Raises UsageError, naming file and line, for what is no sample or cannot be
        scored."""
        path, scorer = spec.removeprefix("jsonl:"), ""
        if not disk.is_there(Path(path)) and "#" in path:
            path, _, scorer = path.rpartition("#")
            if scorer not in scorers.BY_NAME:
                raise unknown(f"scorer of --kv-tasks {spec}:", scorer, scorers.BY_NAME)
        file = Path(path)
        rows = _read(file)
        if not rows[0].reference:
            if scorer:
                raise UsageError(f"{file} has no references, so {scorer} can score nothing")
            return cls(file, "", rows)
        made = cls(file, scorer or "qa-f1", rows)
        for at, row in enumerate(rows, 1):
            try:  # a reference that the scorer does not take, a library that is missing
                made.score(row, "an answer")
            except UsageError as error:
                raise UsageError(f"{file}: sample {at}, {row.id}: {error}") from error
        return made

    @property
    def source(self) -> str:
        """What two tasks of one name must share."""
        return f"{self.file}#{self.scorer}"

    @property
    def spelled(self) -> str:
        return f"{self.name}#{self.scorer}" if self.scorer else self.name

    def fetch(self) -> list[Path]:
        return [self.file]

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        rows = list(self._rows)
        random.Random(f"{self.name} {seed}").shuffle(rows)
        return rows[:count]

    def score(self, sample: Sample, answer: str) -> float | None:
        return float(scorers.BY_NAME[self.scorer][0](answer, sample.reference)) if self.scorer else None


def _read(file: Path) -> list[Sample]:
    found: dict[str, Sample] = {}
    first = None
    for at, line in disk.lines(file):
        try:
            sample = _sample(disk.parsed(line.decode("utf-8-sig")), f"{file.stem}-{at}")
            if sample.id in found:
                raise UsageError(f"the id {sample.id!r} is there twice")
            first = first or sample
            if bool(sample.reference) != bool(first.reference):
                has, had = ("a", "none") if sample.reference else ("no", "one")
                raise UsageError(f"it has {has} reference, but the lines before have {had}")
        except ValueError as error:  # a UsageError is a ValueError
            what = str(error) if isinstance(error, UsageError) else f"not JSON; is it cut off? {error}"
            raise UsageError(f"{file}: line {at}: {what}") from error
        found[sample.id] = sample
    if not found:
        raise UsageError(f"{file} is empty")
    return list(found.values())


def _sample(row: Any, name: str) -> Sample:
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        raise UsageError("not an object with either prompt or messages")
    *before, last = _messages(row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}])
    if last[0] != "user":
        raise UsageError("the last message is not the user's")
    reference, own = row.get("reference"), row.get("id", name)
    if reference is not None and not (isinstance(reference, str) and reference):
        raise UsageError(f"reference is {_shown(reference)}, not a text")
    if not isinstance(own, (str, int)) or own == "":
        raise UsageError(f"id is {_shown(own)}, not a text or a whole number")
    most = row.get("max_new_tokens", LONGEST)
    if not isinstance(most, int) or isinstance(most, bool) or most < 1:
        raise UsageError(f"max_new_tokens is {_shown(most)}, not a whole number of at least 1")
    return Sample(str(own), last[1], "", reference or "", most, before=tuple(before))


def _messages(given: Any) -> list[tuple[str, str]]:
    """Role and text of each. Raises UsageError where one is not the text of a known role."""
    if not isinstance(given, list) or not given:
        raise UsageError("messages is not a list of messages")
    for message in given:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UsageError(f"a message is {_shown(message)}, without a role of {', '.join(ROLES)}")
        if not isinstance(text := message.get("content"), str) or not text.strip():
            raise UsageError(f"what the {message['role']} says is {_shown(text)}, not a text")
    return [(message["role"], message["content"]) for message in given]


def _shown(value: Any) -> str:
    return repr(value)[:40]
