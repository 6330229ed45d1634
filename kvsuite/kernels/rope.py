"""Moving an already rotated key to another position."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Rotary embedding in the half-split layout: channel i turns with channel i + len(inverse_frequency)."""

    inverse_frequency: Tensor  # float32 (rotary_dim / 2,)
    scaling: float = 1.0
    """By which cosines and sines are multiplied (YaRN's attention factor): rotated vectors are so much longer."""

    def rotate(self, k: Tensor, by: int | Tensor) -> Tensor:
        """k (..., head_dim) turned on by ``by`` positions (a tensor: broadcast to (..., 1)); one rotation in
        float32, rounded once to k's dtype. Channels beyond the rotary dimension stay."""
        angle = by * self.inverse_frequency
        return self._turn(k, angle.cos(), angle.sin())

    def average(self, x: Tensor, first: int, count: int) -> Tensor:
        """x (..., head_dim) under the mean of the rotations to ``count`` positions from ``first`` on, float32."""
        where = torch.arange(first, first + count, device=x.device)[:, None]
        angle = where * self.inverse_frequency
        return self._turn(x.float(), angle.cos().mean(0), angle.sin().mean(0))

    def pairs(self, x: Tensor) -> Tensor:
        """The channels that turn together: x (..., head_dim) to (..., rotary_dim / 2, 2)."""
        half = self.inverse_frequency.shape[0]
        return torch.stack([x[..., :half], x[..., half : 2 * half]], dim=-1)

    def _turn(self, k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = self.inverse_frequency.shape[0]
        x, y = k[..., :half].float(), k[..., half : 2 * half].float()
        turned = torch.cat([x * cos - y * sin, y * cos + x * sin], dim=-1).to(k.dtype)
        return torch.cat([turned, k[..., 2 * half :]], dim=-1)
