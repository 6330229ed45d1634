"""4-bit floats: E2M1 codes, the numbers 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The number of each code: a sign, two bits of exponent, one of mantissa, as in torch's float4_e2m1fn_x2."""


def to_e2m1(x: Tensor) -> Tensor:
    """x float32 as codes, uint8 of its shape: round to nearest even, saturating at ±6."""
    size = x.abs()
    codes = (size > 0.25).to(torch.uint8)  # on the edges to the even code, so up at every other
    for edge, up in ((0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False)):
        codes += size >= edge if up else size > edge
    return codes | (torch.signbit(x).to(torch.uint8) << 3)


def from_e2m1(codes: Tensor) -> Tensor:
    """The numbers, float32 of the codes' shape."""
    return torch.tensor(E2M1, device=codes.device)[codes.int()]
