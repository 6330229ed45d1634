"""Names and sentences that the tables of a run share."""

from __future__ import annotations

from collections.abc import Sequence

from kvsuite.analysis.runs import dtypes
from kvsuite.analysis.shortfall import timed
from kvsuite.analysis.table import Note, State, errors, infos
from kvsuite.analysis.validity import left_out
from kvsuite.records import Run


def served(run: Run) -> bool:
    """Whether servers answered."""
    return "servers" in run.facts


def formats(run: Run) -> str:
    """The number formats of computing and of K and V, where they are not the same, and how many processes shared the
    model."""
    (compute, kv), ranks = dtypes(run), run.facts["environment"].get("tensor_parallel", 1)
    found = str(compute) if compute == kv else f"{compute} compute, {kv} K/V"
    return found if ranks == 1 else f"{found}, tensor parallel {ranks}"


def setting(run: Run) -> str:
    """Model, number formats, threads: what every figure depends on."""
    where = run.facts["environment"]
    if served(run):
        return f"{run.facts['model']['name']}, served"
    device = where["gpu"] or f"{where['threads']} threads"
    return f"{run.facts['model']['name']}, {formats(run)}, {device}"


def dtype_notes(run: Run) -> list[Note]:
    """Both number formats and the reason, where they differ."""
    compute, kv = dtypes(run)
    if compute == kv:
        return []
    reason = run.facts["environment"].get("dtype_reason")
    return [Note(f"Computed in {compute}; K and V are stored in {kv}{f': {reason}' if reason else ''}.")]


def layers(run: Run) -> list[Note]:
    """How a shape's layers that did not run were counted, where some did not."""
    ran, whole = run.facts["model"].get("layers", (1, 1))
    if ran == whole:
        return []
    return infos(
        [
            f"{ran} of {whole} layers ran: times are (time - rest) / {ran} × {whole} + rest, round by round; the rest "
            "is what a step without layers takes, the median of the same rounds. Limits are those of what ran."
        ]
    )


def missing(run: Run) -> list[Note]:
    """How many timed cells are not there."""
    done, asked = timed(run)
    return errors([f"MISSING: {asked - done} of the {asked} cells that this run was to time."] if done < asked else [])


def floor(run: Run, controls: Sequence[tuple[str, int, int]]) -> list[Note]:
    """What each control changed: its name, the answers compared, those that were the baseline's."""
    said, noise = [], "Another order of requests" if served(run) else "Noise of rounding size"
    for name, pairs, same in controls:
        if pairs and same == pairs:
            said.append(f"{name}: all {pairs} answers identical to {run.baseline}'s, so no floor was measured.")
        elif pairs:
            said.append(f"{noise} ({name}) changed {pairs - same} of {pairs} answers.")
    return infos(said)


def failed(failures: Sequence[tuple[str, str]]) -> list[Note]:
    """Why each of some cells or arms failed."""
    return errors([f"FAILED {name}: {error}" for name, error in failures])


WITHOUT: dict[State, str] = {"broken": "its answers are no answers", "differs": "it did not read the same prompts"}


def without(run: Run) -> dict[str, str]:
    """Arms that have no figures, and why, in words."""
    return {arm: WITHOUT[why] for arm, why in left_out(run).items()}
