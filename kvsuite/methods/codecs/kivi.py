"""KIVI: keys per channel, values per token, the newest tokens in full precision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from kvsuite.errors import UsageError
from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.methods.base import Codec
from kvsuite.methods.codecs.int8 import PerToken

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvsuite.kernels.context import LayerContext
    from kvsuite.kernels.quantspec import Shape
    from kvsuite.methods.artifact import Artifact


@dataclass(frozen=True)
class Kivi(Codec):
    """K asymmetric per channel in groups of ``group`` tokens, V asymmetric per token in groups of ``group`` channels,
    float16 scale and zero. The last T mod ``residual`` keys stay as they are and become pages when ``residual`` of them
    are there; the last ``residual`` values always stay. The prompt attends to itself in full precision. scale =
    (max - zero) / (2^bits - 1), zero = min. The authors' defaults of ``group`` and ``residual``; they run 2 and 4 bits.

    Tokens become pages before the step that completes them attends. ``order=after``, as the authors: after it, so one
    token more is read in full. ``layer_bits`` has the bits of each layer, a digit a layer, instead of ``bits``:
    ``layer_bits=4422`` for a model of four."""

    name = "kivi"
    stores = "4- or 2-bit codes, K per channel and V per token in groups of 32; last 128 tokens in full"
    source = "Liu et al. 2024, arXiv 2402.02750; jy-yuan/KIVI models/llama_kivi.py"
    bits: Literal[4, 2] = 4
    group: Literal[32, 16, 8] = 32
    residual: int = 128
    order: Literal["before", "after"] = "before"
    layer_bits: str = ""

    def check(self) -> None:
        super().check()
        if self.residual < self.group or self.residual % self.group:
            raise UsageError(f"{self.name}: residual={self.residual} must be a multiple of group={self.group}")
        if set(self.layer_bits) - {"2", "4"}:
            raise UsageError(f"{self.name}: layer_bits={self.layer_bits} must be a digit a layer, 4 or 2")
        if self.layer_bits and self.bits != 4:
            raise UsageError(f"{self.name}: layer_bits has the bits of each layer; leave bits out")

    @property
    def always(self) -> tuple[str, ...]:  # type: ignore[override]
        """Its bits, unless they are each layer's."""
        return () if self.layer_bits else ("bits",)

    def at(self, layer: int, layers: int) -> Codec:
        own = super().at(layer, layers)
        if self.layer_bits and len(self.layer_bits) != layers:
            raise UsageError(
                f"{self.name}: layer_bits has {len(self.layer_bits)} digits, but there are {layers} layers"
            )
        if not self.layer_bits or own is not self:
            return own
        return replace(self, bits=4 if self.layer_bits[layer] == "4" else 2, layer_bits="")

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        if layer.head_dim % self.group or layer.head_dim * self.bits % 8:
            raise UsageError(f"{self.name}: group={self.group} does not divide the head dimension {layer.head_dim}")
        late = self.order == "after"
        values = PerToken(self.bits, self.group, residual=self.residual + late)
        return PerChannel(self.bits, self.group, self.residual, late), values


@dataclass(frozen=True)
class PerChannel(QuantSpec):
    """``block`` tokens together, a scale and a zero per channel."""

    layout = "channel"
    bits: int
    block: int
    residual: int
    late: bool = False

    @property
    def group(self) -> int:  # type: ignore[override]
        """Tokens that share a scale."""
        return self.block

    def fields(self, head_dim: int, kv_dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        import torch

        return [
            ((self.block, head_dim * self.bits // 8), torch.uint8),
            ((1, head_dim), torch.float16),
            ((1, head_dim), torch.float16),
        ]

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        from kvsuite.kernels.quantize import pack, quantize

        codes, scale, zero = quantize(x, self.bits, dim=-2)
        return pack(codes, self.bits), scale, zero

    def decode(self, fields: tuple[Tensor, ...], dtype: torch.dtype, fitted: tuple[Tensor, ...]) -> Tensor:
        from kvsuite.kernels.quantize import dequantize, unpack

        packed, scale, zero = fields
        return dequantize(unpack(packed, self.bits), scale, zero, dtype)
