"""Two methods from outside, loaded as a plug-in: each uses what none of the built-in ones does."""

from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity

from kvsuite.cache.observations import LastQueries
from kvsuite.methods import Reader, Selector


@dataclass(frozen=True)
class Redundant(Selector):
    """Compacts every ``every`` steps to what the last queries attend to and what is unlike the other keys (as R-KV)."""

    name = "redundant"
    stores = "a budget, compacted every so many steps"
    source = "test fixture, after R-KV (arXiv 2505.24133)"

    budget: int = 24
    every: int = 128
    window: int = 8
    rerotated_sinks = 0
    observes = (LastQueries(8),)

    @property
    def eviction(self):
        return self

    def parameters(self, length):
        return ()

    def tokens(self, length):
        return self.budget

    def importance(self, q, k, positions):
        """q (heads, W, D), k (kv_heads, n, D), positions (kv_heads, n) -> (kv_heads, n)."""
        q, k, empty = q.double(), k.double(), positions < 0
        scores = q.reshape(len(k), -1, q.shape[-1]) @ k.transpose(1, 2)
        weights = scores.masked_fill(empty[:, None], -torch.inf).softmax(-1).mean(1)
        alike = cosine_similarity(k, k.masked_fill(empty[..., None], 0).sum(1, keepdim=True), dim=-1)
        alike = alike.masked_fill(empty, -torch.inf).softmax(-1)
        newest = positions >= positions.amax(-1, keepdim=True) - self.window + 1
        return (0.07 * weights - 0.93 * alike).masked_fill(newest, torch.inf)

    def score(self, seen, tokens=None):
        if tokens is None:  # while decoding
            return self.importance(seen.queries, seen.k, seen.positions)
        positions = torch.arange(seen.k.shape[1]).expand(len(seen.k), -1)
        return self.importance(seen[self.observes[0]], seen.k, positions)


@dataclass(frozen=True)
class TopPages(Reader):
    """Reads the ``top`` pages whose keys could give the query most (as Quest)."""

    name = "top-pages"
    stores = "everything, and each page's smallest and largest key channels"
    source = "test fixture, after Quest (arXiv 2406.10774)"

    top: int = 2

    def summaries(self, head_dim, dtype):
        return (((2, head_dim), dtype),)

    def summarise(self, k, held):
        low = k.masked_fill(~held[..., None], torch.inf).amin(1)
        return (torch.stack([low, k.masked_fill(~held[..., None], -torch.inf).amax(1)], 1),)

    def pages(self, q, summaries):
        (low, high), q = summaries[0].float().unbind(1), q.float().mean(0)
        most = torch.maximum(q * low, q * high).sum(-1)
        return most.topk(min(self.top, len(most))).indices.sort().values
