"""From one method's answers and the baseline's to the figures of a summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvsuite.analysis.stats import mean_interval


@dataclass(frozen=True)
class Answer:
    """What the analysis needs of one answer. Seconds are wall time; ``decode_share`` is its part of shared steps."""

    id: str
    score: float
    tokens: tuple[int, ...]
    failed: bool
    nbytes: int
    prompt_tokens: int
    prefill_seconds: float
    decode_share: float


def summarize(answers: Sequence[Answer], baseline: Sequence[Answer]) -> dict[str, Any]:
    """Score with its 95 % interval, answers identical to the baseline's, mean bytes held, speeds in tokens per second.

    Failed answers count as failures, neither as scores nor as speed. Figures nothing could be measured for are None.
    """
    good = [a for a in answers if not a.failed]
    other = {a.id: a for a in baseline if not a.failed}
    paired = [(a, other[a.id]) for a in good if a.id in other]
    found: dict[str, Any] = {"n": len(answers), "failed": len(answers) - len(good), "pairs": len(paired)}
    found |= dict.fromkeys(("score", "low", "high", "same", "nbytes", "ratio", "prefill", "decode"))
    if not good:
        return found
    interval = mean_interval([a.score for a in good])
    found |= {"score": interval.mean, "low": interval.low, "high": interval.high}
    found["nbytes"] = sum(a.nbytes for a in good) / len(good)
    found["prefill"] = _rate(sum(a.prompt_tokens for a in good), sum(a.prefill_seconds for a in good))
    # the first token comes with the prefill
    found["decode"] = _rate(sum(len(a.tokens) - 1 for a in good), sum(a.decode_share for a in good))
    if paired:
        found["same"] = sum(a.tokens == b.tokens for a, b in paired)
        found["ratio"] = sum(a.nbytes for a, _ in paired) / sum(b.nbytes for _, b in paired)
    return found


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens and seconds > 0 else None
