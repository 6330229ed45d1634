"""8-bit integers per token and head: the production baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.methods.base import RotatingCodec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvsuite.kernels.context import LayerContext
    from kvsuite.kernels.quantspec import Shape
    from kvsuite.methods.artifact import Artifact


@dataclass(frozen=True)
class Int8(RotatingCodec):
    """Asymmetric per token and head: zero = min, scale = (max - zero) / 255, both float16, the zero rounded down and
    the scale up; code = (x - zero) / scale to the nearest integer, x ≈ code · scale + zero. ``rotate=hadamard``: K
    (after RoPE) and V are turned by an orthonormal Hadamard matrix before they are encoded, and back when they are
    read, in float32, as llama.cpp does with its own blocks; it acts on as many channels at once as the largest power of
    two that divides head_dim. LMDeploy does not rotate, which is the default."""

    name = "int8"
    stores = "8-bit codes, float16 scale and zero per token and head"
    source = (
        "LMDeploy quant_policy=8, lmdeploy/pytorch/kernels/cuda/fill_kv_cache.py; vLLM int8_per_token_head; "
        "rotate: llama.cpp#21038"
    )

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        return (PerToken(8, layer.head_dim, rotation=self.rotation),) * 2


@dataclass(frozen=True)
class PerToken(QuantSpec):
    """Each token by itself, in groups of ``group`` channels with a scale and a zero each."""

    layout = "token"
    rolling = True
    bits: int
    group: int
    residual: int = 0
    rotation: str = ""

    def fields(self, head_dim: int, kv_dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        import torch

        groups = head_dim // self.group
        return [
            ((head_dim * self.bits // 8,), torch.uint8),
            ((groups, 1), torch.float16),
            ((groups, 1), torch.float16),
        ]

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        from kvsuite.kernels.quantize import blocks, pack, quantize

        codes, scale, zero = quantize(blocks(self.before(x), self.group), self.bits, dim=-1)
        return pack(codes.flatten(-2), self.bits), scale, zero

    def decode(self, fields: tuple[Tensor, ...], dtype: torch.dtype, fitted: tuple[Tensor, ...]) -> Tensor:
        import torch

        from kvsuite.kernels.quantize import blocks, dequantize, unpack

        packed, scale, zero = fields
        codes = blocks(unpack(packed, self.bits), self.group)
        return self.after(dequantize(codes, scale, zero, torch.float32).flatten(-2), dtype)
