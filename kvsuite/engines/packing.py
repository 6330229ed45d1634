"""A model's weights in the order in which this CPU's matrix products read them fastest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from kvsuite.environment import memory

ROWS = 8
"""The order suits products of so many rows best; those of one and of thousands are no slower than without it."""
MOST = 0.25
"""The packed weights are a second copy: the share of this machine's memory that it may take."""


def pack(model: Any) -> str:
    """Let a model's linear layers on a CPU multiply by packed weights where PyTorch can do that here and the results
    are the same but for rounding. Returns what was done, for a run's facts.

    The operators are those that `torch.compile` uses for frozen weights; they are no public interface.
    """
    layers = [module for module in model.modules() if type(module) is torch.nn.Linear]
    needed = sum(layer.weight.nbytes for layer in layers)
    if needed > MOST * memory() * 2**30:
        return f"weights not packed: {needed / 2**30:.1f} GiB more are above {MOST:.0%} of the memory"
    try:
        products = [_packed(layer) for layer in layers]
        shapes = {(layer.weight.shape, layer.bias is None): at for at, layer in enumerate(layers)}
        agree = all(_agrees(layers[at], products[at]) for at in shapes.values())  # one of each shape
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return "weights not packed: this PyTorch cannot do it here"
    if not agree:
        return "weights not packed: products would differ"
    for layer, product in zip(layers, products, strict=True):
        layer.forward = product  # type: ignore[assignment, method-assign]
    return "weights packed"


def _packed(layer: torch.nn.Linear) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)
    bias = None if layer.bias is None else layer.bias.detach()
    return partial(_multiply, weight, bias)


def _multiply(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


@torch.no_grad()
def _agrees(layer: torch.nn.Linear, product: Callable[[Tensor], Tensor]) -> bool:
    """Whether products differ by no more than roundings: of sums in float32, and of results in the layer's dtype."""
    weight = layer.weight
    x = torch.linspace(-1, 1, ROWS * layer.in_features).view(ROWS, -1).to(weight.dtype)
    expected, found = linear(x, weight, layer.bias).float(), product(x).float()
    terms, results = linear(x.abs().float(), weight.abs().float()), expected.abs()
    if layer.bias is not None:
        terms, results = terms + layer.bias.abs(), results + layer.bias.abs()
    sums = layer.in_features * torch.finfo(torch.float32).eps * terms
    return bool(((found - expected).abs() <= sums + 2 * torch.finfo(weight.dtype).eps * results).all())
