"""How the next token is drawn: greedy, or sampled with noise that two arms of a comparison share."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy. ``seed`` and ``repeat`` choose the noise."""

    temperature: float = 0.0
    seed: int = 0
    repeat: int = 0

    def pick(self, logits: Tensor, sample: str, position: int) -> int:
        """The next token of ``sample`` at ``position`` of its answer, from logits (vocabulary,); temperature > 0.

        argmax(logits / T + Gumbel), with the noise of a token keyed by (seed, sample, repeat, position, token id): at
        the same prefix two methods draw the same noise, whatever the batch (common random numbers).
        """
        noise = gumbel((self.seed, sample, self.repeat, position), logits.shape[-1])
        return int((logits.double().cpu() / self.temperature + torch.from_numpy(noise)).argmax())


GREEDY = Sampling()


@functools.lru_cache(maxsize=64)  # methods that are decoded together draw the same noise, a few steps apart
def gumbel(key: tuple[object, ...], size: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """``size`` standard Gumbel draws out of a Philox stream of its own per key; draw i belongs to token id i."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    uniform = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little"))).random(size)
    return -np.log(-np.log(np.maximum(uniform, np.finfo(float).tiny)))
