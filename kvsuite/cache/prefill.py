"""Prefilling a context once, in full precision, for all methods of a run: K, V and what the methods asked to see."""

from __future__ import annotations

import enum
import importlib.util
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from kvsuite.cache.adapter import AttendingLayer
from kvsuite.kernels import mass
from kvsuite.kernels.attention import causal_self_attention


class Need(enum.Enum):
    """What a selector must see while the prompt is prefilled."""

    MASS = "attention mass per key, summed over all queries"


@dataclass(frozen=True)
class Observation:
    """One layer of a prefilled context: k, v (kv_heads, T, head_dim) as the model made them, and what was asked for."""

    layer: int
    k: Tensor
    v: Tensor
    mass: Tensor | None = None
    """float32 (kv_heads, T): attention mass per key."""


def column_mass(device: torch.device) -> Callable[..., Tensor]:
    """What counts attention mass there: a kernel on a GPU with triton, else PyTorch."""
    if device.type == "cuda" and importlib.util.find_spec("triton"):
        from kvsuite.kernels.fused import mass as fused

        return fused.column_mass
    return mass.column_mass


class _PrefillLayer(AttendingLayer):
    def __init__(self, index: int, needs: frozenset[Need]) -> None:
        super().__init__()
        self.index, self.needs = index, needs
        self.seen: Observation | None = None
        self.seconds = 0.0  # spent on observations alone
        self._kv: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.seen is not None or key_states.shape[0] != 1:
            raise ValueError("a context is prefilled once, as one sequence")
        self._kv = key_states[0], value_states[0]
        return self, value_states

    def attend(self, q: Tensor, scale: float, window: int | None, softcap: float | None, aux: Tensor | None) -> Tensor:
        assert self._kv is not None
        (k, v), self._kv = self._kv, None
        out = causal_self_attention(q[0], k, v, scale, window, softcap, aux)
        if out.is_cuda and self.needs:
            torch.cuda.synchronize()  # what was queued before is not the observation's
        start = time.perf_counter()
        counted = column_mass(q[0].device)(q[0], k, scale, window, softcap, aux) if Need.MASS in self.needs else None
        if counted is not None and counted.is_cuda:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - start
        self.seen = Observation(self.index, k, v, counted)
        return out[None]

    def get_seq_length(self) -> int:
        return 0 if self.seen is None else self.seen.k.shape[1]


class PrefillCache(Cache):
    """Collects one context's K, V and observations while the model runs over it once."""

    def __init__(self, layers: int, needs: Iterable[Need] = ()) -> None:
        asked = frozenset(needs)
        super().__init__(layers=[_PrefillLayer(i, asked) for i in range(layers)])

    @property
    def observations(self) -> list[Observation]:
        """Layer by layer, after the model has run."""
        return [layer.seen for layer in self.layers]

    @property
    def observing_seconds(self) -> float:
        """Time that went into observations, which only the methods that asked for them should pay."""
        return float(sum(layer.seconds for layer in self.layers))
