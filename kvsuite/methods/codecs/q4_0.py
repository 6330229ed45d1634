"""ggml's 4-bit blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.errors import UsageError
from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.methods.base import RotatingCodec
from kvsuite.methods.codecs.q8_0 import inverse

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvsuite.kernels.context import LayerContext
    from kvsuite.kernels.quantspec import Shape
    from kvsuite.methods.artifact import Artifact


@dataclass(frozen=True)
class Q40(RotatingCodec):
    """Symmetric per 32 channels of a token: d = m / -8 in float32, m the number that is largest in size, with its sign;
    code = ⌊x · (1/d) + 8.5⌋, at most 15; x ≈ (code - 8) · float16(d). Codes, scales and their order in a block are
    those of gguf's own quantizer. ``rotate=hadamard`` turns K (after RoPE) and V before, as of `int8`: llama.cpp does
    so since April 2026 unless LLAMA_ATTN_ROT_DISABLE is set. The default is the blocks alone."""

    name = "q4_0"
    stores = "4-bit codes, a float16 scale per 32 channels"
    source = (
        "llama.cpp --cache-type-k q4_0; ggml-quants.c quantize_row_q4_0_ref, gguf quants.py Q4_0; "
        "rotate: llama.cpp#21038"
    )

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        if layer.head_dim % 32:
            raise UsageError(f"{self.name}: blocks of 32 channels do not divide the head dimension {layer.head_dim}")
        return (Symmetric4(self.rotation),) * 2


@dataclass(frozen=True)
class Symmetric4(QuantSpec):
    """Each token by itself; fields (codes, uint8 (…, head_dim / 32, 16), low nibbles the first 16 of a block; scales,
    float16 (…, head_dim / 32, 1))."""

    bits = 4
    group = 32
    rotation: str = ""

    def fields(self, head_dim: int, kv_dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        import torch

        return [((head_dim // 32, 16), torch.uint8), ((head_dim // 32, 1), torch.float16)]

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        import torch

        from kvsuite.kernels.quantize import blocks, pack

        parts = blocks(self.before(x), 32)
        largest = parts.gather(-1, parts.abs().argmax(-1, keepdim=True))  # the first, where there are two
        scale = largest / -8
        codes = (parts * inverse(scale) + 8.5).clamp(0, 15).to(torch.uint8)
        return pack(codes, 4), scale.half()

    def decode(self, fields: tuple[Tensor, ...], dtype: torch.dtype, fitted: tuple[Tensor, ...]) -> Tensor:
        from kvsuite.kernels.quantize import unpack

        codes, scale = fields
        return self.after(((unpack(codes, 4).float() - 8) * scale.float()).flatten(-2), dtype)
