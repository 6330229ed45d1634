"""Attention as its formula says, one query head at a time in float64, and how far rounding may carry one from it."""

import torch
from torch import Tensor

from kvsuite.kernels.hadamard import hadamard


def weights(
    q: Tensor,
    k: Tensor,
    scale: float,
    allowed: Tensor | None = None,
    softcap: float | None = None,
    sink: float | None = None,
) -> Tensor:
    """q (Q, D), k (n, D), allowed bool (Q, n) -> float64 (Q, n)."""
    scores = scale * (q.double() @ k.double().T)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    raised = scores.exp()  # float64 needs no subtraction of the largest at these sizes
    if allowed is not None:
        raised = raised * allowed
    total = raised.sum(-1, keepdim=True)
    return raised / (total if sink is None else total + torch.tensor(sink).double().exp())


def causal(queries: Tensor, keys: Tensor, window: int | None = None) -> Tensor:
    """bool (Q, n): keys (positions) not after the query's position and fewer than ``window`` before it."""
    allowed = torch.zeros(len(queries), len(keys), dtype=torch.bool)
    for i, query in enumerate(queries.tolist()):
        for j, key in enumerate(keys.tolist()):
            allowed[i, j] = key <= query and (window is None or query - key < window)
    return allowed


def rounding(
    q: Tensor, k: Tensor, v: Tensor, scale: float, p: Tensor, integers: bool = False, exact: bool = True,
    rotated: tuple[bool, bool] = (False, False),
) -> Tensor:  # fmt: skip
    """The largest error, (Q, D), of an attention with float64 weights ``p`` that keeps scores and sums in float32 and
    rounds the weights, with their sum, and the result to q's dtype. A score's error acts on a weight and on the sum.
    With ``integers`` queries and weights are multiplied by codes in steps of a 32766th of the largest; rounding to them
    is uniform, and 8 standard deviations are allowed. Unless ``exact``, keys and values are rounded, too. ``rotated``,
    of K and of V: what is rounded was turned before."""
    unit, single = torch.finfo(q.dtype).eps / 2, torch.finfo(torch.float32).eps / 2
    score = float((q.double().abs() @ k.double().abs().T).max()) * scale * (q.shape[-1] + 4) * single
    values: Tensor | float = 0.0
    if not exact:
        products = k.double().square() @ q.double().square().T
        score += 8 * unit / 3**0.5 * float(products.max().sqrt()) * scale
    if integers:
        of = zip((q, k, v), (rotated[0], *rotated), strict=True)
        step, turned = 8 / 12**0.5 / 32766, [hadamard(x) if turns else x for x, turns in of]
        most = [float(x.double().abs().max()) for x in turned[:2]]
        score += step * q.shape[-1] ** 0.5 * most[0] * scale * 2 * most[1]
        values = step * 8 * (p @ (2 * turned[2].double().abs().amax(1)))[:, None]  # 64 tokens share the largest weight
    relative = 2 * score + (3 + (not exact)) * unit + (k.shape[0] + 8) * single
    tiny = torch.finfo(q.dtype).smallest_normal * 2 * unit  # what subnormal weights and results are rounded by
    return relative * (p @ v.double().abs()) + values + tiny * (1 + v.double().abs().sum(0))
