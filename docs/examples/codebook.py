from dataclasses import dataclass

from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.methods import Codec
from kvsuite.methods.artifact import Artifact


@dataclass(frozen=True)
class Codebook(Codec):
    """16 levels of the rotated numbers, learned from a text, times a scale of each sequence and head."""

    name = "codebook"
    stores = "4-bit indices, one a byte, into calibrated levels; a scale per sequence and head"
    source = "docs/add-a-method.md"

    def calibrate(self, context):
        import torch

        scaled = torch.cat([(rotated(x) / largest(x)[:, None]).flatten() for s in context for x in (s.k, s.v)])
        return Artifact({"levels": scaled[:: 1 + len(scaled) // 1_000_000].quantile(torch.linspace(0, 1, 16))})

    def specs(self, layer, artifact=None):
        levels = [n / 7.5 - 1 for n in range(16)] if artifact is None else artifact.tensors["levels"].tolist()
        return (Levels(tuple(levels)),) * 2


@dataclass(frozen=True)
class Levels(QuantSpec):
    levels: tuple[float, ...]

    def fields(self, head_dim, kv_dtype):  # of one token: shape and dtype
        import torch

        return [((head_dim,), torch.uint8)]

    def fitted(self, head_dim, kv_dtype):  # of one sequence and kv head
        import torch

        return [((1,), torch.float32)]

    def fit(self, x, queries):
        return (largest(x),)

    def encode(self, x, fitted):  # x (n, tokens, 1, head_dim), fitted (n, 1)
        scaled = rotated(x[:, :, 0]) / fitted[0][:, None]
        return ((scaled[..., None] - scaled.new_tensor(self.levels)).abs().argmin(-1).byte(),)

    def decode(self, fields, dtype, fitted):
        numbers = fitted[0].new_tensor(self.levels)[fields[0].long()] * fitted[0][:, None]
        return rotated(numbers).to(dtype).unsqueeze(2)


def rotated(x):
    from kvsuite.kernels.hadamard import hadamard

    return hadamard(x)


def largest(x):  # (kv_heads, T, head_dim) to (kv_heads, 1)
    return rotated(x).abs().amax((1, 2))[:, None].clamp(min=1e-6)
