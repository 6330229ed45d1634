"""Per arm: how many tokens an answer costs against the baseline's answer to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvsuite.analysis.samples import BASELINE
from kvsuite.analysis.stats import Interval, ratio_interval
from kvsuite.errors import UsageError
from kvsuite.records import Answer


@dataclass(frozen=True)
class LengthRow:
    """One arm: a method, or the baseline with other noise (``repeat`` > 0)."""

    method: str
    repeat: int
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
    """Answers at least 3/2 as long as the baseline's, and at most 2/3: with no effect there are as many of both."""
    shorter: int = 0
    ratio: float | None = None
    """Bytes held at the end against the uncompressed K and V of the same tokens: 1 where the method never acted."""


def length_rows(answers: Sequence[Answer]) -> list[LengthRow]:
    """One task's answers of all arms, in order of appearance. Errors and time-outs are failures, never short answers.
    Raises UsageError where two arms had different caps for a prompt."""
    arms = dict.fromkeys((a.method, a.repeat) for a in answers)
    good = {arm: {a.sample: a for a in answers if (a.method, a.repeat) == arm and a.status == "ok"} for arm in arms}
    baseline = good.get((BASELINE, 0), {})
    rows = []
    for arm in arms:
        errors = [a.error for a in answers if (a.method, a.repeat) == arm and a.status == "failed"]
        counts = (*arm, len(good[arm]) + len(errors), len(errors), errors[0] if errors else "")
        pairs = [(a, baseline[a.sample]) for a in good[arm].values() if a.sample in baseline]
        rows.append(_row(counts, pairs))
    return rows


def _row(counts: tuple[str, int, int, int, str], pairs: list[tuple[Answer, Answer]]) -> LengthRow:
    for a, b in pairs:
        if a.cap != b.cap:
            raise UsageError(f"sample {a.sample}: {a.method} had a cap of {a.cap} tokens, the baseline {b.cap}")
    if not pairs:
        return LengthRow(*counts)
    mine, theirs = [len(a.tokens) for a, _ in pairs], [len(b.tokens) for _, b in pairs]
    dense = sum(a.dense_end for a, _ in pairs)
    return LengthRow(
        *counts,
        pairs=len(pairs),
        cost=ratio_interval(mine, theirs),
        tokens=sum(mine) / len(mine),
        capped=sum(a.finish == "length" for a, _ in pairs),
        baseline_capped=sum(b.finish == "length" for _, b in pairs),
        same=sum(a.tokens == b.tokens for a, b in pairs),
        longer=sum(2 * m >= 3 * t for m, t in zip(mine, theirs, strict=True)),
        shorter=sum(3 * m <= 2 * t for m, t in zip(mine, theirs, strict=True)),
        ratio=sum(a.nbytes_end for a, _ in pairs) / dense if dense else None,
    )
