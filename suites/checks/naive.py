"""Attention and integer codes as their formulas say, in float64: of attention one query head at a time, and how far
rounding may carry one from it."""

import numpy as np
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
        if rotated[1]:  # turned back, each channel gets a share of what all of its block are rounded by
            shares = (p.square() @ hadamard(v).double().square()).sum(1, keepdim=True) / (v.shape[1] & -v.shape[1])
            values = 8 * unit / 3**0.5 * shares.sqrt()
    if integers:
        of = zip((q, k, v), (rotated[0], *rotated), strict=True)
        step, turned = 8 / 12**0.5 / 32766, [hadamard(x) if turns else x for x, turns in of]
        most = [float(x.double().abs().max()) for x in turned[:2]]
        score += step * q.shape[-1] ** 0.5 * most[0] * scale * 2 * most[1]
        values = (
            values + step * 8 * (p @ (2 * turned[2].double().abs().amax(1)))[:, None]
        )  # 64 tokens share the largest weight
    relative = 2 * score + (3 + (not exact)) * unit + (k.shape[0] + 8) * single
    tiny = torch.finfo(q.dtype).smallest_normal * 2 * unit  # what subnormal weights and results are rounded by
    return relative * (p @ v.double().abs()) + values + tiny * (1 + v.double().abs().sum(0))


def float16(x: np.ndarray, up: bool) -> np.ndarray:
    """The nearest float16 of a float64 on that side of it."""
    half = x.astype(np.float16)
    wrong = half < x if up else half > x
    return np.where(wrong, np.nextafter(half, np.float16(np.inf if up else -np.inf)), half).astype(np.float64)


def check_codes(x: Tensor, bits: int, stored: tuple[Tensor, ...], off: Tensor | float = 0.0) -> Tensor:
    """AssertionError unless ``stored`` are x's codes (…, n), scale and zero (…, 1): zero = min rounded down to float16,
    scale = (max - zero) / (2^bits - 1) rounded up to it, and the integers nearest to (x - zero) / scale. x float64
    (…, n). float32 computes the quotients; one that it cannot tell from a float16 or from a half may go either way.
    ``off``: so far may x be from what was encoded, because float32 computed that, too. Returns code · scale + zero."""
    codes, scale, zero = (part.double().numpy() for part in stored)
    value, far = x.double().numpy(), np.asarray(torch.as_tensor(off).double())
    levels, single = 2**bits - 1, 2.0**-22
    low, high = value.min(-1, keepdims=True), value.max(-1, keepdims=True)
    assert (float16(low - far, False) <= zero).all()
    assert (zero <= float16(low + far, False)).all()
    step = (high - zero) / levels
    assert (float16(step * (1 - single) - far / levels, True) <= scale).all()
    assert (scale <= float16(step * (1 + single) + far / levels, True)).all()
    exact = (value - zero) / np.where(scale > 0, scale, 1)
    nearest, room = np.clip(np.rint(exact), 0, levels), levels * single + far / np.where(scale > 0, scale, np.inf)
    from_half = abs(exact - np.floor(exact) - 0.5)
    assert ((codes == nearest) | (from_half <= room)).all()
    assert (abs(codes - exact) <= 0.5 + room).all()
    return torch.from_numpy(codes * scale + zero)
