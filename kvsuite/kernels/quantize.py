"""Uniform asymmetric quantization and the packing of its codes."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 … 2^bits - 1 over the range of x along ``dim``; x ≈ codes * scale + zero.

    Scale and zero are float16, as the authors of KIVI store them. The zero is rounded down and the scale up, and the
    codes are taken against these stored values, so the range is always covered and the error stays ≤ scale / 2.

    Args: x float, any shape. Returns: codes uint8 like x; scale and zero float16 like x with ``dim`` kept as 1.
    """
    x = x.float()
    zero = _float16(x.amin(dim, keepdim=True), up=False)
    levels = (1 << bits) - 1
    scale = _float16((x.amax(dim, keepdim=True) - zero.float()) / levels, up=True)
    step = scale.float()
    codes = (x - zero.float()).div_(torch.where(step > 0, step, 1.0)).round_().clamp_(0, levels)
    return codes.to(torch.uint8), scale, zero


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """codes * scale + zero in float32, rounded once to ``dtype``. Shapes as `quantize` returns them."""
    return torch.addcmul(zero.float(), codes.float(), scale.float()).to(dtype)


def _float16(x: Tensor, up: bool) -> Tensor:
    """x rounded to float16 towards +∞ (``up``) or -∞. Beyond 65504, far from any real K or V, it saturates to inf."""
    half = x.half()
    wrong = (half.float() < x) if up else (half.float() > x)
    bound = torch.full_like(half, float("inf") if up else float("-inf"))
    return torch.where(wrong, torch.nextafter(half, bound), half)


def blocks(x: Tensor, size: int) -> Tensor:
    """x (..., n * size) as (..., n, size)."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., D) uint8 into (..., D * bits / 8), in parts: with 4 bits the low nibbles are channels [0, D/2), the
    high ones [D/2, D), with 2 bits four quarters, with 1 bit eight parts. 3 bits are the lower two and, behind them,
    the highest one. Nothing is interleaved, so a kernel only splits its query."""
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], dim=-1)
    parts = codes.chunk(8 // bits, dim=-1)
    packed = parts[0].clone()
    for i, part in enumerate(parts[1:], start=1):
        packed |= part << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: (..., D * bits / 8) -> (..., D) uint8."""
    if bits == 8:
        return packed
    if bits == 3:
        lower, highest = packed.tensor_split([packed.shape[-1] // 3 * 2], dim=-1)
        return unpack(lower, 2) | unpack(highest, 1) << 2
    mask = (1 << bits) - 1
    return torch.cat([(packed >> (bits * i)) & mask for i in range(8 // bits)], dim=-1)


E4M3_MAX = 448.0


def e4m3_scale(x: Tensor) -> Tensor:
    """The scale per vector that puts its largest magnitude at 448: x (..., D) -> float32 (..., 1); 1 for zeros."""
    largest = x.float().abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, largest / E4M3_MAX, 1.0)


def to_e4m3(x: Tensor, scale: Tensor | float) -> Tensor:
    """x / scale as e4m3 bytes (uint8, x's shape): round to nearest even, saturating at ±448; NaN stays NaN."""
    scaled = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX)
    return scaled.to(torch.float8_e4m3fn).view(torch.uint8)


def from_e4m3(codes: Tensor, scale: Tensor | float, dtype: torch.dtype) -> Tensor:
    """value * scale in float32, rounded once to ``dtype``. By a table: PyTorch's own conversion is slower than reading
    the cache it converts."""
    table = torch.arange(256, dtype=torch.uint8, device=codes.device).view(torch.float8_e4m3fn).float()
    if isinstance(scale, float):
        return (table * scale).to(dtype)[codes.int()]
    return (table[codes.int()] * scale).to(dtype)
