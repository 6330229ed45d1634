"""KVzip+: KVzip's weights by what they write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvsuite.methods.selectors.kvzip import KVzip


@dataclass(frozen=True)
class KVzipPlus(KVzip):
    """As `kvzip`, but each attention weight is divided by ‖h‖₂, the norm of the query's hidden state before the
    projections, and multiplied by ‖W_O v‖₂, the norm of what the token's value writes by that query head, before the
    largest is taken. KVzap predicts the logarithm of this score. Written KVzip+ by its authors.
    Defaults as for `kvzip`."""

    name = "kvzip-plus"
    stores = "sinks and the tokens that write most when the context is repeated, per kv head"
    source = "Jegou & Jeblick 2026, arXiv 2601.07891; kvpress kvzip_press.py (kvzip_plus_normalization)"
    normalized: ClassVar[bool] = True
