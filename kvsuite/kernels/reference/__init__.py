"""The backend in PyTorch. It defines what is right: every other backend is checked against it."""

from __future__ import annotations

from kvsuite.kernels.context import LayerContext, Needs
from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.kernels.reference.attend import attend, read
from kvsuite.kernels.reference.mass import column_mass
from kvsuite.kernels.reference.store import advance, append, compact, evict, fill, release_empty

__all__ = [
    "NAME",
    "advance",
    "append",
    "attend",
    "column_mass",
    "compact",
    "evict",
    "fill",
    "read",
    "release_empty",
    "supports",
]

NAME = "reference"
ARENA = True
"""Pages of a (row, head) are consecutive, so that they are read as views."""


def supports(layer: LayerContext, k: QuantSpec, v: QuantSpec, needs: Needs) -> str:
    """Everything."""
    return ""
