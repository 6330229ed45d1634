"""8-bit integers per token and head: the production baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.methods.base import Codec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvsuite.kernels.context import LayerContext
    from kvsuite.kernels.quantspec import Shape
    from kvsuite.methods.artifact import Artifact


@dataclass(frozen=True)
class Int8(Codec):
    """Asymmetric per token and head: 8-bit codes, a float16 scale and zero."""

    name = "int8"
    stores = "8-bit codes, float16 scale and zero per token and head"
    source = "LMDeploy quant_policy=8; vLLM int8_per_token_head"

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        return PerToken(8, layer.head_dim), PerToken(8, layer.head_dim)


@dataclass(frozen=True)
class PerToken(QuantSpec):
    """Each token by itself, in groups of ``group`` channels with a scale and a zero each."""

    layout = "token"
    rolling = True
    bits: int
    group: int
    residual: int = 0

    def fields(self, head_dim: int, kv_dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        import torch

        groups = head_dim // self.group
        return [
            ((head_dim * self.bits // 8,), torch.uint8),
            ((groups, 1), torch.float16),
            ((groups, 1), torch.float16),
        ]

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        from kvsuite.kernels.quantize import pack, quantize

        codes, scale, zero = quantize(self._groups(x[:, :, 0]), self.bits, dim=-1)
        return pack(codes.flatten(-2), self.bits), scale, zero

    def decode(self, fields: tuple[Tensor, ...], dtype: torch.dtype, fitted: tuple[Tensor, ...]) -> Tensor:
        from kvsuite.kernels.quantize import dequantize, unpack

        packed, scale, zero = fields
        codes = self._groups(unpack(packed, self.bits))
        return dequantize(codes, scale, zero, dtype).flatten(-2).unsqueeze(2)

    def _groups(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], x.shape[-1] // self.group, self.group)
