"""Expected attention: what the queries to come will probably attend to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvsuite.cache.observations import Observation, PreRopeMoments
from kvsuite.errors import UsageError
from kvsuite.methods.base import BudgetSelector

if TYPE_CHECKING:
    from torch import Tensor

    from kvsuite.cache.prefill import PrefilledLayer


@dataclass(frozen=True)
class ExpectedAttention(BudgetSelector):
    """Keeps the tokens that future queries are expected to attend to, times the size of their values. μ and Σ are mean
    and covariance of the prompt's queries before RoPE, without the first ``sinks``; μ̄ and Σ̄ are these under the mean
    rotation of the next ``future`` positions. With queries distributed normally, E exp(q·k) is exp of
    z = s μ̄·k + s² kᵀΣ̄k / 2, s the model's scale (1/√d). score = (mean over the query group of softmax(z) over all keys
    but the sinks + ``epsilon``) ‖v‖₂. The first ``sinks`` tokens stay. Acts on the prompt alone; while decoding all new
    tokens stay. The authors' defaults."""

    name = "expected-attention"
    stores = "sinks and the tokens that future queries are expected to attend to, per kv head"
    source = "Devoto et al. 2025, arXiv 2510.00636; kvpress expected_attention_press.py"
    before_rope = True

    future: int = 512
    sinks: int = 4
    epsilon: float = 0.0

    def check(self) -> None:
        if self.future < 1 or self.sinks < 0 or self.epsilon < 0:
            raise UsageError(f"{self.name}: future must be at least 1, sinks and epsilon not negative")
        super().check()

    @property
    def protects(self) -> tuple[int, str]:
        return self.sinks, f"its {self.sinks} sinks"

    @property
    def observes(self) -> tuple[Observation, ...]:
        return (PreRopeMoments(self.sinks),)

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        from torch.nn.functional import pad

        assert seen.rope is not None, "moments are observed only where RoPE is known"
        kv_heads, length = seen.k.shape[:2]
        scale, scaling = seen.params.scale, seen.rope.scaling
        mean, covariance = seen[PreRopeMoments(self.sinks)]
        mean = seen.rope.average(mean, length, self.future) * scaling
        half = seen.rope.average(covariance, length, self.future).transpose(1, 2)
        covariance = seen.rope.average(half, length, self.future) * scaling**2  # RΣRᵀ
        k, v = seen.k[:, self.sinks :].float(), seen.v[:, self.sinks :].float()
        keys = k.repeat_interleave(len(mean) // kv_heads, 0)  # (heads, n, head_dim)
        logits = (keys @ mean[:, :, None])[..., 0] * scale
        logits += ((keys @ covariance) * keys).sum(-1) * (scale**2 / 2)
        scores = logits.softmax(-1).view(kv_heads, -1, keys.shape[1]).mean(1)
        return pad((scores + self.epsilon) * v.norm(dim=-1), (self.sinks, 0), value=float("inf"))
