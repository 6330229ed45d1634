"""Whether a longer answer to a chat is also a worse one: how close answers are in meaning to a reference answer and to
the baseline's (``kvsuite verbosity``), beside the same of the baseline's own noise.

Every answer stands beside the baseline's last one, whose noise no arm shares (``length.beside``), so that a method's
answers and the control's may part alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from kvsuite.analysis.length import Beside, Pairs, beside
from kvsuite.analysis.resample import Design
from kvsuite.analysis.stats import Estimate, Ratio, estimate
from kvsuite.readers.run import by_task
from kvsuite.records import Answer, Job, Run, Similarity

SEEN = 256
"""Word pieces of a text that the embedder is given, as all-MiniLM-L6-v2 was made for; what comes after is left out."""


@dataclass(frozen=True)
class Verbosity:
    """One arm's answers to the chats of a task, each beside the baseline's last."""

    name: str
    control: bool
    """Whether it differs from the baseline by noise alone."""
    pairs: int
    referenced: int
    """Pairs to whose prompt there is a reference answer."""
    change: Estimate | None
    """Similarity to the reference less that of the baseline's answer."""
    baseline: Estimate | None
    """Similarity to the baseline's answer."""
    beyond: Estimate | None
    """That less the controls' to the same prompt; None of a control, or where there is none."""
    longer: int
    """Pairs whose answer is at least 3/2 as long as the baseline's."""
    longer_change: Estimate | None
    """``change`` of those alone."""
    longer_baseline: Estimate | None
    verbose: int
    """By the paper's rule, Q ≤ Q_full and L ≥ L_full, with the similarity to the reference for Q: of ``differing``."""
    differing: int
    """Pairs with a reference that are not the same to the letter: such ones would all be verbose by that rule."""
    cut: int
    """Answers of which the embedder saw the first ``SEEN`` word pieces alone."""


def job(a: Answer) -> Job:
    """That of an answer's `Similarity`."""
    return Job("verbosity", a.method, a.task, a.sample, a.repeat)


def arms(run: Run) -> dict[str, list[Beside]]:
    """By task of chats, all that are to be compared with the baseline: not itself."""
    found = {}
    for task, known in by_task(run, "length").items():
        some = beside(known, run.baseline)
        found[task] = [arm for arm in some if arm.apart and (arm.control or arm.method != run.baseline)]
    return found


def verbosity(run: Run) -> dict[str, list[Verbosity]]:
    """By task, every arm of which similarities were measured."""
    there = {r.job: r for r in run.records if isinstance(r, Similarity) and r.status == "ok"}
    found = {}
    for task, some in arms(run).items() if there else ():
        known = [(arm, [(a, b) for a, b in arm.apart if job(a) in there and job(b) in there]) for arm in some]
        noise: dict[str, list[float]] = {}
        for arm, pairs in known:
            for a, _ in pairs if arm.control or run.is_control(arm.method) else ():
                if (cosine := there[job(a)].baseline) is not None:
                    noise.setdefault(a.sample, []).append(cosine)
        rows = [
            _row(arm, arm.control or run.is_control(arm.method), pairs, there, noise) for arm, pairs in known if pairs
        ]
        if rows:
            found[task] = rows
    return found


def _row(
    arm: Beside, control: bool, pairs: Pairs, there: Mapping[Job | None, Similarity], noise: Mapping[str, list[float]]
) -> Verbosity:
    every = [(a, b, there[job(a)], there[job(b)]) for a, b in pairs]
    longer = [2 * a.length >= 3 * b.length and a.length > b.length for a, b in pairs]
    near = [(a, x.baseline) for a, _, x, _ in every]
    changes = [
        (a, None if x.reference is None or y.reference is None else x.reference - y.reference) for a, _, x, y in every
    ]
    below = [
        (a, x - float(np.mean(noise[a.sample]))) for a, x in near if not control and x is not None and a.sample in noise
    ]
    differing = [
        (a, b, c)
        for (a, b), (_, c) in zip(pairs, changes, strict=True)
        if a.output_key != b.output_key and c is not None
    ]
    return Verbosity(
        arm.name,
        control,
        len(pairs),
        sum(c is not None for _, c in changes),
        _mean(changes),
        _mean(near),
        _mean(below),
        sum(longer),
        _mean(itertools.compress(changes, longer)),
        _mean(itertools.compress(near, longer)),
        sum(c <= 0 and a.length >= b.length for a, b, c in differing),
        len(differing),
        sum(x.pieces > SEEN for _, _, x, _ in every),
    )


def _mean(figures: Iterable[tuple[Answer, float | None]]) -> Estimate | None:
    """Of those that are there, with the interval of prompts; None where there are none."""
    found = [(a.cluster or a.sample, x) for a, x in figures if x is not None]
    if not found:
        return None
    prompts, values = zip(*found, strict=True)
    return estimate(Design.of([""] * len(found), prompts), [Ratio(np.array(values))])[0]
