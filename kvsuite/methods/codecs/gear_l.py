"""GEAR-L: a quantized cache, and its error in low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvsuite.errors import UsageError
from kvsuite.kernels.quantspec import PAGE, QuantSpec
from kvsuite.methods.base import Codec, share

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kvsuite.kernels.context import LayerContext
    from kvsuite.kernels.quantspec import Shape
    from kvsuite.methods.artifact import Artifact

ROUNDS = 3


@dataclass(frozen=True)
class GearL(Codec):
    """X ≈ Q(X) + L Rᵀ. Q is asymmetric with float16 scales and zeros: K per channel over 32 tokens, V per token in
    groups of ``group`` channels. R (head_dim, ``rank``) is learned of each prompt, per head: the row space of the error
    of Q on the prompt, by 3 rounds of power iteration, the last one with QR. L is each token's error times R. Both are
    float16. ``rank`` below 1 is a share of head_dim. The last T mod ``residual`` tokens stay as they are.

    The authors' code encodes ``residual`` tokens together after the newest of them has attended, as ``order=after``;
    else they are encoded before. It also gives each ``residual`` decoded tokens an R of their own, of rank 2. The
    defaults of ``rank``, ``group`` and ``residual`` are theirs."""

    name = "gear-l"
    stores = "4-, 2- or 8-bit codes, a correction of rank 4, and up to 64 last tokens in full"
    source = (
        "Kang et al. 2024, arXiv 2403.05527; opengear-project/GEAR GEARLM/Simulated/compress_function.py, "
        "cuda_supported_gear/modeling_llamagear.py"
    )
    always = ("bits",)

    bits: Literal[4, 2, 8] = 4
    rank: float = 4
    group: Literal[64, 32, 16, 8] = 64
    residual: int = 64
    order: Literal["before", "after"] = "before"

    def check(self) -> None:
        super().check()
        if self.rank <= 0 or (self.rank > 1 and self.rank != int(self.rank)):
            raise UsageError(f"{self.name}: rank={self.rank:g} must be a whole number above 0 or a share of head_dim")
        if self.residual < PAGE or self.residual % PAGE:
            raise UsageError(f"{self.name}: residual={self.residual} must be a multiple of {PAGE}")

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        dim, group = layer.head_dim, min(self.group, layer.head_dim)
        if dim % group or dim % 8 or dim > 256:
            raise UsageError(
                f"{self.name}: head dimension {dim} is above 256, or group={self.group} does not divide it"
            )
        rank = share(self.rank, dim)
        if rank > dim:
            raise UsageError(f"{self.name}: rank={rank} is above the head dimension {dim}")
        own = (self.residual, rank, self.order == "after")
        keys = Corrected(self.bits, PAGE, PAGE, *own, self.exact(PAGE))
        return keys, Corrected(self.bits, 1, group, *own, self.exact(dim))

    def exact(self, vector: int) -> int:
        """How many numbers at each end of a vector of so many are kept exactly."""
        return 0


@dataclass(frozen=True)
class Corrected(QuantSpec):
    """``block`` tokens together. A vector is a channel of them, or where ``block`` is 1 a token. Fields, each (…,
    vectors, n): codes, uint8; scale and zero, float16, with a last dimension of 1; the lowest and the highest numbers,
    in the K/V dtype, and their places, uint8; L, float16 (…, block, rank). Fitted: R, float16 (head_dim, rank)."""

    bits: int
    block: int
    group: int
    """Of a vector, what shares a scale."""
    residual: int
    rank: int = 4
    late: bool = False
    exact: int = 0
    """Numbers at each end of a vector that are kept."""

    def fields(self, head_dim: int, kv_dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        import torch

        vectors, n = (1, head_dim) if self.block == 1 else (head_dim, self.block)
        scale = ((vectors, n // self.group, 1), torch.float16)
        kept = [((vectors, 2 * self.exact), kind) for kind in (kv_dtype, torch.uint8) if self.exact]
        codes, left = ((vectors, n * self.bits // 8), torch.uint8), ((self.block, self.rank), torch.float16)
        return [codes, scale, scale, *kept, left]

    def fitted(self, head_dim: int, kv_dtype: torch.dtype) -> list[tuple[Shape, torch.dtype]]:
        import torch

        return [((head_dim, self.rank), torch.float16)]

    def fit(self, x: Tensor, queries: Tensor | None) -> tuple[Tensor, ...]:
        import torch

        missing = -x.shape[1] % self.block
        padded = torch.cat([x, x[:, -1:].expand(-1, missing, -1)], dim=1)
        whole = padded.view(len(x), -1, self.block, x.shape[2])
        error = self._error(whole, self._quantized(whole)).flatten(1, 2)[:, : x.shape[1]]
        return (torch.stack([row_space(own, self.rank) for own in error]).half(),)

    def encode(self, x: Tensor, fitted: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        stored = self._quantized(x)
        left = self._error(x, stored).double() @ fitted[0].double().unsqueeze(
            1
        )  # so that it does not depend on a batch
        return *stored, left.half()

    def decode(self, fields: tuple[Tensor, ...], dtype: torch.dtype, fitted: tuple[Tensor, ...]) -> Tensor:
        import torch

        *stored, left = fields
        x = self._vectors(self._dequantized(*stored[:3]))
        for rank in range(self.rank):
            basis = fitted[0][:, None, None, :, rank].float()
            x = torch.addcmul(x, left[..., rank : rank + 1].float(), basis)
        return self._vectors(_with_exact(self._vectors(x), *stored[3:])).to(dtype)

    def _vectors(self, x: Tensor) -> Tensor:
        """(…, block, head_dim) -> (…, vectors, n), and back."""
        return x if self.block == 1 else x.transpose(-1, -2)

    def _quantized(self, x: Tensor) -> tuple[Tensor, ...]:
        """All fields but L."""
        import torch

        from kvsuite.kernels.quantize import blocks, pack, quantize

        vectors = self._vectors(x)
        kept: tuple[Tensor, ...] = ()
        if self.exact:
            ordered, places = vectors.sort(dim=-1, stable=True)
            ends = [*range(self.exact), *range(-self.exact, 0)]
            kept = ordered[..., ends], places[..., ends].to(torch.uint8)
            vectors = vectors.clamp(ordered[..., self.exact, None], ordered[..., -1 - self.exact, None])
        codes, scale, zero = quantize(blocks(vectors, self.group), self.bits, -1)
        return pack(codes.flatten(-2), self.bits), scale, zero, *kept

    def _dequantized(self, packed: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Vectors in float32, without what is exact."""
        import torch

        from kvsuite.kernels.quantize import blocks, dequantize, unpack

        return dequantize(blocks(unpack(packed, self.bits), self.group), scale, zero, torch.float32).flatten(-2)

    def _error(self, x: Tensor, stored: tuple[Tensor, ...]) -> Tensor:
        """x - Q(x), 0 where it is exact: float32 (…, block, head_dim)."""
        return x.float() - self._vectors(_with_exact(self._dequantized(*stored[:3]), *stored[3:]))


def _with_exact(vectors: Tensor, *exact: Tensor) -> Tensor:
    """vectors float32 (…, n) with what is kept exactly, numbers and places, put in."""
    return vectors.scatter(-1, exact[1].long(), exact[0].float()) if exact else vectors


def row_space(error: Tensor, rank: int) -> Tensor:
    """error (T, head_dim) to an orthonormal basis of its strongest directions, float64 (head_dim, rank), by power
    iteration as the authors' fake_poweriteration_group, and with a last QR. Directions that are not there are 0."""
    import torch

    error = error.double().nan_to_num(0, 0, 0)
    noise = torch.Generator().manual_seed(0)
    p = torch.rand(error.shape[1], rank, generator=noise, dtype=torch.float64).to(error.device)
    for i in range(ROUNDS):
        last = i == ROUNDS - 1
        q = error @ (torch.linalg.qr(p).Q if last else p)
        p = error.T @ (torch.linalg.qr(q).Q if last else q)
    basis = torch.linalg.qr(p).Q
    return torch.nn.functional.pad(basis, (0, rank - basis.shape[1]))
