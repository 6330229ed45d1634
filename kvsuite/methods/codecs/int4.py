"""4-bit integers per token and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.methods.base import Codec
from kvsuite.methods.codecs.int8 import PerToken

if TYPE_CHECKING:
    from kvsuite.kernels.context import LayerContext
    from kvsuite.methods.artifact import Artifact


@dataclass(frozen=True)
class Int4(Codec):
    """Asymmetric per token and head: 4-bit codes, a float16 scale and zero."""

    name = "int4"
    stores = "4-bit codes, float16 scale and zero per token and head"
    source = "LMDeploy quant_policy=4"

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        return PerToken(4, layer.head_dim), PerToken(4, layer.head_dim)
