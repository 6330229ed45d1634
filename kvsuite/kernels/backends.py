"""Who computes on a cache: the registry of backends, and why one was not taken."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from typing import Protocol, cast

from torch import Tensor

from kvsuite.errors import UsageError
from kvsuite.kernels import AUTO, BACKENDS
from kvsuite.kernels.context import AttentionParams, HeadView, LayerContext, Needs
from kvsuite.kernels.paged import PagedKV
from kvsuite.kernels.quantspec import QuantSpec
from kvsuite.kernels.reference.attend import PageIndices
from kvsuite.kernels.reference.store import KeepIndices
from kvsuite.modes import MODES

Items = Sequence[int | None]
"""The row of a cache that each item of a batch belongs to; None for an idle item."""


class Backend(Protocol):
    """The operations on a `PagedKV`: a package of `kvsuite.kernels` with these functions. What they do is said by
    those of `kvsuite.kernels.reference`, which take the same arguments. One may have `evict_lowest`, too, as
    `kvsuite.kernels.cpu` does; with others `LayerCache` takes scores and `evict`."""

    NAME: str
    ARENA: bool
    """Whether a (row, head) needs consecutive pages."""

    @staticmethod
    def supports(layer: LayerContext, k: QuantSpec, v: QuantSpec, needs: Needs) -> str:
        """Why it cannot do this layer, in a few words that reports print; empty if it can."""

    @staticmethod
    def fill(
        kv: PagedKV,
        row: int,
        k: Tensor,
        v: Tensor,
        keep: KeepIndices | None = None,
        accumulated: Tensor | None = None,
    ) -> None:
        """Put a prefilled prompt, or what is kept of it, into an empty row."""

    @staticmethod
    def advance(kv: PagedKV, rows: Items, n: int = 1) -> None:
        """Count tokens and allocate their pages before they are written."""

    @staticmethod
    def append(kv: PagedKV, k: Tensor, v: Tensor, rows: Items) -> None:
        """Write the tokens that `advance` counted."""

    @staticmethod
    def attend(
        kv: PagedKV, q: Tensor, rows: Items, params: AttentionParams, pages: PageIndices | None = None
    ) -> Tensor:
        """Attention of the newest tokens of every row over what it holds."""

    @staticmethod
    def evict(kv: PagedKV, rows: Items, slots: Tensor) -> None:
        """Empty one slot of every (row, kv head) that holds more tokens than its budget."""

    @staticmethod
    def compact(kv: PagedKV, row: int, keep: KeepIndices) -> None:
        """Leave only some slots of a row."""

    @staticmethod
    def release_empty(kv: PagedKV, rows: Sequence[int]) -> None:
        """Give back the pages that hold no token any more."""

    @staticmethod
    def read(kv: PagedKV, row: int) -> list[HeadView]:
        """What each kv head of a row holds, as attention sees it."""

    @staticmethod
    def column_mass(
        q: Tensor,
        k: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        last: int | None = None,
    ) -> Tensor:
        """The attention that each of a prompt's keys gets from its queries."""


def find(name: str) -> Backend:
    """The backend of that name. Raises ImportError where it needs a package that is not installed."""
    if name in MODES:
        return cast(Backend, importlib.import_module("kvsuite.kernels.dense").backend(name))
    return cast(Backend, importlib.import_module(f"kvsuite.kernels.{name}"))


def choose(layer: LayerContext, k: QuantSpec, v: QuantSpec, needs: Needs, wanted: str = "auto") -> tuple[Backend, str]:
    """The backend of a layer, and why those before it were not taken. Raises UsageError for an unknown name."""
    if wanted not in ("auto", *BACKENDS, *MODES):
        raise UsageError(f"no backend {wanted!r}; there are auto, {', '.join(BACKENDS)}")
    refused = []
    tried = AUTO.get(layer.device.type, ()) if wanted == "auto" else (wanted,)
    for name in dict.fromkeys((*tried, "reference")):
        try:
            backend = find(name)
        except ImportError as error:
            refused.append(f"{name}: {error.name} is not installed")
            continue
        reason = backend.supports(layer, k, v, needs)
        if not reason:
            return backend, "; ".join(refused)
        refused.append(f"{name}: {reason}")
    raise AssertionError("the reference supports everything")


def for_prefill(device: str, wanted: str = "auto") -> Backend:
    """Who observes a prompt's attention on a device: the first of `AUTO` that is installed, or who is wanted."""
    tried = AUTO.get(device, ())
    for name in tried if wanted == "auto" else [name for name in tried if name == wanted]:
        with contextlib.suppress(ImportError):
            return find(name)
    return find("reference")
