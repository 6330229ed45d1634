"""A method's answers beside the baseline's and the control's, and failed answers as what they could have been."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvsuite.analysis.effects import Part
from kvsuite.analysis.resample import Floats, Mask
from kvsuite.columns import Arm, Key, align, stack


@dataclass(frozen=True)
class Answered:
    """One arm's answers to the tasks of one evaluation."""

    arm: Arm
    whole: Arm
    """With entries for those that failed, too."""

    @property
    def asked(self) -> set[Key]:
        """What was answered or failed."""
        return set(self.whole.keys)


def apart(base: list[Answered], method: list[Answered]) -> list[Answered]:
    """The baseline's first repeat whose noise no repeat of the method shares, once for each of those: every M_k is
    paired with it as B_k is. Given its answers, all of a prompt's M_k and B_k can change places under the null, so
    that a test may flip the sign of their sum."""
    count = min(len(base) - 1, len(method))
    return [base[count]] * count


def shared(
    name: str,
    base: list[Answered],
    method: list[Answered],
    control: list[Answered],
    expected: int,
    coupled: bool,
) -> list[Part]:
    """A method's repeats with the baseline's, on the samples that both answered, and what noise makes of them. A
    control that answered fewer has a part of its own: it takes no sample from the comparison of the others."""
    count = min(len(base), len(method), len(control) or len(base))
    (mine, theirs, *noise) = (x[:count] for x in (base, method, control) if x)
    stacks = [stack([x.arm for x in arms]) for arms in (mine, theirs, *noise)]
    both = set(stacks[0].keys) & set(stacks[1].keys)
    asked = sum(max(len(one.asked & other.asked), expected) for one, other in zip(mine, theirs, strict=True))
    chosen: list[tuple[list[Arm], bool]] = []
    if noise and not both.isdisjoint(stacks[2].keys):
        whole = both <= set(stacks[2].keys)
        chosen = [(stacks, False)] if whole else [(stacks[:2], False), (stacks, True)]
    elif both:
        chosen = [(stacks[:2], False)]
    found = []
    wholes = [stack([x.whole for x in arms]) for arms in (mine, theirs, *noise)]
    for some, floored in chosen:
        ends = extremes(align(wholes[: len(some)], allow_missing=True)[0])
        parts = [
            Part(first, {name: second}, floor[0] if floor else None, coupled, asked, floored, repeats=count)
            for first, second, *floor in (align(some, allow_missing=True)[0], *(ends or ()))
        ]
        found.append(replace(parts[0], extremes=(parts[1], parts[2])) if ends else parts[0])
    return found


def extremes(arms: Sequence[Arm]) -> tuple[list[Arm], list[Arm]] | None:
    """A baseline, a method and perhaps a control, aligned: with the failures of the method as answers that are wrong
    and empty and those of the others as right and as long as their cap, and the other way round. None without any."""
    if not any(_failed(arm).any() for arm in arms):
        return None
    known = np.array([np.where(_failed(arm), math.nan, arm.cap) for arm in arms])
    cap: Floats = np.where(np.isnan(known).all(0), arms[0].cap, np.nanmax([*known, np.zeros(len(arms[0]))], axis=0))
    poor = [_filled(arm, cap, at != 1) for at, arm in enumerate(arms)]
    return poor, [_filled(arm, cap, at == 1) for at, arm in enumerate(arms)]


def _failed(arm: Arm) -> Mask:
    """(n,): how a failed answer ended is not known."""
    return np.isnan(arm.capped)


def _filled(arm: Arm, cap: Floats, good: bool) -> Arm:
    failed = _failed(arm)
    values: dict[str, Any] = {"score": float(good), "tokens": cap * good, "capped": float(good), "cap": cap}
    filled: dict[str, Floats] = {name: np.where(failed, x, getattr(arm, name)) for name, x in values.items()}
    return replace(arm, score=filled["score"], tokens=filled["tokens"], capped=filled["capped"], cap=filled["cap"])
