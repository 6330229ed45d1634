"""TurboQuant: rotated keys as the levels of a normal distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvsuite.errors import UsageError
from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.methods.base import Codec
from kvsuite.methods.codecs.fp8 import E4M3
from kvsuite.methods.codecs.int8 import PerToken

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvsuite.kernels.context import LayerContext
    from kvsuite.kernels.quantspec import Shape
    from kvsuite.methods.artifact import Artifact


@dataclass(frozen=True)
class TurboQuant(Codec):
    """A key is divided by its norm and turned by an orthonormal Hadamard matrix H. Its channels, times √head_dim, are
    then roughly N(0, 1), and each becomes the nearest Lloyd-Max level c of that distribution. One float16 scale a token
    brings the norm back: k ≈ H c · ‖k‖ / ‖c‖. V is asymmetric per token: codes, a float16 scale and zero.

    ``bits=k4v4``, ``k3v4`` and ``k3v3`` are vLLM's turboquant_4bit_nc, _k3v4_nc and _3bit_nc. ``k8v4`` is its
    turboquant_k8v4, whose keys are e4m3 and not turned. ``k4v2`` is LMDeploy's quant_policy 42: of a key's 4 bits 3 are
    a level and one is the sign of what is left, r; k ≈ H (c + sign(r) · ‖r‖ / √head_dim) · ‖k‖ / √head_dim, with two
    float16 numbers a token; V is turned, too, 2-bit levels and its norm.

    ``seed`` puts random signs on the channels before H; 0 puts none, as vLLM and LMDeploy. Without them what all
    channels have in common ends up in one channel, beyond the highest level. vLLM leaves the first and last two layers
    full; here ``skip_first=2,skip_last=2`` does. The default of
    ``bits`` is its turboquant_4bit_nc."""

    name = "turboquant"
    stores = "4- or 3-bit levels of the rotated key and a float16 scale per token and head; 4-, 3- or 2-bit values"
    source = (
        "Zandieh et al. 2025, arXiv 2504.19874; vllm#38479 quantization/turboquant, triton_turboquant_store.py; "
        "lmdeploy#4510 kernels/cuda/fill_kv_cache.py"
    )
    always = ("bits",)

    bits: Literal["k4v4", "k3v4", "k3v3", "k8v4", "k4v2"] = "k4v4"
    seed: int = 0

    def check(self) -> None:
        super().check()
        if self.seed < 0:
            raise UsageError(f"{self.name}: seed={self.seed} must not be negative")
        if self.seed and self.bits == "k8v4":
            raise UsageError(f"{self.name}: the keys of bits=k8v4 are not turned; leave seed out")

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        if layer.head_dim % 8:
            raise UsageError(f"{self.name}: 8 does not divide the head dimension {layer.head_dim}")
        if self.bits == "k4v2":
            return LloydMax(3, self.seed, signed=True), LloydMax(2, self.seed)
        keys, values = int(self.bits[1]), int(self.bits[3])
        k = E4M3() if keys == 8 else LloydMax(keys, self.seed, corrected=True)
        return k, PerToken(values, layer.head_dim)


@dataclass(frozen=True)
class LloydMax(QuantSpec):
    """Each token by itself; fields (codes, uint8 (…, head_dim * stored / 8); scale, float16 (…, 1)), and where
    ``signed`` a third, float16 (…, 1), the root mean square of what the levels leave."""

    rotation = "hadamard"
    bits: int
    """Of a level."""
    seed: int = 0
    """Of the signs before the rotation; 0: none."""
    corrected: bool = False
    """Whether the levels are brought to the vector's own norm."""
    signed: bool = False
    """Whether a further bit is the sign of what a level leaves."""

    @property
    def layout(self) -> str:  # type: ignore[override]
        """``levels``, but for what only the reference has."""
        return "levels" if self.corrected and not self.seed else ""

    @property
    def stored(self) -> int:
        """Bits of a channel."""
        return self.bits + self.signed

    def fields(self, head_dim: int, kv_dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        import torch

        return [((head_dim * self.stored // 8,), torch.uint8), *[((1,), torch.float16)] * (1 + self.signed)]

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        import torch

        from kvsuite.kernels.hadamard import hadamard
        from kvsuite.kernels.lloyd import nearest, numbers
        from kvsuite.kernels.quantize import pack

        turned = hadamard(self._with_signs(x[:, :, 0].float()))
        scale = _root_mean_square(turned)
        spread = turned / torch.where(scale == 0, 1.0, scale)
        codes = nearest(spread, self.bits)
        levels = numbers(codes, self.bits)
        if self.corrected:
            return pack(codes, self.stored), (scale / _root_mean_square(levels)).half()
        if not self.signed:
            return pack(codes, self.stored), scale.half()
        left = spread - levels
        codes |= (left >= 0).to(torch.uint8) << self.bits
        return pack(codes, self.stored), scale.half(), _root_mean_square(left).half()

    def decode(self, fields: tuple[Tensor, ...], dtype: torch.dtype, fitted: tuple[Tensor, ...]) -> Tensor:
        from kvsuite.kernels.hadamard import hadamard
        from kvsuite.kernels.lloyd import numbers
        from kvsuite.kernels.quantize import unpack

        codes = unpack(fields[0], self.stored)
        levels = numbers(codes & ((1 << self.bits) - 1), self.bits)
        if self.signed:
            levels = levels + ((codes >> self.bits).float() * 2 - 1) * fields[2].float()
        return self._with_signs(hadamard(levels * fields[1].float())).to(dtype).unsqueeze(2)

    def _with_signs(self, x: Tensor) -> Tensor:
        from kvsuite.kernels.hadamard import signs

        return x * signs(x.shape[-1], self.seed).to(x.device) if self.seed else x


def _root_mean_square(x: Tensor) -> Tensor:
    """(..., D) -> float32 (..., 1); the sum in float64, so that it depends neither on the batch nor on the size."""
    return x.double().square().mean(-1, keepdim=True).sqrt().float()
