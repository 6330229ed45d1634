"""Some layers whole."""

from __future__ import annotations

from dataclasses import dataclass

from kvsuite.errors import UsageError
from kvsuite.methods.budgets.uniform import Uniform


@dataclass(frozen=True)
class Layers(Uniform):
    """The ``first`` and ``last`` layers keep everything, also while decoding; each head of the others keeps the
    selector's budget: count = T or B. So more stays than the budget says. Defaults: the first two layers, which Knorm's
    authors and Quest's leave whole."""

    name = "layers"
    stores = "everything in the first and last layers, the selector's budget in the others"
    source = "Devoto et al. 2024, arXiv 2406.11430 (first=2); mit-han-lab/Quest evaluation/quest_attention.py"

    first: int = 2
    last: int = 0

    def check(self) -> None:
        if self.first < 0 or self.last < 0 or self.first + self.last == 0:
            raise UsageError(f"{self.name}: first and last must not be negative, and one of them above 0")

    def whole(self, layer: int, layers: int) -> bool:
        return layer < self.first or layer >= layers - self.last

    def most(self, tokens: int, length: int) -> tuple[int, int]:
        return length, length
