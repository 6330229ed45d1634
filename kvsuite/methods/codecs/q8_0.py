"""ggml's 8-bit blocks."""

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
class Q80(RotatingCodec):
    """Symmetric per 32 channels of a token: d = max|x| / 127 in float32, code = x · (1/d) to the nearest integer,
    halves away from zero, x ≈ code · float16(d). Codes and scales are those of gguf's own quantizer.
    ``rotate=hadamard`` turns K (after RoPE) and V before, as of `int8`: llama.cpp does so since April 2026 unless
    LLAMA_ATTN_ROT_DISABLE is set. The default is the blocks alone."""

    name = "q8_0"
    stores = "8-bit codes, a float16 scale per 32 channels"
    source = (
        "llama.cpp --cache-type-k q8_0; ggml-quants.c quantize_row_q8_0_ref, gguf quants.py Q8_0; "
        "rotate: llama.cpp#21038"
    )

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        if layer.head_dim % 32:
            raise UsageError(f"{self.name}: blocks of 32 channels do not divide the head dimension {layer.head_dim}")
        return (Symmetric8(self.rotation),) * 2


@dataclass(frozen=True)
class Symmetric8(QuantSpec):
    """Each token by itself; fields (codes, int8 (…, head_dim); scales, float16 (…, head_dim / 32, 1))."""

    layout = "symmetric"
    bits = 8
    group = 32
    rotation: str = ""

    def fields(self, head_dim: int, kv_dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        import torch

        return [((head_dim,), torch.int8), ((head_dim // 32, 1), torch.float16)]

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        import torch

        from kvsuite.kernels.quantize import blocks

        parts = blocks(self.before(x), 32)
        scale = parts.abs().amax(-1, keepdim=True) / 127
        scaled = parts * inverse(scale)
        whole = scaled.abs().floor()
        codes = scaled.sign() * (whole + (scaled.abs() - whole >= 0.5))
        return codes.to(torch.int8).flatten(-2), scale.half()

    def decode(self, fields: tuple[Tensor, ...], dtype: torch.dtype, fitted: tuple[Tensor, ...]) -> Tensor:
        from kvsuite.kernels.quantize import blocks

        codes, scale = fields
        return self.after((blocks(codes, 32).float() * scale.float()).flatten(-2), dtype)


def inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where that is infinite."""
    one: Tensor = 1 / scale
    return one.masked_fill(one.isinf(), 0.0)
