"""One threshold for all layers and heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.methods.base import Budget

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Dms(Budget):
    """One threshold on the scores of all layers and heads together. Without ``threshold`` it is the one at which the
    selector's budget stays in the mean over layers and heads. With it every token of score s ≥ ``threshold`` stays, so
    the prompt decides how many, and the selector has no budget. What the selector protects stays in either case. Heads
    and layers are ragged; a head may keep nothing. A cache has room for a layer that keeps everything, and holds what
    stays. Acts on the prompt alone. kvpress has no default either, since it depends on the selector."""

    name = "dms"
    stores = "the tokens whose score is above one threshold, whatever their layer and head"
    source = "Łańcucki et al. 2025 (DMS), arXiv 2506.05345; kvpress dms_press.py; snu-mllab/KVzip score.py"
    ragged = True

    threshold: float | None = None

    @property
    def decides(self) -> bool:
        return self.threshold is not None

    def most(self, tokens: int, length: int) -> tuple[int, int]:
        return length, length

    def allot(self, scores: Sequence[Tensor], tokens: int) -> Tensor:
        import torch

        joint = torch.stack([layer.double() for layer in scores])
        if self.threshold is not None:
            return (joint >= self.threshold).sum(-1).cpu()
        layers, heads, length = joint.shape
        kept = joint.flatten().topk(layers * heads * tokens).indices // length
        return kept.bincount(minlength=layers * heads).view(layers, heads).cpu()
