"""Checking a cache while it attends: is the output the attention over what it holds, or over what its reader reads?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvsuite.cache.layer import LayerCache
from kvsuite.kernels.context import HeadView
from kvsuite.kernels.hadamard import hadamard
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
        for head, held in enumerate(self._held):
            if cache.pages_read is not None:  # a reader is checked against what it read
                chosen = cache.pages_read[at]
                assert chosen is not None
                read = torch.isin(held.slots // PAGE, torch.from_numpy(chosen[head]).to(held.slots.device))
                fields = (held.k[read], held.v[read], held.positions[read], held.slots[read])
                held = HeadView(*fields, held.exact, held.integers, held.rotated)
            own = slice(head * group, (head + 1) * group)
            sinks = None if sink_logits is None else sink_logits[own]
            found = error(q[at, own, 0], out[at, own, 0], held, scale, window, softcap, sinks)
            self.worst = max(self.worst, found)
        self.layers += 1


def error(
    q: Tensor,
    out: Tensor,
    held: HeadView,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> float:
    """How far ``out`` (n, head_dim) is from attention of ``q`` (n, head_dim) over ``held`` in float64, in units of the
    largest error of an attention that keeps scores and sums in float32 and rounds weights and result to q's dtype (keys
    and values too, if what is held is not ``exact``, also after they were turned if they are ``rotated``; queries and
    weights to 16 bits with ``integers``; scores, if ``rounded``). ``sinks`` (n,). Infinite for NaN."""
    k, v, wide = held.k.double(), held.v.double(), q.double()
    if window is not None:
        inside = held.positions > held.positions[-1] - window
        k, v = k[inside], v[inside]
    scores = (wide @ k.T) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    top = scores.amax(1, keepdim=True)
    rest: Tensor | float = 0.0
    if sinks is not None:
        logits = sinks.double()[:, None]
        top = torch.maximum(top, logits)
        rest = (logits - top).exp()
    raised = (scores - top).exp()
    p = raised / (raised.sum(1, keepdim=True) + rest)
    unit, single = torch.finfo(q.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    products = (wide.abs() @ k.abs().T).amax(1) * scale * (q.shape[-1] + 4) * single
    queries, keys = (hadamard(x).double() if held.rotated[0] else x for x in (wide, held.k.double()))
    turned = hadamard(v).double() if held.rotated[1] else v
    values = torch.zeros_like(products)[:, None]
    if not held.exact:
        # every number is rounded on its own way to the score: 8 standard deviations of their sum
        deviation = 8 * unit / 3**0.5
        products += deviation * (wide.square() @ k.square().T).amax(1).sqrt() * scale
        if held.rotated[0]:
            products += deviation * (queries.square() @ keys.square().T).amax(1).sqrt() * scale
        if held.rotated[1]:  # a channel gets a share of what a block's numbers are rounded by
            block = v.shape[1] & -v.shape[1]
            values = values + deviation * ((p.square() @ turned.square()).sum(1, keepdim=True) / block).sqrt()
    if held.integers:  # steps of a 32766th of the largest, times codes that span at most twice a token's largest number
        deviation = 8 / 12**0.5 / (32766 if q.shape[-1] <= 256 else 16383)
        largest = float(keys.abs().max())  # also of what the window hides: it may share a scale
        products += deviation * q.shape[-1] ** 0.5 * queries.abs().amax(1) * scale * 2 * largest
        values = values + deviation * 64**0.5 * (p @ (2 * turned.abs().amax(1)))[:, None]
    if held.rounded:  # each score by itself, as product, times the scale and with a mask: 8 standard deviations
        moved = (p * scores)[:, :, None] * (v - (p @ v)[:, None])
        values = 8 * unit * moved.square().sum(1).sqrt()
    allowed = (2 * products + (3 + (not held.exact)) * unit + (len(k) + 8) * single)[:, None] * (p @ v.abs())
    allowed = allowed + values + torch.finfo(q.dtype).tiny * 2 * unit * (1 + v.abs().sum(0))
    found = float(((out.double() - p @ v).abs() / allowed).max())
    return found if found == found else float("inf")
