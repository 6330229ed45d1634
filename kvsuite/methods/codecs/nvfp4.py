"""NVIDIA's 4-bit floats with a scale per 16 channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvsuite.errors import UsageError
from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.methods.base import RotatingCodec, check_above_zero

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvsuite.kernels.context import LayerContext
    from kvsuite.kernels.quantspec import Shape
    from kvsuite.methods.artifact import Artifact


@dataclass(frozen=True)
class NvFp4(RotatingCodec):
    """E2M1 codes, and for each 16 channels of a token a scale s in e4m3; K and V have a fixed scale t each besides,
    ``k_scale`` and ``v_scale``, by default 1.0. s = e4m3(max|x| / (6 t)), code = e2m1(x / (s t)), x ≈ code · s · t;
    both round to nearest even and saturate, so |x| ends at 2688 t, and blocks with max|x| up to 6/1024 t are zero.
    ``scale=4over6`` also tries s = e4m3(max|x| / (4 t)) for each block and takes the one with the smaller squared
    error, since codes are coarse between 4 and 6. ``rotate=hadamard`` turns K (after RoPE) and V before, as of `int8`.
    The default is plain NVFP4, which engines do not rotate."""

    name = "nvfp4"
    stores = "E2M1 codes, an e4m3 scale per 16 channels"
    source = (
        "NVIDIA's NVFP4 as in vLLM and SGLang (vllm#40177, sglang#21601); 4over6: Cook et al. 2025, arXiv 2512.02010"
    )

    scale: Literal["6", "4over6"] = "6"
    k_scale: float = 1.0
    v_scale: float = 1.0

    def check(self) -> None:
        super().check()
        check_above_zero(self.name, k_scale=self.k_scale, v_scale=self.v_scale)

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        if layer.head_dim % 16:
            raise UsageError(f"{self.name}: blocks of 16 channels do not divide the head dimension {layer.head_dim}")
        chooses = self.scale == "4over6"
        k, v = (E2M1Blocks(fixed, chooses, self.rotation) for fixed in (self.k_scale, self.v_scale))
        return k, v


@dataclass(frozen=True)
class E2M1Blocks(QuantSpec):
    """Each token by itself; fields (codes, uint8 (…, head_dim / 2); scales, e4m3 bytes (…, head_dim / 16))."""

    layout = "e2m1"
    bits = 4
    group = 16
    scale: float
    chooses: bool
    rotation: str = ""

    def fields(self, head_dim: int, kv_dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        import torch

        return [((head_dim // 2,), torch.uint8), ((head_dim // 16,), torch.uint8)]

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        import torch

        from kvsuite.kernels.quantize import blocks, pack

        parts = blocks(self.before(x), 16)
        codes, scales, error = self._encoded(parts, 6.0)
        if self.chooses:
            other, own, smaller = self._encoded(parts, 4.0)
            better = smaller < error
            codes, scales = torch.where(better, other, codes), torch.where(better, own, scales)
        return pack(codes.flatten(-2), 4), scales[..., 0]

    def decode(self, fields: tuple[Tensor, ...], dtype: torch.dtype, fitted: tuple[Tensor, ...]) -> Tensor:
        from kvsuite.kernels.fp4 import from_e2m1
        from kvsuite.kernels.quantize import blocks, unpack

        codes = blocks(unpack(fields[0], 4), 16)
        return self.after((from_e2m1(codes) * self._steps(fields[1][..., None])).flatten(-2), dtype)

    def _encoded(self, blocks: Tensor, full: float) -> tuple[Tensor, Tensor, Tensor]:
        """blocks float32 (…, 16) to codes (…, 16), scales as bytes (…, 1) and the squared error (…, 1)."""
        import torch

        from kvsuite.kernels.fp4 import from_e2m1, to_e2m1
        from kvsuite.kernels.quantize import to_e4m3

        fixed = torch.tensor(self.scale, dtype=torch.float32).item()
        scales = to_e4m3(blocks.abs().amax(-1, keepdim=True), full * fixed)
        steps = self._steps(scales)
        codes = to_e2m1(blocks / torch.where(steps == 0, float("inf"), steps))
        error = (from_e2m1(codes) * steps - blocks).double().square().sum(-1, keepdim=True)
        return codes, scales, error

    def _steps(self, scales: Tensor) -> Tensor:
        """What codes are multiplied by, float32."""
        import torch

        from kvsuite.kernels.quantize import from_e4m3

        return from_e4m3(scales, self.scale, torch.float32)
