"""PyramidKV: early layers keep more than late ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvsuite.errors import UsageError
from kvsuite.methods.base import Budget

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.methods.base import Selector


@dataclass(frozen=True)
class Pyramid(Budget):
    """Counts fall in equal steps from the first layer to the last; all heads of a layer keep the same number. With B
    the selector's budget, W = ``window`` and L layers, layer l keeps max - l · ((max - min) // (L - 1)) + W tokens,
    min = (B - W) // ``beta`` and max = 2 (B - W) - min. Where max ≥ T - W, max = T - W and min = 2 (B - W) - max. Where
    T < 2 (B - W), and with one layer, all keep B. Steps are rounded down, so somewhat more than B stays in the mean.
    The authors' defaults; ``window`` must cover what the selector keeps in any case.

    ``rule=kvpress``: B counts without the window. Layer l keeps round(max - l · (max - min) / (L - 1)), min = B / beta,
    max = 2 B - min, with the same bound T - W; unless T ≥ max ≥ min ≥ W all layers keep B."""

    name = "pyramid"
    stores = "more tokens in early layers than in late ones"
    source = "Cai et al. 2024, arXiv 2406.02069; Zefan-Cai/KVCache-Factory pyramidkv/pyramidkv_utils.py"

    beta: int = 20
    window: int = 8
    rule: Literal["authors", "kvpress"] = "authors"

    def check(self) -> None:
        if self.beta < 1 or self.window < 0:
            raise UsageError(f"{self.name}: beta must be at least 1 and window not negative")

    def check_selector(self, selector: Selector) -> None:
        protected, called = selector.protects
        if self.window < protected:
            raise UsageError(
                f"{self.name}: window={self.window} does not cover what {selector.name} protects, {called}"
            )

    def most(self, tokens: int, length: int) -> tuple[int, int]:
        return min(length, 2 * tokens), min(length, 2 * tokens)

    def allot(self, scores: Sequence[Tensor], tokens: int) -> Tensor:
        import torch

        heads, length = scores[0].shape
        counts = self.counts(len(scores), tokens, length)
        return torch.tensor(counts)[:, None].expand(-1, heads).clone()

    def counts(self, layers: int, tokens: int, length: int) -> list[int]:
        """How many tokens of ``length`` each layer keeps."""
        even = [tokens] * layers
        spare = tokens - self.window if self.rule == "authors" else tokens
        if layers == 1 or spare < 1 or (self.rule == "authors" and length < 2 * spare):
            return even
        low: float = spare // self.beta if self.rule == "authors" else spare / self.beta
        high = 2 * spare - low
        if high >= length - self.window:
            high = length - self.window
            low = 2 * spare - high
        if self.rule == "authors":
            step = (high - low) // (layers - 1)
            return [int(high - layer * step) + self.window for layer in range(layers)]
        if not length >= high >= low >= self.window:
            return even
        return [round(high - layer * (high - low) / (layers - 1)) for layer in range(layers)]
