"""A share of the context for each head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from kvsuite import disk
from kvsuite.cache.decoding import UNLIMITED
from kvsuite.errors import UsageError
from kvsuite.methods.base import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.kernels.context import LayerContext


@dataclass(frozen=True)
class Headwise(Budget):
    """Each kv head keeps its own share of the context, count = max(1, round(share · T)). ``shares`` is a JSON file: for
    each layer a list of a number per kv head, above 0 and at most 1; 1 keeps everything, also while decoding. So
    retrieval heads can be left whole while the others stream: ``streaming-llm:positions=absolute +
    headwise:shares=FILE``. The selector has no budget, and ``shares`` no default: DuoAttention learns which heads are
    whole for each model."""

    name = "headwise"
    stores = "of each head the share of the context that a file says"
    source = (
        "Tang et al. 2024 (RazorAttention), arXiv 2407.15891; Xiao et al. 2024 (DuoAttention), arXiv 2410.10819; "
        "mit-han-lab/duo-attention duo_attn/utils.py"
    )
    ragged = True

    shares: str = ""

    def check(self) -> None:
        if not self.shares:
            raise UsageError(f"{self.name}: name a file with a share for each head, shares=FILE.json")
        loaded(self.shares)

    def check_model(self, layers: Sequence[LayerContext]) -> None:
        found, wanted = [len(own) for own in loaded(self.shares)], [layer.kv_heads for layer in layers]
        if found != wanted:
            raise UsageError(f"{self.name}: {self.shares} has {_shape(found)}, the model has {_shape(wanted)}")

    @property
    def decides(self) -> bool:
        return True

    def most(self, tokens: int, length: int) -> tuple[int, int]:
        return length, length

    def allot(self, scores: Sequence[Tensor], tokens: int) -> Tensor:
        import torch

        length = scores[0].shape[1]
        return torch.tensor(
            [[UNLIMITED if x == 1 else max(1, round(x * length)) for x in own] for own in loaded(self.shares)]
        )


@cache
def loaded(path: str) -> list[list[float]]:
    """The shares of a file. Raises UsageError where it holds none."""
    try:
        found = disk.parsed(disk.text(Path(path)))
        whole = [[float(x) for x in own] for own in found]
    except (OverflowError, TypeError, ValueError) as error:
        raise UsageError(f"headwise: {path!r} is no JSON list of lists of numbers: {error}") from error
    if not all(0 < x <= 1 for own in whole for x in own):
        raise UsageError(f"headwise: the shares in {path!r} must be above 0 and at most 1")
    return whole


def _shape(heads: list[int]) -> str:
    return f"{len(heads)} layers of {'/'.join(map(str, dict.fromkeys(heads))) or 0} kv heads"
