"""KVzap: a small model predicts KVzip+'s scores from hidden states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from kvsuite import disk
from kvsuite.cache.observations import HiddenStates, Observation
from kvsuite.errors import UsageError
from kvsuite.methods.artifact import Artifact
from kvsuite.methods.base import BudgetSelector

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.prefill import PrefilledLayer
    from kvsuite.kernels.context import LayerContext


@dataclass(frozen=True)
class KVzap(BudgetSelector):
    """Keeps the last ``recent`` tokens and those whose score a small model of each layer predicts to be highest:
    score = W h + b, or W₂ gelu(W₁ h + b₁) + b₂, of the hidden state h before the layer's projections. It was trained on
    the logarithm of `kvzip-plus`'s scores. ``weights`` is its file in safetensors, as nvidia/KVzap-* on Hugging Face's
    hub have it (model.safetensors): layers.0.weight (kv_heads, hidden size) and layers.0.bias, or layers.0.0.weight,
    layers.0.0.bias, layers.0.2.weight, layers.0.2.bias. Its hash stands in the records. The authors set a threshold:
    ``kvzap:weights=FILE + dms:threshold=-4``; 128 recent tokens are kvpress's default. Acts on the prompt alone; while
    decoding all new tokens stay."""

    name = "kvzap"
    stores = "the newest tokens and those with the highest predicted scores, per kv head"
    source = "Jegou & Jeblick 2026, arXiv 2601.07891; kvpress kvzap_press.py, dms_press.py"

    weights: str = ""
    recent: int = 128

    def check(self) -> None:
        if not self.weights:
            raise UsageError(f"{self.name}: name the file of its weights for this model, weights=FILE.safetensors")
        if not disk.is_file(Path(self.weights)):
            raise UsageError(f"{self.name}: there is no file {self.weights!r}")
        if self.recent < 0:
            raise UsageError(f"{self.name}: recent={self.recent} must not be negative")
        super().check()

    @property
    def protects(self) -> tuple[int, str]:
        return self.recent, f"its {self.recent} newest tokens"

    @property
    def observes(self) -> tuple[Observation, ...]:
        return (HiddenStates(Predicted(self.weights)),)

    @property
    def artifact(self) -> Artifact:
        return loaded(self.weights)

    def check_model(self, layers: Sequence[LayerContext]) -> None:
        own = self.artifact.tensors
        count = len({name.split(".")[1] for name in own if name.startswith("layers.")})
        if count != len(layers):
            raise UsageError(f"{self.name}: {self.weights} is for {count} layers, the model has {len(layers)}")
        for layer in layers:
            first, last = _names(own, layer.index)
            wanted = ((last, 0, layer.kv_heads, "kv heads"), (first, 1, layer.hidden_size, "channels of hidden states"))
            for name, axis, size, called in wanted:
                there = own.get(f"{name}.weight")
                found = 0 if there is None or there.dim() != 2 else there.shape[axis]
                if found != size:
                    raise UsageError(
                        f"{self.name}: {self.weights} has {found} {called} in layer {layer.index}, the model has {size}"
                    )
            sizes = [own[f"{name}.weight"].shape for name in dict.fromkeys((first, last))]
            biases = [own.get(f"{name}.bias") for name in dict.fromkeys((first, last))]
            fit = all(b is not None and b.shape == s[:1] for b, s in zip(biases, sizes, strict=True))
            if not fit or (len(sizes) == 2 and sizes[1][1] != sizes[0][0]):
                raise UsageError(f"{self.name}: {self.weights} has sizes in layer {layer.index} that do not fit")

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        scores: Tensor = seen[self.observes[0]].clone()
        scores[:, scores.shape[1] - self.recent :] = float("inf")
        return scores


@dataclass(frozen=True)
class Predicted:
    """The scores that a file's small models predict."""

    weights: str

    def note(self, hidden: Tensor, layer: int) -> Tensor:
        """hidden (n, hidden size) to float32 (kv_heads, n)."""
        from torch.nn.functional import gelu, linear

        x, own = hidden.float(), loaded(self.weights).tensors
        for at, name in enumerate(dict.fromkeys(_names(own, layer))):
            weight, bias = (own[f"{name}.{part}"].to(x.device).float() for part in ("weight", "bias"))
            x = linear(gelu(x) if at else x, weight, bias)
        return x.T.contiguous()


def _names(own: Mapping[str, Tensor], layer: int) -> tuple[str, str]:
    """What a layer's first and last matrix are called; one name where there is one."""
    if f"layers.{layer}.0.weight" in own:
        return f"layers.{layer}.0", f"layers.{layer}.2"
    return f"layers.{layer}", f"layers.{layer}"


@cache
def loaded(path: str) -> Artifact:
    """The tensors of a file. Raises UsageError where it is none of safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return Artifact(load_file(path))
    except SafetensorError as error:
        raise UsageError(f"{path} is no file of safetensors: {error}") from error
