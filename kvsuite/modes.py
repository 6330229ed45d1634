"""What attends while something is timed, and what records call it."""

from __future__ import annotations

PAGED = "paged"
"""kvsuite's backends, which read a cache's pages."""
MODES = ("eager", "sdpa", "flash-attn")
"""What transformers attends with, over the same caches (`kvsuite.kernels.dense`)."""


def phase_of(what: str, mode: str) -> str:
    """A record's phase of decoding (``decode``) or of a prefill (``prefill``) in a mode."""
    if mode == PAGED:
        return what
    return mode if what == "decode" else f"{mode} {what}"


def mode_of(phase: str) -> tuple[str, str]:
    """The other way round: what was timed, and its mode."""
    for mode in MODES:
        if phase.startswith(mode):
            return phase.removeprefix(mode).strip() or "decode", mode
    return phase, PAGED
