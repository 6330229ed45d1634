"""Checking a cache while it attends: is the output the attention over what it holds, or over what its reader reads?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvsuite.cache.layer import LayerCache
from kvsuite.kernels.context import HeadView
from kvsuite.kernels.quantspec import PAGE


class AttentionChecker:
    """Compares one row's decoding attention, layer by layer, with float64 attention over what the row holds."""

    def __init__(self, row: int = 0) -> None:
        self.row = row
        self.layers = 0
        """Layer outputs compared so far."""
        self.worst = 0.0
        """The largest error so far in units of what rounding can explain; more than 1 is a wrong result."""
        self._held: list[HeadView] = []

    def before(self, cache: LayerCache) -> None:
        """What the row holds, its newest token included, before it is attended to (and perhaps evicts)."""
        self._held = cache.read(self.row)

    def after(
        self,
        cache: LayerCache,
        rows: Sequence[int | None],
        q: Tensor,
        out: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> None:
        """q and out (len(rows), heads, 1, head_dim) of one step."""
        at = list(rows).index(self.row)
        group = q.shape[1] // len(self._held)
        for head in range(q.shape[1]):
            held = self._held[head // group]
            if cache.pages_read is not None:  # a reader is checked against what it read
                chosen = cache.pages_read[at]
                assert chosen is not None
                read = torch.isin(held.slots // PAGE, torch.from_numpy(chosen[head // group]).to(held.slots.device))
                held = HeadView(
                    held.k[read], held.v[read], held.positions[read], held.slots[read], held.exact, held.integers
                )
            sink = None if sink_logits is None else sink_logits[head].double()
            found = error(q[at, head, 0], out[at, head, 0], held, scale, window, softcap, sink)
            self.worst = max(self.worst, found)
        self.layers += 1


def error(
    q: Tensor,
    out: Tensor,
    held: HeadView,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> float:
    """How far ``out`` (head_dim,) is from attention of ``q`` over ``held`` in float64, in units of the largest error of
    an attention that keeps scores and sums in float32 and rounds weights and result to q's dtype (keys and values too,
    if what is held is not ``exact``; queries and weights to 16 bits with ``integers``; scores, if ``rounded``).
    Infinite for NaN."""
    k, v = held.k.double(), held.v.double()
    if window is not None:
        inside = held.positions > held.positions[-1] - window
        k, v = k[inside], v[inside]
    scores = (k @ q.double()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    top = scores.max() if sink is None else torch.maximum(scores.max(), sink)
    raised = (scores - top).exp()
    p = raised / (raised.sum() + (0 if sink is None else (sink - top).exp()))
    unit, single = torch.finfo(q.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    products = float((k.abs() @ q.double().abs()).max()) * scale * (q.shape[-1] + 4) * single
    if not held.exact:
        # every number is rounded on its own way to the score: 8 standard deviations of their sum
        products += 8 * unit / 3**0.5 * float((k.square() @ q.double().square()).max().sqrt()) * scale
    values: float | Tensor = 0.0
    if held.integers:  # steps of a 32766th of the largest, times codes that span at most twice a token's largest number
        deviation = 8 / 12**0.5 / (32766 if q.shape[-1] <= 256 else 16383)
        largest = float(held.k.double().abs().max())  # also of what the window hides: it may share a scale
        products += deviation * q.shape[-1] ** 0.5 * float(q.abs().max()) * scale * 2 * largest
        values = deviation * 64**0.5 * float(p @ (2 * v.abs().amax(1)))
    if held.rounded:  # each score by itself, as product, times the scale and with a mask: 8 standard deviations
        values = 8 * unit * ((p * scores)[:, None] * (v - p @ v)).square().sum(0).sqrt()
    allowed = (2 * products + (3 + (not held.exact)) * unit + (len(k) + 8) * single) * (p @ v.abs())
    allowed = allowed + values + torch.finfo(q.dtype).tiny * 2 * unit * (1 + v.abs().sum(0))
    found = float(((out.double() - p @ v).abs() / allowed).max())
    return found if found == found else float("inf")
