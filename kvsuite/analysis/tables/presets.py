"""``kvsuite plan`` without a run: what each preset can decide, and how long it takes, by what published runs showed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvsuite import tasks
from kvsuite.analysis.minutes import Load
from kvsuite.analysis.shipped import DIRECTIONS, Shipped, Spread
from kvsuite.analysis.stats import LEVEL
from kvsuite.analysis.table import Cell, Column, Note, Row, Table, infos
from kvsuite.analysis.tables.decision import UNITS
from kvsuite.analysis.verdict import SPEED, Effect
from kvsuite.engines.request import step_rows
from kvsuite.margins import Margins
from kvsuite.methods import parse_all
from kvsuite.records import is_control
from kvsuite.tasks.reference import PREFIX

KINDS = {"samples": "samples", "length": "chats", "divergence": "documents"}
"""By evaluation, what its tasks are counted in."""


@dataclass(frozen=True)
class Preset:
    """What a preset asks for."""

    name: str
    methods: int
    """Those that are judged."""
    arms: int
    """With the baseline and the controls."""
    samples: Mapping[str, int]
    """By task."""
    batch: Sequence[int]
    length: Sequence[int]
    cap: int
    rounds: int
    together: int
    """Sequences that are decoded together."""
    margins: Margins

    @property
    def counts(self) -> dict[str, int]:
        """Of each kind, those of all tasks: an endpoint rests on them together."""
        found: dict[str, int] = {}
        for task, n in self.samples.items():
            found[kind(task)] = found.get(kind(task), 0) + n
        return found

    def effects(self, known: Shipped) -> dict[str, Effect]:
        """By endpoint, that of a method without an effect, at the strictest levels of Holm's correction. *broken* has
        no spread, but its test."""
        counts = self.counts | {SPEED: self.rounds}
        sizes = {name: counts.get(UNITS.get(name, SPEED), 0) for name in Margins.names()}
        tests = sum(1 + (name == "length") for name, n in sizes.items() if n)
        levels = (LEVEL / (self.methods * tests), LEVEL / self.methods)
        asked = {name: spread for name, spread in known.spreads.items() if sizes[name]}
        return {name: spread.effect(name, sizes[name], self.margins, levels) for name, spread in asked.items()}

    @classmethod
    def of(cls, name: str, raw: Mapping[str, Any], margins: str) -> Preset:
        """Of a preset's options, and of margins in their place. Raises UsageError for such as cannot be."""
        arms = [method.name for method in parse_all([raw["methods"]])]
        numbers = {task: int(n) for task, _, n in (item.rpartition("=") for item in raw["samples"].split(","))}
        batch, length = ([int(x) for x in raw[key].split(",")] for key in ("batch", "length"))
        return cls(
            name=name,
            methods=sum(arm != "full" and not is_control(arm) for arm in arms),
            arms=len(arms),
            samples={task: numbers.get(task, numbers[""]) for task in raw["tasks"].split(",")},
            batch=batch,
            length=length,
            cap=raw["cap"],
            rounds=raw["rounds"],
            together=step_rows(max(batch), raw["device"]),
            margins=Margins.parse(f"{raw['margins']},{margins}"),
        )


def presets(asked: Sequence[Preset], known: Shipped) -> list[Table]:
    """Time and samples of every preset, and which effects they decide."""
    drawn = []
    for preset in asked:
        cells = {what: Cell(n) for what, n in preset.counts.items()} | {"methods": Cell(preset.methods)}
        drawn.append(Row((preset.name,), cells | {"cap": Cell(preset.cap), "time": Cell(seconds(preset, known))}))
    columns = [
        Column("methods", "methods"),
        Column("documents", "documents"),
        Column("reference answers", "references"),
    ]
    columns += [Column("samples", "samples"), Column("chats", "chats"), Column("cap", "at most", "tokens")]
    columns.append(Column("time", "time", "s", "clock"))
    said = [
        f"time: about, with {known.model} on {known.machine}, chats counted with most of their cap; the published run "
        f"of smoke took {known.took / 60:.1f} min there. A run says first how long it will take where it is.",
    ]
    title = "presets (pytest --kv-preset NAME)"
    return [Table("presets", title, ("preset",), columns, drawn, infos(said)), _decides(asked, known)]


def _decides(asked: Sequence[Preset], known: Shipped) -> Table:
    rows = []
    for preset in asked:
        for endpoint, e in preset.effects(known).items():
            veto = endpoint in preset.margins.veto
            scale, unit = (1, "nats") if endpoint in ("kl", "reference") else (100, "%")
            cells = {"samples": Cell(e.n), "margin": Cell(scale * e.margin, unit=unit)}
            cells["needs"] = Cell(math.ceil(e.needed))
            cells["clears"] = Cell("convicts only" if veto else "yes" if e.needed <= e.n else "no")
            cells["harm"] = Cell(scale * harm(e, known.spreads[endpoint]), unit=unit)
            rows.append(Row((preset.name, endpoint), cells))
    columns = [Column("samples", "samples"), Column("margin", "margin"), Column("needs", "needs")]
    columns += [Column("clears", "clears"), Column("harm", "harm from")]
    runs = ", ".join(f"reports/cpu/{run}" for run in dict.fromkeys(s.run for s in known.spreads.values()))
    note = (
        "needs: samples with which a method without an effect is found within its margin 4 times of 5; clears: whether "
        "the preset has them (convicts only: the endpoint clears nobody, and no method needs it to). harm from: the "
        "smallest effect that is found harmful 4 times of 5. Both at the strictest level of Holm's correction. The "
        "spread of KL grows with it. Spreads are those of "
        f"{runs}; broken, which can only convict, has none, since noise broke nothing there. Of your model: kvsuite "
        "plan RUN."
    )
    return Table("decides", "what they decide", ("preset", "endpoint"), columns, rows, [Note(note)])


def kind(task: str) -> str:
    """What a task's samples are called."""
    return "reference answers" if task.startswith(PREFIX) else KINDS[tasks.task(task).evaluation]


def harm(e: Effect, spread: Spread) -> float:
    """The smallest effect that is found harmful 4 times of 5; relative for a ratio."""
    if spread.relative:
        share = e.visible / spread.spread * spread.relative
        return e.margin / (1 - share) if share < 1 else math.inf
    if not e.ratio:
        return e.margin + e.visible
    if DIRECTIONS[e.endpoint] < 0:
        return 1 - e.limits[0] / (1 + e.visible)
    return e.limits[1] * (1 + e.visible) - 1


def seconds(preset: Preset, known: Shipped) -> float:
    """Of a whole run on the machine of the published one."""
    speeds, total = known.speeds, 0.0
    mean = sum(preset.length) / len(preset.length)
    for task, n in preset.samples.items():
        chat = kind(task) == "chats"
        answer = known.answers.get(task, known.answers["chat" if chat else "needle"]) * (preset.cap if chat else 1)
        answers = n * (preset.arms + chat)  # the baseline answers chats again, with other noise
        total += speeds.answering(Load(n, known.prompt if chat else mean, answer), answers, preset.together)
    for _ in range(preset.methods + 1):
        total += sum(speeds.timing_decode(width, preset.rounds) for width in preset.batch for _ in preset.length)
        prefills = preset.length[:1] if preset.name == "smoke" else preset.length
        total += sum(speeds.timing_prefill(length, preset.rounds) for length in prefills)
    return total
