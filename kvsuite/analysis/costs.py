"""What answers took of the machine: a prefill that served several arms counts once."""

from __future__ import annotations

from collections.abc import Collection

from kvsuite.readers.run import answers
from kvsuite.records import Run


def sample_seconds(run: Run, evaluation: str, arms: Collection[tuple[str, int]] = ()) -> float:
    """Mean seconds of a sample of one evaluation, answered by these arms, (method, repeat), or by all. 0 without an
    answer. Earlier runs did not record what was shared: it counts once an arm there."""
    shared: dict[tuple[str, str], set[float]] = {}
    own: dict[tuple[str, int], list[float]] = {}
    for a in answers(run, evaluation):
        if a.status == "ok" and (not arms or (a.method, a.repeat) in arms):
            own.setdefault((a.method, a.repeat), []).append(a.seconds - a.shared_seconds)
            shared.setdefault((a.task, a.sample), set()).add(a.shared_seconds)  # one prefill, one measurement
    each = sum(sum(mine) / len(mine) for mine in own.values())
    return each + sum(map(sum, shared.values())) / len(shared) if shared else 0.0
