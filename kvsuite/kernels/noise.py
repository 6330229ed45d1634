"""Seeded noise that depends on a vector's own bits: no state, so no batch, order or chunking can change it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / φ as int64: splitmix64's increment

FINER = {torch.bfloat16: 0, torch.float16: 3, torch.float32: 16}
"""Bits of the mantissa that a dtype has beyond bfloat16's."""


def content_hash(x: Tensor, seed: int) -> Tensor:
    """One well-mixed int64 per vector of the last dimension: (..., D) floats -> (...,). Equal vectors hash equally."""
    bits = _bits(x).long()
    words = torch.arange(1, x.shape[-1] + 1, device=x.device) * _GOLDEN
    return _mix((_mix(words + seed) * (bits + 1)).sum(-1))


def half_ulp(x: Tensor, seed: int) -> Tensor:
    """x with each element moved by half a unit in the last place of bfloat16 on average: a quarter of them one ulp
    up, a quarter one ulp down, half stay (a move by exactly ½ ulp cannot be stored). Zeros, numbers too small and the
    two ends of the range stay. The size is bfloat16's whatever x is stored in: noise as engines make it that round.

    Args: x (..., D), float16, bfloat16 or float32. Returns the same shape and dtype.
    """
    bits = _bits(x)
    dim = x.shape[-1]
    words = torch.arange(-(-dim // 32), device=x.device) * _GOLDEN
    draws = _mix(content_hash(x, seed).unsqueeze(-1) + words)  # 64 random bits, two for each of 32 channels
    shifts = torch.arange(0, 64, 2, device=x.device)
    two = ((draws.unsqueeze(-1) >> shifts) & 3).flatten(-2)[..., :dim]
    one = ulp(x.dtype)
    step = ((two == 3).to(bits.dtype) - (two == 0).to(bits.dtype)) * one
    magnitude = bits & torch.iinfo(bits.dtype).max
    movable = (magnitude > one) & (magnitude <= top(x.dtype) - one)
    return torch.where(movable, bits + step, bits).view(x.dtype)


def ulp(dtype: torch.dtype) -> int:
    """A unit in the last place of bfloat16, in the bits of a dtype as an integer."""
    return 1 << FINER[dtype]


@functools.cache
def top(dtype: torch.dtype) -> int:
    """The bits of the largest number of a dtype, as an integer."""
    return int(_bits(torch.tensor(torch.finfo(dtype).max, dtype=dtype)))


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finalizer (Steele, Lea, Flood 2014) on int64, which wraps like uint64; shifts made logical."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z ^ ((z >> 31) & ((1 << 33) - 1))
