"""4-bit integers per token and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.methods.base import RotatingCodec
from kvsuite.methods.codecs.int8 import PerToken

if TYPE_CHECKING:
    from kvsuite.kernels.context import LayerContext
    from kvsuite.methods.artifact import Artifact


@dataclass(frozen=True)
class Int4(RotatingCodec):
    """Asymmetric per token and head: zero = min, scale = (max - zero) / 15, both float16, the zero rounded down and the
    scale up; code = (x - zero) / scale to the nearest integer, x ≈ code · scale + zero. ``rotate=hadamard``: K (after
    RoPE) and V are turned by an orthonormal Hadamard matrix before they are encoded, and back when they are read, in
    float32, as llama.cpp does with its own blocks; it acts on as many channels at once as the largest power of two that
    divides head_dim. LMDeploy does not rotate, which is the default."""

    name = "int4"
    stores = "4-bit codes, float16 scale and zero per token and head"
    source = "LMDeploy quant_policy=4, lmdeploy/pytorch/kernels/cuda/fill_kv_cache.py; rotate: llama.cpp#21038"

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        return (PerToken(4, layer.head_dim, rotation=self.rotation),) * 2
