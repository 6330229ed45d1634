"""Per arm: how many tokens an answer costs against the baseline's answer to the same prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from kvsuite.analysis.endpoints import Endpoints
from kvsuite.analysis.paper import d_shares
from kvsuite.analysis.resample import Design, Floats
from kvsuite.analysis.samples import floored, parted
from kvsuite.analysis.stats import Interval, Ratio, estimate
from kvsuite.columns import Arm
from kvsuite.errors import UsageError
from kvsuite.records import Answer

T = TypeVar("T")
OTHER_SEED = "other seed"
LOOP, PIECE, TIMES = 60, 200, 4
"""Characters that make a loop at least, of a piece at most, and how often it must come."""


@dataclass(frozen=True)
class LengthRow:
    """One arm, all its repeats."""

    method: str
    control: bool
    """Whether it is the baseline with other noise."""
    n: int
    failed: int
    error: str
    pairs: int = 0
    cost: Interval | None = None
    """Σ tokens / Σ tokens of the baseline, same prompts, same cap."""
    tokens: float | None = None
    """Mean tokens of an answer, the cap included."""
    capped: int = 0
    baseline_capped: int = 0
    same: int = 0
    longer: int = 0
    """Answers at least 3/2 as long as the baseline's of noise that no arm shares, and at most 2/3: with no effect there
    are as many of both."""
    shorter: int = 0
    d: tuple[float, float] | None = None
    """The shares with the paper's D ≤ -50 %, which are longer, and D ≥ 50 %."""
    parted: Interval | None = None
    """See ``SampleRow.parted``; of an arm's first answers, one a prompt."""
    ratio: float | None = None
    """Bytes held at the end for each token read and written, as a part of the baseline's: answers differ in length."""

    @property
    def name(self) -> str:
        """The method's, or the control's."""
        return named(self.method, self.control)


Pairs = list[tuple[Answer, Answer]]
"""An arm's answer and the baseline's to the same prompt."""


@dataclass(frozen=True)
class Beside:
    """One arm's answers, each with the baseline's of two kinds."""

    method: str
    control: bool
    answers: list[Answer]
    """Failed ones included."""
    pairs: Pairs
    """With the baseline's of the same noise; of a control with other noise."""
    apart: Pairs
    """With one whose noise no arm shares, so that a method's pairs and the control's part alike: what single answers
    are counted by. The same where the baseline answered once."""

    @property
    def name(self) -> str:
        """The method's, or the control's."""
        return named(self.method, self.control)


def named(method: str, control: bool) -> str:
    """What an arm is called."""
    return f"{method}, {OTHER_SEED}" if control else method


def beside(answers: Sequence[Answer], base: str = "full") -> list[Beside]:
    """One task's answers of all arms, in order of appearance; of a baseline that answered again, it and its control."""
    good: dict[str, dict[int, dict[str, Answer]]] = {}
    arms: dict[str, list[Answer]] = {}
    for a in answers:
        arms.setdefault(a.method, []).append(a)
        there = good.setdefault(a.method, {}).setdefault(a.repeat, {})
        if a.status == "ok":
            there[a.sample] = a
    own = good.get(base, {})
    last = max(own, default=0)
    found = []
    for method, repeats in good.items():
        mine = arms[method]
        alike = [pair for repeat, some in repeats.items() for pair in _paired(some, own.get(repeat, {}))]
        if method != base or not last:
            found.append(Beside(method, False, mine, alike, _apart(repeats, own) if last else alike))
            continue
        itself = [(a, b) for a, b in alike if a.repeat != last]
        found.append(Beside(base, False, [a for a in mine if a.repeat != last], itself, itself))
        one, other = halves([own[repeat] for repeat in sorted(own)])
        pairs = [pair for x, y in zip(other, one, strict=True) for pair in _paired(x, y)]
        noise = _apart({repeat: some for repeat, some in own.items() if repeat != last}, own)
        found.append(Beside(base, True, [a for a in mine if a.repeat == last], pairs, noise))
    return found


def _apart(repeats: dict[int, dict[str, Answer]], own: dict[int, dict[str, Answer]]) -> Pairs:
    return [pair for some in repeats.values() for pair in _paired(some, own[max(own)])]


def _paired(mine: dict[str, Answer], base: dict[str, Answer]) -> Pairs:
    return [(mine[sample], b) for sample, b in base.items() if sample in mine]


def halves(base: list[T]) -> tuple[list[T], list[T]]:
    """Half of the baseline's repeats, and as many others: what they differ by is the noise of sampling. Of three or
    more, none is on both sides."""
    half = len(base) // 2
    return base[:half], base[half : 2 * half]


def length_rows(answers: Sequence[Answer], base: str = "full") -> list[LengthRow]:
    """A row for each of ``beside``. Errors and time-outs are failures, never short answers. Raises UsageError where
    two arms had different caps for a prompt."""
    arms = beside(answers, base)
    costs = _costs({arm.name: arm.pairs for arm in arms if arm.pairs and (arm.method != base or arm.control)})
    return [_row(arm, costs.get(arm.name)) for arm in arms]


def _costs(arms: Mapping[str, Pairs]) -> dict[str, Interval]:
    """`cost_interval` of each; those of the same prompts from the same draws, which take longer than all else."""
    alike: dict[tuple[str, ...], list[str]] = {}
    columns: dict[str, tuple[Floats, Floats, Floats]] = {}
    for name, pairs in arms.items():
        prompts = tuple(a.cluster or a.sample for a, _ in pairs)
        mine, theirs, caps = np.array([(a.length, b.length, a.cap) for a, b in pairs], dtype=float).T
        columns[name] = mine, theirs, caps
        alike.setdefault(prompts, []).append(name)
    found: dict[str, Interval] = {}
    for prompts, names in alike.items():
        asked = [_cost(*columns[name]) for name in names]
        found |= zip(names, estimate(Design.of([""] * len(prompts), prompts), asked), strict=True)
    return found


def _row(arm: Beside, cost: Interval | None) -> LengthRow:
    """``cost`` is that of every arm but the baseline, which costs what it costs."""
    errors = [a.error for a in arm.answers if a.status == "failed"]
    counts = (arm.method, arm.control, len(arm.answers), len(errors), errors[0] if errors else "")
    pairs = arm.pairs
    for a, b in pairs:
        if a.cap != b.cap:
            raise UsageError(f"sample {a.sample}: {a.method} had a cap of {a.cap} tokens, the baseline {b.cap}")
    if not pairs:
        return LengthRow(*counts)
    mine = [a.length for a, _ in pairs]
    held, whole = (_held(answers) for answers in zip(*pairs, strict=True))
    lengths = [(a.length, b.length) for a, b in arm.apart]
    return LengthRow(
        *counts,
        pairs=len(pairs),
        cost=cost or Interval(1, 1, 1),
        tokens=sum(mine) / len(mine),
        capped=sum(a.finish == "length" for a, _ in pairs),
        baseline_capped=sum(b.finish == "length" for _, b in pairs),
        same=sum(a.output_key == b.output_key for a, b in pairs),
        longer=sum(2 * m >= 3 * t for m, t in lengths),
        shorter=sum(3 * m <= 2 * t for m, t in lengths),
        d=d_shares(*np.array([(t, m) for m, t in lengths], dtype=float).T)
        if lengths and all(t for _, t in lengths)
        else None,
        parted=cost and parted([(a, b) for a, b in pairs if a.repeat == pairs[0][0].repeat]),
        ratio=held / whole if held is not None and whole else None,
    )


def _held(answers: Sequence[Answer]) -> float | None:
    """Bytes held at the end for each byte of uncompressed K and V of the same tokens."""
    dense = sum(a.dense_end for a in answers)
    return sum(a.nbytes_end for a in answers) / dense if dense else None


def cost_interval(
    mine: Sequence[float] | Floats,
    theirs: Sequence[float] | Floats,
    caps: Sequence[float] | Floats,
    prompts: Sequence[str] = (),
) -> Interval:
    """Σ mine / Σ theirs over pairs, resampling prompts: independent ones, or those named, several pairs each. One
    prompt has no interval."""
    columns = (np.asarray(x, dtype=float) for x in (mine, theirs, caps))
    design = Design.of([""] * len(prompts), prompts) if prompts else Design.alone(len(mine))
    return estimate(design, [_cost(*columns)])[0]


def _cost(mine: Floats, theirs: Floats, caps: Floats) -> Ratio:
    """Answers that have not changed yet could still vanish or grow to their cap."""
    left = float(np.mean(caps - theirs))
    large = (mine - theirs >= max(left, 1) / 2) | (theirs - mine >= max(float(theirs.mean()), 1) / 2)
    return Ratio(
        mine, theirs, log=True, large=large, room=(1.0, left / max(float(theirs.mean()), 1)), bounds=(0, np.inf)
    )


def capped(base: Arm, margin: float) -> bool:
    """Whether the cap hides longer answers: were all longer by twice the margin, their cost would not be seen to pass
    it."""
    if np.isnan(base.tokens).any():
        return False
    tokens = np.minimum(base.tokens, base.cap)
    return bool(np.minimum((1 + 2 * margin) * tokens, base.cap).sum() < (1 + margin) * tokens.sum())


def ask(design: Design, arm: Arm, base: Arm, reference: Arm, floor: Arm | None, acted: bool = False) -> Endpoints:
    """What the lengths of one method ask: cost against the arm of the same noise; shares of pairs against
    ``reference``, as ``floor`` is, which is known to be noise where it ``acted``. A length is min(tokens, cap). Empty
    without lengths; raises UsageError where the arms' caps differ or are not known."""
    if any(np.isnan(x.tokens).any() for x in (arm, base, reference)):
        return Endpoints()
    for beside in (base, reference, *([floor] if floor is not None else [])):
        same_caps(arm, beside)
    mine, theirs = np.minimum(arm.tokens, arm.cap), np.minimum(base.tokens, base.cap)
    logs = np.log(np.maximum(mine, 1) / np.maximum(theirs, 1))
    asked = Endpoints(
        endpoints={"length": _cost(mine, theirs, base.cap)},
        findings={"log length": Ratio(logs)},
        flips={"log length": logs},
        pairs={"cap hits": (arm.capped == 1).astype(float) - (base.capped == 1)},
    )
    for name, told in (("empty", is_empty), ("loops", loops)):
        if all(t is not None for t in (*arm.text, *base.text)):
            mine_too, theirs_too = (np.array([told(text or "") for text in x.text]) for x in (arm, base))
            asked.pairs[name] = mine_too.astype(float) - theirs_too
    if floor is None or np.isnan(floor.tokens).any():
        return asked
    ref, noise = np.minimum(reference.tokens, reference.cap), np.minimum(floor.tokens, floor.cap)
    shares = {
        "longer": (2 * mine >= 3 * ref, 2 * noise >= 3 * ref),
        "shorter": (3 * mine <= 2 * ref, 3 * noise <= 2 * ref),
    }
    known = floored(design, reference, floor, acted)
    if known.any():
        halved = (2 * mine <= ref).astype(float) - (2 * noise <= ref)
        asked.endpoints["truncation"] = Ratio(
            known * (ref > 0) * halved, known.astype(float), large=halved != 0, bounds=(-1, 1), paired=True
        )
    for name, (one, other) in shares.items():
        beyond = known * (one.astype(float) - other)
        asked.findings[name] = Ratio(beyond, known.astype(float), large=beyond != 0, bounds=(-1, 1), paired=True)
        asked.pairs[name] = beyond
    return asked


def same_caps(one: Arm, other: Arm) -> None:
    """Raises UsageError, naming the sample, where two arms could not become equally long."""
    for at in np.flatnonzero(one.cap != other.cap):
        dataset, sample = one.keys[at]
        caps = " and ".join(
            "none that is known" if np.isnan(x.cap[at]) else f"{x.cap[at]:.0f} tokens" for x in (one, other)
        )
        raise UsageError(
            f"{one.files[dataset]} and {other.files[dataset]}: sample {sample} of {dataset} had different caps, {caps}"
        )


def is_empty(text: str) -> bool:
    """Nothing but white space."""
    return not text.strip()


def loops(text: str) -> bool:
    """Whether a text ends in a loop: its last ``LOOP`` characters or more are one piece of up to ``PIECE`` characters,
    at least ``TIMES`` times over."""
    text = text.rstrip()
    for piece in range(1, PIECE + 1):
        whole = max(TIMES * piece - 2, LOOP)  # what stood between pieces is missing after the last one
        tail = text[-whole:]
        if len(tail) < whole:
            return False
        if tail[piece:] == tail[:-piece]:
            return True
    return False
