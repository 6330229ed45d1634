"""The control: the uncompressed cache with noise the size of a rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.methods.base import Codec
from kvsuite.methods.codecs.full import Plain

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.kernels.context import LayerContext
    from kvsuite.methods.artifact import Artifact


@dataclass(frozen=True)
class Jitter(Codec):
    """K and V in the checkpoint's dtype, each element moved by half a unit in the last place of bfloat16 on average as
    it is stored: x ≈ x + n ulp, n = -1, 0, 0 or 1 drawn from a hash of the vector. Seeds are replicates. What a method
    changes beyond this is its own; what it changes less is noise. kvsuite's own, and its default."""

    name = "jitter"
    stores = "K and V in the checkpoint's dtype, moved by ±½ ulp of bfloat16 (the control)"
    source = "control; kvsuite/kernels/noise.py"

    seed: int = 0

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        key = (self.seed * 1_000_003 + layer.index) * 2
        return Noisy(seed=key), Noisy(seed=key + 1)


@dataclass(frozen=True)
class Noisy(Plain):
    """One token, moved."""

    seed: int = 0

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        from kvsuite.kernels.cpu.noise import half_ulp

        return (half_ulp(x[:, :, 0], self.seed),)
