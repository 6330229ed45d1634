"""KVarN: tiles whose channels and tokens vary alike before they are quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvsuite.errors import UsageError
from kvsuite.kernels.quantspec import PAGE, QuantSpec
from kvsuite.methods.base import Codec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvsuite.kernels.context import LayerContext
    from kvsuite.kernels.quantspec import Shape
    from kvsuite.methods.artifact import Artifact

ROUNDS = 8


@dataclass(frozen=True)
class KVarN(Codec):
    """K and V are turned by an orthonormal Hadamard matrix. Each tile of 32 tokens is then divided, in 8 rounds, by the
    standard deviations of its tokens and of its channels in turn, so that both become alike; those of the round with
    the least imbalance are taken. Imbalance is the largest over the smallest deviation of channels, plus the same of
    tokens. K is quantized asymmetrically per channel, V per token. float16: a scale and a zero of each, with its
    deviation in them, and the deviations of the other axis, the tokens for K and the channels for V. The last T mod 32
    tokens stay as they are. x ≈ H ((code · scale + zero) · deviation).

    The authors' tiles have 128 or 64 tokens, and their first 128 tokens stay in full; here a tile is a page, and no
    token is left out. Their default of bits."""

    name = "kvarn"
    stores = "4-bit K and 2- or 4-bit V in tiles of 32 tokens; scales and zeros per channel (K) or token (V), and more"
    source = (
        "Muller et al. 2026, arXiv 2606.03458; vllm#46812 quantization/kvarn/sinkhorn.py, kvarn_store.py; "
        "huawei-csl/KVarN ascend_kernel/kvarn_store_tile_k/api_test.py"
    )
    always = ("bits",)

    bits: Literal["k4v2", "k4v4"] = "k4v2"

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        if layer.head_dim % 8:
            raise UsageError(f"{self.name}: 8 does not divide the head dimension {layer.head_dim}")
        return Balanced(int(self.bits[1]), "channel"), Balanced(int(self.bits[3]), "token")


@dataclass(frozen=True)
class Balanced(QuantSpec):
    """A page together; fields (codes, uint8 (…, 32, head_dim * bits / 8); scale and zero, float16 (…, 1, head_dim) per
    channel or (…, 32, 1) per token; the other axis's deviations, float16 (…, 32, 1) or (…, 1, head_dim))."""

    rotation = "hadamard"
    block = residual = PAGE
    bits: int
    per: Literal["channel", "token"] = "channel"

    def fields(self, head_dim: int, kv_dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        import torch

        own, other = (1, head_dim), (PAGE, 1)
        if self.per == "token":
            own, other = other, own
        codes = ((PAGE, head_dim * self.bits // 8), torch.uint8)
        return [codes, (own, torch.float16), (own, torch.float16), (other, torch.float16)]

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        from kvsuite.kernels.hadamard import hadamard
        from kvsuite.kernels.quantize import pack, quantize

        turned, dim = hadamard(x), -2 if self.per == "channel" else -1
        other = deviations(turned, -3 - dim).half()
        codes, scale, zero = quantize(turned / other.float(), self.bits, dim)
        return pack(codes, self.bits), scale, zero, other

    def decode(self, fields: tuple[Tensor, ...], dtype: torch.dtype, fitted: tuple[Tensor, ...]) -> Tensor:
        import torch

        from kvsuite.kernels.hadamard import hadamard
        from kvsuite.kernels.quantize import dequantize, unpack

        packed, scale, zero, other = fields
        balanced = dequantize(unpack(packed, self.bits), scale, zero, torch.float32)
        return hadamard(balanced * other.float()).to(dtype)


def deviations(tiles: Tensor, first: int) -> Tensor:
    """By what a tile is divided so that its rows, and its columns, have standard deviations that are alike: of both
    scales the one that is found first, which has size 1 along dimension ``first``; along the other dimension a
    quantizer's own scale takes the other one in.

    Args: tiles float32 (…, tokens, channels); ``first`` -1 for the tokens' scale (…, tokens, 1), -2 for the channels'.
    Source: vllm#46812 sinkhorn.py, variance_normalize.
    """
    import torch

    second = -3 - first
    logs = {first: tiles.new_zeros(()), second: tiles.new_zeros(())}
    current, best = tiles, _imbalance(tiles)
    found = torch.ones_like(tiles.narrow(first, 0, 1))
    for _ in range(ROUNDS):
        for dim in (first, second):
            spread = current.std(dim, keepdim=True).clamp(1e-3, 1e3)
            logs[dim] = (logs[dim] + spread.log()).clamp(-0.3, 10.0)
            current = tiles / logs[first].exp() / logs[second].exp()
        now = _imbalance(current)
        found = torch.where(now <= best, logs[first].exp(), found)
        best = torch.where(now <= best, now, best)
    return found


def _imbalance(tiles: Tensor) -> Tensor:
    """(…, tokens, channels) -> (…, 1, 1); 2 where all are alike."""
    total = tiles.new_zeros(())
    for dim in (-1, -2):
        spread = tiles.std(dim, keepdim=True)
        other = -3 - dim
        total = total + spread.amax(other, keepdim=True) / spread.amin(other, keepdim=True).clamp(min=1e-8)
    return total
