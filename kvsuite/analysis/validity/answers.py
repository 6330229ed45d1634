"""Checks of what was answered: whether the baseline is one, and whether answers are answers, to the same prompts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from functools import lru_cache

from kvsuite.analysis import length
from kvsuite.analysis.calls import called
from kvsuite.analysis.garbled import SHARE, Check, orderless
from kvsuite.analysis.pressure import pressed
from kvsuite.analysis.serving import checks, sense
from kvsuite.analysis.stats import mean_interval
from kvsuite.analysis.validity.outcome import ALL, ANSWERS, APART, NOTHING, Outcome, answered
from kvsuite.margins import Margins
from kvsuite.readers.run import answers, arms
from kvsuite.records import Run

EDGE = 0.05
"""How far above what guessing scores a baseline must be known to score."""
SHOWN = 160
"""Characters of an example."""
NOISE = 0.01
"""How often noise alone may look like damage, in answers under pressure and in tool calls."""
FEW = 8
"""How many prompts the baseline must answer by valid tool calls: that all of these are lost can just be told."""


def scores(run: Run) -> Iterator[Outcome]:
    """Whether the baseline scores more than guessing does. A task in which it does not is in the mean score all the
    same, since leaving out what the baseline got wrong by chance would make every method look worse."""
    above, guessed = _scored(run)
    if guessed:
        more = "In the mean over all tasks that hides what others lose" if above else "Nothing can be lost there"
        text = (
            f"quality: it scores {'; '.join(guessed)}, not shown to be above guessing. {more}: give tasks that "
            "the model can do"
        )
        hides = NOTHING if above else frozenset({"quality", "broken"})
        yield Outcome(run.baseline, "scores", "COULD NOT TELL", text, hides)


def baseline(run: Run) -> Iterator[Outcome]:
    """Whether the baseline is one: its answers make sense, and end by themselves."""
    above, _ = _scored(run)
    bad, told = sense(run)
    state = orderless(bad, told)
    if above and state == "could not tell":
        state = "passed"
    if state == "failed":
        text = f"{bad} of its {told} answers make no sense by themselves: nothing can be concluded; look at its log"
        yield Outcome(run.baseline, "sense", "BROKEN", text, ALL)
    elif state == "could not tell":
        needed = next(n for n in range(told, 1000) if orderless(0, n) == "passed")
        text = f"whether its answers make sense: {told} are long enough to tell, it takes {needed}, or a task scored"
        yield Outcome(run.baseline, "sense", "COULD NOT TELL", text, ALL)
    else:
        yield Outcome(run.baseline, "sense")
    chats = arms(run, "length").get((run.baseline, 0))
    if chats is not None and length.capped(chats, Margins.of(run.facts).length):
        ended = round(float((chats.capped == 1).sum()))
        text = f"length: {ended} of {len(chats)} answers end at their cap, where longer ones would; raise --kv-cap"
        yield Outcome(run.baseline, "cap", "COULD NOT TELL", text)


@lru_cache(maxsize=2)
def _scored(run: Run) -> tuple[list[str], list[str]]:
    """Tasks in which the baseline is known to be above chance, and those in which it is not, in words."""
    scores: dict[str, list[tuple[float, float]]] = {}
    for a in answers(run, "samples"):
        if a.method == run.baseline and a.status == "ok" and a.score is not None:
            scores.setdefault(a.task, []).append((a.score, a.chance))
    above, guessed = [], []
    for task, found in scores.items():
        mean, chance = (statistics.fmean(x) for x in zip(*found, strict=True))
        low = mean_interval([score for score, _ in found]).low
        if low < chance + EDGE:
            guessed.append(f"{mean:.2f} on {len(found)} samples of {task} (guessing: {chance:.2f})")
        else:
            above.append(task)
    return above, guessed


def garbled(run: Run) -> Iterator[Outcome]:
    """Whether answers are answers."""
    for arm, check in checks(run).items():
        if check.state == "failed":
            yield Outcome(arm, "answers", "BROKEN", broken_text(check), ALL, "broken")
        elif check.state == "could not tell":
            yield Outcome(arm, "answers", "COULD NOT TELL", _untold(check), ALL)
        else:
            yield Outcome(arm, "answers")


def broken_text(check: Check) -> str:
    """In which ways its answers are none, with an example."""
    signs = [s for s in check.signs if s.failed]
    failed = ", ".join(f"{s.name} {s.count} of {s.n}{_where(s.where)}{_floor(s.floor)}" for s in signs)
    said = f"its answers are no answers: {failed or 'none of them is'}"
    if check.example is not None:
        both = _cut(check.example.baseline), _cut(check.example.variant)
        said += f". {' '.join(check.example.sample)}: the baseline said {both[0]}, it said {both[1]}"
    return f"{said}. It is in no ranking"


def _where(where: tuple[int, int, int] | None) -> str:
    names = zip(("start", "middle", "end"), where or (), strict=False)
    return f" ({', '.join(f'{name} {count}' for name, count in names)})" if where else ""


def _floor(floor: int | None) -> str:
    return "" if floor is None else f", A/A {floor}"


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + " …")


def _untold(check: Check) -> str:
    share = f"whether its answers are answers: garbage in {SHARE:.0%} of them"
    if math.isinf(check.needed):
        return f"{share} could not be told from what noise does here, however many prompts there were"
    return (
        f"{share} would show in {check.needed:,.0f} prompts with long, scored or equal answers, there are "
        f"{check.told:,}; raise --kv-samples or --kv-cap, or time it, too"
    )


def prompts(run: Run) -> Iterator[Outcome]:
    """Whether every arm read the same prompts: a template, a system message or a half can be lost on the way."""
    read: dict[str, dict[tuple[object, ...], int]] = {}
    for r in answered(run):
        if r.evaluation != "goodput":
            read.setdefault(r.method, {})[r.task, r.cell, r.block, r.sample] = r.prompt_tokens
    base = {key: n for key, n in read.get(run.baseline, {}).items() if n}
    for arm, mine in ((arm, mine) for arm, mine in read.items() if arm != run.baseline):
        known = {key: n for key, n in mine.items() if n}
        shared = known.keys() & base.keys()
        apart = [key for key in shared if known[key] != base[key]]
        if not shared:
            who = "neither" if not (known or base) else "not both"
            text = f"whether it reads the prompts that the baseline reads: {who} of them say how many tokens these have"
            hides = NOTHING if not (known or base) else ALL
            yield Outcome(arm, "prompts", "COULD NOT TELL", text, hides)
        elif len(apart) > APART * len(shared):
            means = [statistics.fmean(x[key] for key in apart) for x in (known, base)]
            yield Outcome(
                arm, "prompts", "DIFFERS",
                f"not the same prompt: it read {means[0]:,.0f} tokens where the baseline read {means[1]:,.0f}, in "
                f"{len(apart)} of {len(shared)} requests. Serve the same model with the same chat template, and look "
                "for a gateway that changes messages. It is in no ranking",
                ALL, "differs",
            )  # fmt: skip
        else:
            yield Outcome(arm, "prompts")


def under_pressure(run: Run) -> Iterator[Outcome]:
    """Whether pools were full, and what that did to answers."""
    arms = pressed(run)
    base = next((p for p in arms if p.arm == run.baseline), None)
    for p in arms:
        if p.preempted is None:
            text = "pressure: whether its pool was full: it does not count preemptions"
            yield Outcome(p.arm, "pressure", "COULD NOT TELL", text)
        elif not p.preempted:
            more = f"; raise --kv-requests to {math.ceil(4 * p.room / p.size):,}" if p.room else ""
            load = f"{p.asked} requests at once of {p.size:,.0f} tokens"
            text = f"pressure: nothing was preempted by {load}{more}, or give it a smaller pool"
            yield Outcome(p.arm, "pressure", "COULD NOT TELL", text)
        elif base and p.adjusted <= NOISE:
            text = (
                f"with a full pool {p.changed} of {p.n} answers are others than without, of the baseline's "
                f"{base.changed} of {base.n}: what is preempted, or asked beside so many, is answered otherwise"
            )
            yield Outcome(p.arm, "pressure", "DIFFERS", text, ANSWERS)
        else:
            yield Outcome(p.arm, "pressure")


def tool_calls(run: Run) -> Iterator[Outcome]:
    """Whether tool calls are calls."""
    arms = called(run)
    base = next((c for c in arms if c.arm == run.baseline), None)
    if base is None:
        return
    if base.valid < FEW:
        text = (
            f"tool calls: its own are valid for {base.valid} of {base.n} prompts; serve a model that calls tools "
            "(vLLM: --enable-auto-tool-choice --tool-call-parser), raise --kv-cap or --kv-requests"
        )
        yield Outcome(base.arm, "calls", "COULD NOT TELL", text)
        return
    for c in arms:
        if c.adjusted <= NOISE:
            text = (
                f"its tool calls are valid for {c.valid} of {c.n} prompts, the baseline's for {base.valid} of {base.n}"
            )
            yield Outcome(c.arm, "calls", "BROKEN", text, ALL)
        else:
            yield Outcome(c.arm, "calls")
