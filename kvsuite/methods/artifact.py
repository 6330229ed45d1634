"""What a codec has learned from a model before it is used: codebooks, outliers, ranges."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Artifact:
    """Named tensors. Their hash stands in every record that was made with them."""

    tensors: Mapping[str, Tensor]

    @property
    def hash(self) -> str:
        """The first 16 hex digits of a SHA-256 over names, dtypes, shapes and bytes."""
        import torch

        digest = hashlib.sha256()
        for name, x in sorted(self.tensors.items()):
            digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
            digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]
