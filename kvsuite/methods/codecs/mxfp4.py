"""The open 4-bit floats with a power of two per 32 channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.errors import UsageError
from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.methods.base import RotatingCodec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvsuite.kernels.context import LayerContext
    from kvsuite.kernels.quantspec import Shape
    from kvsuite.methods.artifact import Artifact


@dataclass(frozen=True)
class MxFp4(RotatingCodec):
    """E2M1 codes, and for each 32 channels of a token a power of two as its scale: s = 2^(⌊log₂ max|x|⌋ - 2), kept as
    an e8m0 byte; code = e2m1(x / s), to nearest even, saturating; x ≈ code · s. Numbers above 6 s, up to 8 s, become 6
    s. ``rotate=hadamard`` turns K (after RoPE) and V before, as of `int8`; the specification has no rotation, which is
    the default."""

    name = "mxfp4"
    stores = "E2M1 codes, an e8m0 scale per 32 channels"
    source = "OCP Microscaling Formats (MX) v1.0, section 6.3"

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        if layer.head_dim % 32:
            raise UsageError(f"{self.name}: blocks of 32 channels do not divide the head dimension {layer.head_dim}")
        return (Microscaled(self.rotation),) * 2


@dataclass(frozen=True)
class Microscaled(QuantSpec):
    """Each token by itself; fields (codes, uint8 (…, head_dim / 2); scales, e8m0 bytes (…, head_dim / 32))."""

    bits = 4
    group = 32
    rotation: str = ""

    def fields(self, head_dim: int, kv_dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        import torch

        return [((head_dim // 2,), torch.uint8), ((head_dim // 32,), torch.uint8)]

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        import torch

        from kvsuite.kernels.fp4 import to_e2m1
        from kvsuite.kernels.quantize import blocks, pack

        parts = blocks(self.before(x), 32)
        largest = parts.abs().amax(-1, keepdim=True)
        power = largest.frexp().exponent - 3  # frexp's mantissa is in [0.5, 1)
        power = torch.where(largest > 0, power, -127).clamp(-127, 127)
        scales = torch.where(largest.isfinite(), power + 127, 255)  # 255 is no number
        codes = to_e2m1(torch.ldexp(parts, -power))
        return pack(codes.flatten(-2), 4), scales[..., 0].to(torch.uint8)

    def decode(self, fields: tuple[Tensor, ...], dtype: torch.dtype, fitted: tuple[Tensor, ...]) -> Tensor:
        import torch

        from kvsuite.kernels.fp4 import from_e2m1
        from kvsuite.kernels.quantize import blocks, unpack

        codes = blocks(unpack(fields[0], 4), 32)
        steps = fields[1].view(torch.float8_e8m0fnu).float()[..., None]
        return self.after((from_e2m1(codes) * steps).flatten(-2), dtype)
