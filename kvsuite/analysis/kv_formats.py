"""A method as a kernel of a decode step: measured where the tables have its format, a stated model where they have not.

The model: a kernel takes as long as a measured one takes for its shortest contexts, and its bytes over the bandwidth
that the measured one achieves. That is the engine's fp8 kernel, which decodes what it reads as such a kernel would have
to, else its bf16 kernel. Eviction is a measured kernel over fewer tokens. Neither counts what selecting, packing or
unpacking costs, so both say what could be gained at best.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from kvsuite.analysis.kernel_times import Extended, Grid, Kernel, Modelled, Shorter
from kvsuite.errors import UsageError
from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.methods.grammar import parse
from kvsuite.shapes import ModelShape

if TYPE_CHECKING:
    from kvsuite.kernels.context import LayerContext

FP8, BF16 = "fp8", "bfloat16"
"""As the tables call K/V dtypes."""


class NotMeasured(UsageError):
    """A format that has no rows."""


def kernel_of(text: str, grids: Mapping[str, Grid], shape: ModelShape, extended: bool = False) -> Kernel:
    """The kernel of the method that ``text`` names, on the grids of its engine by K/V dtype; ``extended``: also beyond
    what was measured. Raises UsageError for a method without a model, NotMeasured for fp8 where there are no rows."""
    method = parse(text)
    plain = method.codec.spelled() == "full" or method.codec.name == "jitter"
    if method.reader is not None or (plain and method.selector is None):
        raise UsageError(f"{method.name!r} stores all of K and V in bf16: there is nothing to compare")
    if any(method.codec.at(layer, shape.layers) != method.codec for layer in range(shape.layers)):
        raise UsageError(f"{method.name!r} does not store all layers alike: no kernel is like it")
    dtype = BF16 if plain else FP8 if method.codec.spelled() == "fp8" else None
    if dtype is None:
        specs = method.codec.specs(cast("LayerContext", shape))  # of which codecs read head_dim alone
        base = grids.get(FP8, grids[BF16])
        found: Kernel = Modelled(method.name, base, lambda n: shape.kv_heads * stored(specs, n, shape.head_dim))
    elif dtype in grids:
        found = Extended(grids[dtype]) if extended else grids[dtype]
    else:
        raise NotMeasured(f"there are no rows with {dtype} K/V, only with {', '.join(grids)}")
    return found if method.selector is None else Shorter(method.name, found, method.tokens)


def stored(specs: tuple[QuantSpec, QuantSpec], length: int, head_dim: int) -> float:
    """Bytes of K and V of one head and ``length`` tokens; what is not encoded yet is in bf16."""
    total = 0.0
    for spec in specs:
        encoded = int(spec.num_encoded(length))
        total += encoded * _token(spec, head_dim) + (length - encoded) * 2 * head_dim
    return total


def _token(spec: QuantSpec, head_dim: int) -> float:
    """Bytes of one encoded token: `QuantSpec.fields` as numbers, without torch."""
    if spec.layout in ("token", "channel"):
        return head_dim * spec.bits / 8 + head_dim / spec.group * 4  # float16 scale and zero
    if spec.layout == "plain":
        return 2 * head_dim
    if spec.layout == "symmetric":
        return head_dim * spec.bits / 8 + head_dim / spec.group * 2
    if spec.layout == "e2m1":
        return head_dim * spec.bits / 8 + head_dim / spec.group
    if spec.layout == "levels":
        return head_dim * spec.bits / 8 + 2
    if spec.layout == "fp8":
        return head_dim + (4 if spec.scale is None else 0)
    raise UsageError(f"{type(spec).__name__} has no known layout, so its bytes are unknown")
