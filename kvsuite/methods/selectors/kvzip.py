"""KVzip: what the model looks back at when it repeats the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvsuite.cache.observations import ExtraPass, Observation
from kvsuite.errors import UsageError
from kvsuite.methods.base import BudgetSelector

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.prefill import PrefilledLayer


@dataclass(frozen=True)
class KVzip(BudgetSelector):
    """Keeps the first ``sinks`` tokens and those that the model looks back at when it is asked to repeat the context.
    It is fed the context once more behind the prefilled one, ``chunk`` tokens at a time, each after "Repeat the
    previous context exactly." or, from the second on, "Repeat the part of the previous context exactly, starting with"
    and the 8 tokens before it. score = the largest attention weight that a query of the token's own chunk gives it,
    over the query group; the softmax is over the sinks, the chunk in the context, and what is fed. This pass costs
    2 to 3 prefills, and the model must know positions for ``chunk`` tokens more. The authors set one threshold for
    all layers and heads: that is ``kvzip + dms``. Acts on the prompt alone; while decoding all new tokens stay. The
    authors' defaults."""

    name = "kvzip"
    stores = "sinks and the tokens that are attended to when the context is repeated, per kv head"
    source = "Kim et al. 2025, arXiv 2505.23416; snu-mllab/KVzip attention/score.py; kvpress kvzip_press.py"
    normalized: ClassVar[bool] = False

    budget: float = 0.3
    sinks: int = 4
    chunk: int = 2000

    def check(self) -> None:
        if self.sinks < 0 or self.chunk < 1:
            raise UsageError(f"{self.name}: sinks must not be negative, and chunk at least 1")
        super().check()

    @property
    def protects(self) -> tuple[int, str]:
        return self.sinks, f"its {self.sinks} sinks"

    @property
    def observes(self) -> tuple[Observation, ...]:
        return (ExtraPass(self.chunk, self.sinks, self.normalized),)

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        scores: Tensor = seen[self.observes[0]].clone()
        scores[:, : self.sinks] = float("inf")
        return scores
