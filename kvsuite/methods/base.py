"""What a method is made of: selector × budget × codec. A part is a frozen dataclass of its hyperparameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvsuite.errors import UsageError

if TYPE_CHECKING:  # nothing here needs torch: the names, parameters and sources of all methods are read without it
    from torch import Tensor

    from kvsuite.cache.context import Evictor, LayerContext, SideCodec
    from kvsuite.cache.layer import Kept, LayerCache
    from kvsuite.cache.prefill import Need, Observation

Kind = Literal["selector", "budget", "codec"]


@dataclass(frozen=True)
class Part:
    """One part of a method; its fields are what the grammar accepts after the colon."""

    kind: ClassVar[Kind]
    name: ClassVar[str]
    stores: ClassVar[str]
    source: ClassVar[str]
    always: ClassVar[tuple[str, ...]] = ()
    """Parameters that are spelled out even at their defaults."""

    def check(self) -> None:
        """Raise UsageError where the hyperparameters contradict each other."""

    def spelled(self) -> str:
        """Canonical text: the name and what differs from the defaults."""
        values = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        given = [f"{name}={v}" for name, (v, default) in values.items() if v != default or name in self.always]
        return ":".join([self.name, ",".join(given)]) if given else self.name


@dataclass(frozen=True)
class Selector(Part):
    """Scores tokens; which stay is the budget's affair. One that also acts while decoding offers an `evictor`."""

    kind: ClassVar[Kind] = "selector"

    @property
    def needs(self) -> frozenset[Need]:
        """What it must see of the prefill."""
        return frozenset()

    def tokens(self, length: int) -> int:
        """The mean number of tokens per head that stay of a context of ``length``."""
        raise NotImplementedError

    def check_context(self, longest: int) -> None:
        """UsageError where a share of the longest context contradicts another hyperparameter."""

    def score(self, seen: Observation, tokens: int) -> Tensor:
        """float32 (kv_heads, T), higher stays; +inf is protected."""
        raise NotImplementedError

    def evictor(self, length: int) -> Evictor | None:
        """What acts after every decoding step on a sequence with a context of ``length``, if anything does."""
        return None


@dataclass(frozen=True)
class Budget(Part):
    """Shares the tokens that may stay out over layers and heads."""

    kind: ClassVar[Kind] = "budget"

    def allot(self, scores: Sequence[Tensor], tokens: int) -> list[Kept]:
        """All layers' scores, each (kv_heads, T), to the tokens each keeps, ascending; ``tokens`` is the mean."""
        raise NotImplementedError


@dataclass(frozen=True)
class Codec(Part):
    """How what stays is stored."""

    kind: ClassVar[Kind] = "codec"

    def sides(self, layer: LayerContext) -> tuple[SideCodec, SideCodec]:
        """K's and V's storage for one layer. Raises UsageError where the layer's shape does not fit."""
        raise NotImplementedError


@dataclass(frozen=True)
class Method:
    """selector × budget × codec; without a selector everything stays."""

    selector: Selector | None
    budget: Budget
    codec: Codec

    @property
    def name(self) -> str:
        """Canonical text, as in records and test ids: ``h2o:budget=256+kivi:bits=4``."""
        parts: list[Part] = [] if self.selector is None else [self.selector]
        if self.budget.spelled() != "uniform":
            parts.append(self.budget)
        if self.codec.spelled() != "full" or not parts:
            parts.append(self.codec)
        return "+".join(part.spelled() for part in parts)

    @property
    def needs(self) -> frozenset[Need]:
        """What it must see of the prefill."""
        return frozenset() if self.selector is None else self.selector.needs

    def tokens(self, length: int) -> int:
        """Tokens per head that stay of a context of ``length``, before the budget shares them out."""
        return length if self.selector is None else min(length, self.selector.tokens(length))

    def check_context(self, longest: int) -> None:
        """UsageError where the budget could never act: at or above the longest context there is."""
        if self.selector is None:
            return
        self.selector.check_context(longest)
        if self.selector.tokens(longest) >= longest:
            kept = self.selector.tokens(longest)
            raise UsageError(
                f"{self.name}: a budget of {kept} tokens keeps everything of a context of {longest}; "
                "make it smaller or the prompts longer"
            )

    def capacity(self, length: int, new: int) -> int:
        """Slots a sequence of ``length`` context tokens needs per head for ``new`` more."""
        return self.tokens(length) + new

    def cache(self, layer: LayerContext, rows: int, capacity: int) -> LayerCache:
        """This method's cache of one layer."""
        from kvsuite.cache.fused import FusedCache, refusal
        from kvsuite.cache.layer import LayerCache

        evictor = None if self.selector is None else self.selector.evictor(capacity)
        if self.selector is not None and layer.window is not None:
            # a window drops tokens by itself: a budget would be spent on tokens nobody can read
            raise UsageError(f"{self.name}: layer {layer.index} has a sliding window, where no selector can act yet")
        if evictor is not None and evictor.shift and layer.rope is None:
            raise UsageError(f"{self.name}: cannot re-rotate this model's keys; use positions=absolute")
        sides, kind = self.codec.sides(layer), LayerCache
        if layer.device.type == "cuda" and not refusal(layer, sides, evictor):
            kind = FusedCache
        return kind(layer, sides, rows, capacity, evictor, selects=self.selector is not None)

    def compress(self, row: int, context: Sequence[Observation], caches: Sequence[LayerCache]) -> None:
        """Put a prefilled context into row ``row`` of every layer's cache."""
        length = context[0].k.shape[1]
        tokens = self.tokens(length)
        kept: Sequence[Kept | None] = [None] * len(context)
        evictor = None if self.selector is None else self.selector.evictor(length)
        if self.selector is not None and tokens < length:
            kept = self.budget.allot([self.selector.score(seen, tokens) for seen in context], tokens)
        for seen, cache, keep in zip(context, caches, kept, strict=True):
            cache.load(row, seen.k, seen.v, keep, seen.mass, evictor)


def share(value: float, length: int, least: int = 1) -> int:
    """A budget parameter as tokens: a whole number is tokens, a fraction below 1 a share of the context."""
    return max(least, round(value * length)) if 0 < value < 1 else int(value)


def check_share(owner: str, name: str, value: float, least: int = 1) -> None:
    """UsageError unless ``value`` is a fraction in (0, 1) or a whole number of at least ``least`` tokens."""
    if not (0 < value < 1 or (value >= least and value == int(value))):
        raise UsageError(
            f"{owner}: {name}={value:g} must be at least {least} tokens or a fraction of the context between 0 and 1"
        )
