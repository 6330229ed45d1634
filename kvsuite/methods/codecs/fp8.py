"""8-bit floats: the production baseline of the floating kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvsuite.errors import UsageError
from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.methods.base import Codec, check_above_zero

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvsuite.kernels.context import LayerContext
    from kvsuite.kernels.quantspec import Shape
    from kvsuite.methods.artifact import Artifact


@dataclass(frozen=True)
class Fp8(Codec):
    """x ≈ e4m3(x / s) · s, to nearest even, saturating at 448. ``per=tensor``: K and V have one fixed scale s each,
    ``k_scale`` and ``v_scale``, 1.0 by default; vLLM's default. ``per=token``: s = max|x| / 448 of each token and head,
    kept as float32."""

    name = "fp8"
    stores = "e4m3 bytes, scale 1.0 per tensor; or a float32 scale per token and head"
    source = "vLLM --kv-cache-dtype fp8, fp8_per_token_head; vllm/model_executor/layers/quantization/kv_cache.py"

    per: Literal["tensor", "token"] = "tensor"
    k_scale: float = 1.0
    v_scale: float = 1.0

    def check(self) -> None:
        super().check()
        check_above_zero(self.name, k_scale=self.k_scale, v_scale=self.v_scale)
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if self.per == "token" and scale != 1.0:
                raise UsageError(f"{self.name}: per=token has a scale of its own for each token; leave {name} out")

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        scales = (None, None) if self.per == "token" else (self.k_scale, self.v_scale)
        return E4M3(scales[0]), E4M3(scales[1])


@dataclass(frozen=True)
class E4M3(QuantSpec):
    """Each token by itself; ``scale`` None: one per token."""

    layout = "fp8"
    bits = 8
    scale: float | None = 1.0

    def fields(self, head_dim: int, kv_dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        import torch

        codes = ((head_dim,), torch.uint8)
        return [codes] if self.scale is not None else [codes, ((1,), torch.float32)]

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        from kvsuite.kernels.quantize import e4m3_scale, to_e4m3

        x = x[:, :, 0]
        if self.scale is not None:
            return (to_e4m3(x, self.scale),)
        scale = e4m3_scale(x)
        return to_e4m3(x, scale), scale

    def decode(self, fields: tuple[Tensor, ...], dtype: torch.dtype, fitted: tuple[Tensor, ...]) -> Tensor:
        from kvsuite.kernels.quantize import from_e4m3

        scale = fields[1] if self.scale is None else self.scale
        return from_e4m3(fields[0], scale, dtype).unsqueeze(2)
