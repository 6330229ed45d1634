"""GEAR: a quantized cache, its outliers exact, and the rest of its error in low rank."""

from __future__ import annotations

from dataclasses import dataclass

from kvsuite.errors import UsageError
from kvsuite.methods.codecs.gear_l import GearL


@dataclass(frozen=True)
class Gear(GearL):
    """X ≈ Q(X - S) + S + L Rᵀ: as `gear-l`, with outliers S besides, which are exact. A vector is a channel of 32 keys,
    or a token's value. S are its lowest and its highest numbers, ``outliers`` / 2 of a vector each, one at least. They
    are kept in the K/V dtype with their places, a byte each, and neither Q's scales nor L know them. The
    authors' default: 2 %."""

    name = "gear"
    stores = (
        "4-, 2- or 8-bit codes, outliers and their places, a correction of rank 4, and up to 64 last tokens in full"
    )

    outliers: float = 0.02

    def check(self) -> None:
        super().check()
        if not 0 < self.outliers < 0.5:
            raise UsageError(f"{self.name}: outliers={self.outliers:g} must be a share above 0 and below 0.5")

    def exact(self, vector: int) -> int:
        return max(1, round(self.outliers / 2 * vector))
