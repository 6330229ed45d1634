"""No compression: the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.methods.base import Codec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvsuite.cache.context import LayerContext, Shape, SideCodec
    from kvsuite.kernels.paged import Format


@dataclass(frozen=True)
class Full(Codec):
    """K and V in the model's dtype, bit for bit what transformers' DynamicCache stores."""

    name = "full"
    stores = "K and V in the model's dtype"
    source = "the baseline; transformers cache_utils.py DynamicCache"

    def sides(self, layer: LayerContext) -> tuple[SideCodec, SideCodec]:
        return Plain(), Plain()


@dataclass(frozen=True)
class Plain:
    """One token as it is."""

    block: int = 1
    residual: int = 0
    rolling: bool = False

    @property
    def format(self) -> Format:
        from kvsuite.kernels.paged import Format

        return Format("plain")

    def fields(self, head_dim: int, dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        return [((head_dim,), dtype)]

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x[:, :, 0],)

    def decode(self, fields: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        return fields[0].unsqueeze(2)
