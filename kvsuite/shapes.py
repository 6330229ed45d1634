"""Shapes of well-known models: what their size and the time of a step follow from, without their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvsuite.errors import UsageError, unknown


@dataclass(frozen=True)
class ModelShape:
    """A decoder of the Llama kind: gated feed-forward layers, no biases, input and output embeddings of their own."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int

    def matrices(self) -> Iterator[tuple[int, int, int]]:
        """(outputs, inputs, how many) of all matrices that a decode step multiplies by, as engines merge them: Q, K and
        V are one; so are gate and up."""
        attended = self.heads * self.head_dim
        yield attended + 2 * self.kv_heads * self.head_dim, self.hidden, self.layers
        yield self.hidden, attended, self.layers
        yield 2 * self.intermediate, self.hidden, self.layers
        yield self.hidden, self.intermediate, self.layers
        yield self.vocab, self.hidden, 1

    @property
    def parameters(self) -> int:
        """All weights: the matrices, the input embedding, two norms a layer and the last one."""
        embedding, norms = self.vocab * self.hidden, (2 * self.layers + 1) * self.hidden
        return sum(n * k * times for n, k, times in self.matrices()) + embedding + norms


SHAPES = {
    "llama-2-7b": ModelShape(32, 32, 32, 128, 4096, 11008, 32000),
    "llama-2-13b": ModelShape(40, 40, 40, 128, 5120, 13824, 32000),
    "llama-2-70b": ModelShape(80, 64, 8, 128, 8192, 28672, 32000),
    "llama-3.1-8b": ModelShape(32, 32, 8, 128, 4096, 14336, 128256),
    "mistral-7b": ModelShape(32, 32, 8, 128, 4096, 14336, 32000),  # v0.2: without the sliding window of v0.1
    "qwen3-8b": ModelShape(36, 32, 8, 128, 4096, 12288, 151936),
}
"""From their config.json on the hub."""


PREFIX = "shape:"
"""What the name of a model begins with that is a shape with random weights."""


@dataclass(frozen=True)
class ShapedModel:
    """A shape with random weights, perhaps with fewer layers than the model has: only its speed means anything."""

    name: str
    shape: ModelShape
    layers: int
    """That run."""

    @property
    def scale(self) -> float:
        """The model's layers over those that run."""
        return self.shape.layers / self.layers


def is_shape(model: object) -> bool:
    """Whether a model that was named is one of these."""
    return str(model).startswith(PREFIX)


def shaped(model: object) -> ShapedModel:
    """Of ``shape:llama-3.1-8b`` or ``shape:llama-3.1-8b:layers=4``. Raises UsageError."""
    name, colon, rest = str(model).removeprefix(PREFIX).partition(":")
    found = shape(name)
    key, _, number = rest.partition("=")
    if colon and (key != "layers" or not number.isdecimal() or not 1 <= int(number) <= found.layers):
        raise UsageError(f"{model} is not shape:NAME or shape:NAME:layers=N with N from 1 to {found.layers}")
    return ShapedModel(name, found, int(number) if colon else found.layers)


def shape(name: str) -> ModelShape:
    """The shape of that name. Raises UsageError with the nearest known one."""
    if name not in SHAPES:
        raise unknown("model", name, SHAPES)
    return SHAPES[name]
