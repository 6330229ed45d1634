"""Per method: score, what changed against the baseline, bytes, and speed while answering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvsuite.analysis.stats import Interval, mean_interval
from kvsuite.records import Answer

BASELINE = "full"


@dataclass(frozen=True)
class SampleRow:
    """One method on one task. Figures that nothing could be measured for are None."""

    method: str
    n: int
    failed: int
    error: str
    """Why the first failed answer failed."""
    score: Interval | None = None
    pairs: int = 0
    same: int = 0
    """Of ``pairs`` answers, those with the very tokens of the baseline's."""
    nbytes: float | None = None
    """Mean bytes held after the prompt."""
    ratio: float | None = None
    """Those bytes as a part of the baseline's on the same samples."""
    prefill: float | None = None
    decode: float | None = None
    """Tokens per second; the first token of an answer belongs to the prefill."""


def sample_rows(answers: Sequence[Answer]) -> list[SampleRow]:
    """One task's answers of all methods, in order of appearance. Failures count as failures, never as scores."""
    methods = dict.fromkeys(a.method for a in answers)
    good = {m: {a.sample: a for a in answers if a.method == m and a.status == "ok"} for m in methods}
    baseline = good.get(BASELINE, {})
    return [_row(m, [a for a in answers if a.method == m], good[m], baseline) for m in methods]


def _row(method: str, answers: list[Answer], good: dict[str, Answer], baseline: dict[str, Answer]) -> SampleRow:
    errors = [a.error for a in answers if a.status == "failed"]
    counts = (method, len(answers), len(errors), errors[0] if errors else "")
    if not good:
        return SampleRow(*counts)
    mine = list(good.values())
    paired = [(a, baseline[a.sample]) for a in mine if a.sample in baseline]
    scores = [a.score for a in mine if a.score is not None]
    return SampleRow(
        *counts,
        score=mean_interval(scores) if scores else None,
        pairs=len(paired),
        same=sum(a.tokens == b.tokens for a, b in paired),
        nbytes=sum(a.nbytes for a in mine) / len(mine),
        ratio=sum(a.nbytes for a, _ in paired) / sum(b.nbytes for _, b in paired) if paired else None,
        prefill=_rate(sum(a.prompt_tokens for a in mine), sum(a.prefill_seconds for a in mine)),
        decode=_rate(sum(len(a.tokens) - 1 for a in mine), sum(a.decode_share for a in mine)),
    )


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens and seconds > 0 else None
