"""hub: a published benchmark by name, ``--kv-tasks hub:NAME/PART@CONFIG``, or of a copy, ``hub:NAME/PART=PATH``.

``benchmarks.toml`` says what each one reads, asks and counts.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import random
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from kvsuite import final_numbers, scorers
from kvsuite.errors import UsageError, unknown
from kvsuite.tasks.base import Sample, Task, Type
from kvsuite.tasks.rows import Rows, Where, fingerprint, load

LONGEST = 1 << 16
"""Tokens of an answer where the benchmark has no limit: the run's cap decides."""
TURNS = 5
"""Questions about one context, as SCBench asks (args.py: max_turns)."""
MESSAGE = 8
"""Tokens that a chat template needs for each message but the last."""
LETTERS = 16
"""Characters that no mean token has: longer texts are too long without being counted."""
RULES: dict[str, Callable[[str, str, dict[str, Any]], float]] = {
    "longbench": lambda part, said, row: scorers.longbench(part, said, row["answers"], row["all_classes"] or ()),
    "longbench-v2": lambda part, said, row: scorers.first_choice(said, row["answer"]),
    "ruler": lambda part, said, row: scorers.ruler(part, said, row["answer"]),
    "gsm8k": lambda part, said, row: final_numbers.last_number(said, row["answer"]),
    "aime": lambda part, said, row: final_numbers.whole_number(said, str(next(iter(row.values())))),
    "mrcr": lambda part, said, row: scorers.after_prefix(said, row["answer"], row["random_string_to_prepend"]),
    "scbench": lambda part, said, row: scorers.scbench(part, said, row["answer"], row.get("options") or ()),
}
"""By the rule's name, of part, answer and the row's columns of reference."""


@dataclass(frozen=True)
class Benchmark:
    """One table of ``benchmarks.toml``, where the fields are explained, with what its part changes."""

    dataset: str
    source: str
    type: Type
    prompt: str
    reference: tuple[str, ...]
    rule: str
    config: str = ""
    split: str = "test"
    file: str = ""
    member: str = ""
    shape: Literal["prompt", "messages", "turns"] = "prompt"
    follow: str = ""
    opening: str = ""
    id: str = ""
    where: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int = LONGEST
    strip: bool = False
    plain: bool = False
    long: Literal["cut", "leave out"] = "leave out"
    chance: float = 0.0
    whole: bool = False


class Hub(Task):
    """Rows of a published dataset, shuffled by the seed, asked and scored as published. They have the length they have;
    what is too long for the model is cut in its middle or left out, as the benchmark does."""

    literal = False  # a reference is JSON of columns

    def __init__(self, name: str, part: str, benchmark: Benchmark, place: str = "") -> None:
        self.name, self.part, self.benchmark, self.place = name, part, benchmark, place
        self.type = benchmark.type

    @classmethod
    def parse(cls, spec: str) -> Hub:
        """Of ``hub:NAME/PART@CONFIG=PATH``; all but the name may be missing. Raises UsageError with the nearest known
        name."""
        named, _, place = spec.removeprefix("hub:").partition("=")
        path, _, config = named.partition("@")
        name, _, part = path.partition("/")
        if name not in table():
            raise unknown("benchmark of --kv-tasks hub:", name, table())
        entry = dict(table()[name])
        parts = entry.pop("parts", {})
        if part not in parts and (part or (parts and not entry.get("whole"))):
            raise unknown(f"part of --kv-tasks hub:{name}/", part, parts)
        entry |= parts.get(part, {}) | ({"config": config} if config else {})
        for key in ("config", "member"):
            entry[key] = entry.get(key, "").replace("{part}", part)
        entry["where"] = {key: part if v == "{part}" else v for key, v in entry.get("where", {}).items()}
        return cls(named, part, Benchmark(**entry | {"reference": tuple(entry["reference"])}), place)

    @property
    def source(self) -> str:
        return self.place

    @cached_property
    def rows(self) -> Rows:
        """The dataset's, of this part. Raises UsageError where they cannot be had."""
        b = self.benchmark
        rows = load(Where(b.dataset, b.config, b.split, b.file, b.member, self.place))
        for column, value in b.where.items():
            rows = Picked(rows, [at for at, row in enumerate(_column(rows, column)) if row == value])
        if not rows:
            raise UsageError(f"hub:{self.name}: {b.dataset} has no rows of it")
        return rows

    def fetch(self) -> list[Path]:
        """Its rows, of which one is tried. They are no files of the user's: `fingerprint` tells them."""
        for sample in self._samples(0):
            self.score(sample, "an answer")  # a library that is missing, a reference that the rule does not take
        return []

    def fingerprint(self) -> str:
        return fingerprint(self.rows)

    def samples(self, count: int, lengths: Sequence[int], seed: int, tokens: Callable[[str], int]) -> list[Sample]:
        order, found, cut, left_out = list(range(len(self.rows))), list[Sample](), 0, 0
        random.Random(f"{self.name} {seed}").shuffle(order)
        for at in order:
            if len(found) >= count:
                break
            row = list(self._samples(at))
            over = max(self._over(sample, tokens) for sample in row)
            if over > 0 and self.benchmark.long == "leave out":
                left_out += 1
                continue
            if over > 0:
                row = [_shortened(sample, over, tokens) for sample in row]
                cut += min(len(row), count - len(found))
            found += row
        if not found:
            raise UsageError(f"hub:{self.name}: no prompt fits the model's context")
        done = {"cut in the middle": cut, "rows left out as too long": left_out}
        self.fitted = {what: number for what, number in done.items() if number}
        return found[:count]

    def score(self, sample: Sample, answer: str) -> float:
        return RULES[self.benchmark.rule](self.part, answer, json.loads(sample.reference))

    def __getstate__(self) -> dict[str, Any]:
        """Without the rows: a process that answers only scores."""
        return {key: value for key, value in vars(self).items() if key != "rows"}

    def _over(self, sample: Sample, tokens: Callable[[str], int]) -> float:
        """Tokens by which a prompt is too long."""
        room = self.room(sample.max_new_tokens)
        text = "\n".join([*(said for _, said in sample.before), sample.context + sample.question + sample.opening])
        if self.benchmark.long == "leave out" and len(text) > LETTERS * room:
            return math.inf
        return tokens(text) + MESSAGE * len(sample.before) - room

    def _samples(self, at: int) -> Iterator[Sample]:
        """Those of one row. Raises UsageError where it is not of the published shape."""
        b, row = self.benchmark, dict(self.rows[at])
        try:
            if b.strip:
                row = {key: value.strip() if isinstance(value, str) else value for key, value in row.items()}
            name = f"{self.part or self.name}-{row[b.id] if b.id else at}"
            if b.shape == "turns":
                yield from self._turns(name, row)
                return
            before: list[tuple[str, str]] = []
            context, question = _prompt(b.prompt, row)
            if b.shape == "messages":
                context, (*before, (_, question)) = (
                    "",
                    [(said["role"], said["content"]) for said in json.loads(context)],
                )
            reference = {column: row[column] for column in b.reference}
            yield self._sample(name, context, question, reference, tuple(before), b.opening.format(**row))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"hub:{self.name}: row {at} is not of the shape that was published ({type(error).__name__}: {error}); "
                f"it has {', '.join(sorted(row))}"
            ) from error

    def _turns(self, name: str, row: Mapping[str, Any]) -> Iterator[Sample]:
        """Every turn with those before it and their right answers."""
        b, before = self.benchmark, tuple[tuple[str, str], ...]()
        for at, turn in enumerate(row["multi_turns"][:TURNS]):
            columns = {**row, **turn}
            if target := re.search("The .+ is", turn["input"]):  # scbench_mf: What is the largest number?
                columns["target"] = target[0].lower()[:-3]
            context, question = ("", b.follow.format(**columns)) if at else _prompt(b.prompt, columns)
            reference = {column: turn[column] for column in b.reference}
            yield self._sample(f"{name}-turn-{at}", context, question, reference, before, cluster=name)
            before += (("user", context + question), ("assistant", str(turn["answer"])))

    def _sample(
        self, name: str, context: str, question: str, reference: dict[str, Any],
        before: tuple[tuple[str, str], ...], opening: str = "", cluster: str = "",
    ) -> Sample:  # fmt: skip
        b = self.benchmark
        if question and not cluster:
            cluster = hashlib.sha256(context.encode()).hexdigest()[:12]
        wanted = json.dumps(reference, ensure_ascii=False)
        return Sample(
            name, context, question, wanted, b.max_new_tokens, cluster, before,
            chance=b.chance, opening=opening, plain=b.plain,
        )  # fmt: skip


@dataclass(frozen=True)
class Picked(Sequence[Mapping[str, Any]]):
    """Some of the rows, read where they are asked for."""

    rows: Rows
    places: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at: Any) -> Any:
        return self.rows[self.places[at]]


@cache
def table() -> dict[str, dict[str, Any]]:
    """``benchmarks.toml``, with what one benchmark takes of another."""
    found = tomllib.loads(Path(__file__).with_name("benchmarks.toml").read_text(encoding="utf-8"))
    for name, entry in found.items():
        if like := entry.pop("like", ""):
            found[name] = {**found[like], **entry}
            if of := found[name].pop("of", None):
                found[name]["parts"] = {part: found[like]["parts"][part] for part in of}
    return found


def _column(rows: Rows, name: str) -> Sequence[Any]:
    return [row[name] for row in rows] if isinstance(rows, list) else rows[name]  # type: ignore[call-overload]


def _prompt(template: str, columns: Mapping[str, Any]) -> tuple[str, str]:
    """Context and question of a prompt: what follows {context} is the question; without one, all is the context."""
    first, place, rest = template.partition("{context}")
    if place:
        return (first + place).format(**columns), rest.format(**columns)
    return template.format(**columns), ""


def _shortened(sample: Sample, over: float, tokens: Callable[[str], int]) -> Sample:
    """The same with so many tokens fewer in the middle of the first message: of what may stay the first half and the
    last half, as LongBench's pred.py does."""
    first = sample.before[0][1] if sample.before else sample.context + sample.question
    half = int(tokens(first) - over) // 2
    if half < 1:
        raise UsageError(f"sample {sample.id} does not fit the model's context, whatever is cut out of its prompt")
    sizes = range(len(first) + 1)
    end = bisect.bisect_right(sizes, half, key=lambda size: tokens(first[:size])) - 1
    last = bisect.bisect_right(sizes, half, key=lambda size: tokens(first[len(first) - size :])) - 1
    start = max(end, len(first) - last)
    if sample.before:
        role, _ = sample.before[0]
        return replace(sample, before=((role, first[:end] + first[start:]), *sample.before[1:]))
    edge = len(sample.context)
    return replace(
        sample,
        context=first[: min(end, edge)] + first[min(start, edge) : edge],
        question=first[edge : max(end, edge)] + first[max(start, edge) :],
    )
