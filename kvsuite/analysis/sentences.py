"""What a run comes to, in sentences for a reader who knows no statistics: one per method, and what it cannot tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvsuite.analysis.serving import stored
from kvsuite.analysis.table import Cell, Row, State, Table
from kvsuite.margins import Margins
from kvsuite.records import Answer, Run, Timing

Tone = Literal["good", "bad", "open"]
DAMAGE = {
    "kl": "its next words drift from the model's (KL {:.3f} beyond noise)",
    "perplexity": "it predicts text {:.0f} % worse",
    "reference": "right answers become less likely ({:.2f} nats a token)",
    "quality": "it loses {:.0f} points of 100 on the tasks",
    "broken": "it breaks {:.0f} % of the answers that were right",
    "length": "its answers are {:.2f} times as long",
    "truncation": "it cuts {:.0f} % of the answers short",
}
GONE: dict[State, tuple[str, str]] = {
    "broken": ("Broken", "Its answers are no answers."),
    "differs": ("Not comparable", "It did not read the same prompts."),
}
"""Of methods that have no figures."""
SMALL = 3e9
"""Parameters below which a model is called small."""
SIZES = {"m": 1e6, "b": 1e9}


@dataclass(frozen=True)
class Sentence:
    """What to do with a method, and why."""

    method: str
    tone: Tone
    lead: str
    """What to do, in a few words."""
    text: str
    """Why; empty where nothing more was measured."""


def sentences(run: Run, tables: Mapping[str, Table]) -> list[Sentence]:
    """One per method that has a verdict, in their order."""
    effects: dict[str, dict[str, Cell]] = {}
    for row in tables["verdicts"].rows if "verdicts" in tables else ():
        cell = row.cells["effect"]
        if cell.verdict != "noise" and row.key[0] != run.baseline:
            effects.setdefault(row.key[0], {})[row.key[1]] = cell
    decided = tables.get("decision", Table("", ""))
    words = {row.key[0]: row.cells for row in decided.rows}
    held = {method: cells["held"].value for method, cells in words.items()} or stored(run)
    return [_sentence(run, method, own, words.get(method, {}), held.get(method)) for method, own in effects.items()]


def _sentence(
    run: Run, method: str, own: Mapping[str, Cell], decided: Mapping[str, Cell], held: float | str | None
) -> Sentence:
    if (gone := own.get("all", Cell()).state) != "ok":
        return Sentence(method, "bad", *GONE[gone])
    where = " for a token" if "servers" in run.facts else ""
    said = [f"it needs {100 * held:.0f} % of the cache's memory{where}"] if isinstance(held, float) else []
    speed = own.get("speed", Cell())
    if isinstance(speed.value, float):
        known = speed.low is not None and speed.high is not None and not speed.low < 1 < speed.high
        said.append(f"decodes {speed.value:.2f} times as fast" + ("" if known else ", within noise"))
    harmful = {name: cell for name, cell in own.items() if name in DAMAGE and cell.verdict == "harmful"}
    if "quality" in harmful:  # which says the same
        harmful.pop("broken", None)
    damage = [DAMAGE[name].format(_figure(name, cell)) for name, cell in harmful.items()]
    tone, lead = _lead(run, own, decided, bool(damage))
    text = "".join(f"{_capital(_joined(x))}. " for x in (damage, said) if x)
    return Sentence(method, tone, lead, text.rstrip())


def _lead(run: Run, own: Mapping[str, Cell], decided: Mapping[str, Cell], damaged: bool) -> tuple[Tone, str]:
    word = str(decided.get("decision", Cell()).value or "")
    if damaged or word.startswith("damaged"):
        return "bad", "Damaged"
    if word:
        good = word.startswith(("use it", "no damage"))
        return "good" if good else "open", _capital(word.replace("cannot tell:", "cannot tell yet:"))
    veto = Margins.of(run.facts).veto
    deciding = [cell for name, cell in own.items() if name != "speed" and name not in veto]
    if not deciding:
        return "open", "Its answers were not judged"
    if any(cell.state == "partial" for cell in deciding):
        return "open", "Cannot tell: answers are missing"
    if all(cell.verdict == "within margin" for cell in deciding):
        return "good", "No damage found"
    return "open", "Cannot tell yet"


def _figure(name: str, cell: Cell) -> float:
    assert isinstance(cell.value, (int, float))
    return 100 * (cell.value - 1) if name == "perplexity" else abs(cell.value)


def _joined(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def limits(run: Run, tables: Mapping[str, Table]) -> list[str]:
    """What this run cannot tell, most important first."""
    name, said = str(run.facts.get("model", {}).get("name", "")), []
    size = re.search(r"(?<![\d.])(\d+(?:\.\d+)?)([mb])(?![a-z])", name.lower())
    if size and float(size[1]) * SIZES[size[2]] < SMALL:
        said.append(
            f"{name} is a small model. It shows damage that a method does, but a larger model may suffer more or less: "
            "measure the model that you will deploy."
        )
    said.append("It speaks of this model, these texts and this machine.")
    lengths = [r.prompt_tokens for r in run.records if isinstance(r, Answer) and r.status == "ok"]
    lengths += [r.length for r in run.records if isinstance(r, Timing) and r.status == "ok"]
    if longest := max(lengths, default=0):
        said.append(f"No context was longer than {longest:,} tokens.")
    rows = tables["verdicts"].rows if "verdicts" in tables else ()
    verdicts = [row for row in rows if row.cells["effect"].verdict != "noise"]
    if veto := _named(verdicts, "not excluded"):
        said.append(f"{_capital(veto)} can only convict here: with so few samples, finding nothing clears no method.")
    if _named(verdicts, "capped"):
        said.append("Answers ended at their cap: longer ones would not have been seen.")
    if run.records and not any(run.is_control(r.method) for r in run.records):
        said.append("No control ran, so it is not known what noise alone does.")
    return said


def _named(rows: Sequence[Row], verdict: str) -> str:
    """The endpoints that have a verdict, as a list in words."""
    names = dict.fromkeys(row.key[-1] for row in rows if row.cells["effect"].verdict == verdict)
    return _joined(list(names))
