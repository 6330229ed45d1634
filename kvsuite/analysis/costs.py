"""What answers took of the machine: a prefill that served several arms counts once."""

from __future__ import annotations

from collections.abc import Collection

from kvsuite.readers.run import answers
from kvsuite.records import Run


def sample_seconds(run: Run, evaluation: str, arms: Collection[tuple[str, int]] = ()) -> float:
    """Mean seconds of a sample of one evaluation, answered by these arms, (method, repeat), or by all. 0 without an
    answer. Earlier runs did not record what was shared: it counts once an arm there."""
    shared: dict[tuple[str, str, int], float] = {}
    own: dict[tuple[str, int], list[float]] = {}
    for a in answers(run, evaluation):
        if a.status == "ok" and (not arms or (a.method, a.repeat) in arms):
            who, sample = (a.method, a.repeat), (a.task, a.sample, a.repeat)
            own.setdefault(who, []).append(a.seconds - a.shared_seconds)
            shared[sample] = max(a.shared_seconds, shared.get(sample, 0.0))
    samples = {(task, sample) for task, sample, _ in shared}
    each = sum(sum(mine) / len(mine) for mine in own.values())
    return each + sum(shared.values()) / len(samples) if samples else 0.0
