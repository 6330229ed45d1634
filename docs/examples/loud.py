from dataclasses import dataclass

from kvsuite.cache.observations import HiddenStates
from kvsuite.methods import BudgetSelector


@dataclass(frozen=True)
class Loudest:
    """What is kept of each token's hidden state."""

    def note(self, hidden, layer):
        """hidden (n, hidden size) to (1, n), the same in all heads."""
        return hidden.float().abs().amax(-1)[None]


LOUDEST = HiddenStates(Loudest())


@dataclass(frozen=True)
class Loud(BudgetSelector):
    """The tokens with the largest number in their hidden states, and the last ones; every 64 steps to its budget."""

    name = "loud"
    stores = "the tokens with the largest hidden states, and the last `recent`"
    source = "docs/add-a-method.md"
    observes = (LOUDEST,)

    recent: int = 8
    every: int = 64

    @property
    def protects(self):
        return self.recent, f"its {self.recent} newest tokens"

    def score(self, seen, tokens):
        heads, length = seen.k.shape[:2]
        scores = seen[LOUDEST].repeat(heads, 1)
        scores[:, length - self.recent :] = float("inf")
        return scores

    @property
    def eviction(self):
        return Quieter(self.recent, self.every)


@dataclass(frozen=True)
class Quieter:
    """What it does while a sequence is decoded."""

    recent: int
    every: int
    observes = (LOUDEST,)
    rerotated_sinks = 0

    def parameters(self, length):
        return ()

    def score(self, state):
        newest = state.positions >= state.num_seen - self.recent
        return state.noted.masked_fill(newest, float("inf"))
