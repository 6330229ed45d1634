"""No compression: the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.methods.base import Codec

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvsuite.kernels.context import LayerContext
    from kvsuite.kernels.quantspec import Shape
    from kvsuite.methods.artifact import Artifact


@dataclass(frozen=True)
class Full(Codec):
    """K and V in the checkpoint's dtype, whatever the model computes in. Where that is the compute dtype, too, or with
    ``dtype`` naming it, they are bit for bit what transformers' DynamicCache stores. x ≈ x rounded to that
    dtype. The default is what servers do."""

    name = "full"
    stores = "K and V uncompressed, in the checkpoint's dtype"
    source = "the baseline; transformers cache_utils.py DynamicCache"

    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        return Plain(dtype=self.dtype), Plain(dtype=self.dtype)


@dataclass(frozen=True)
class Plain(QuantSpec):
    """One token as it is."""

    layout = "plain"
    dtype: str = "auto"
    """auto: the K/V dtype; else the name of torch's."""

    @property
    def verbatim(self) -> bool:
        return type(self).encode is Plain.encode

    def fields(self, head_dim: int, kv_dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        import torch

        own: torch.dtype = kv_dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        return [((head_dim,), own)]

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (x[:, :, 0],)

    def decode(self, fields: tuple[Tensor, ...], dtype: torch.dtype, fitted: tuple[Tensor, ...]) -> Tensor:
        return fields[0].unsqueeze(2).to(dtype)
