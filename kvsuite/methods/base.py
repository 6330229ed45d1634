"""What a method is made of: selector × budget × codec × reader. Each is a frozen dataclass of its hyperparameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from kvsuite.cache.decoding import PageReader
from kvsuite.errors import UsageError

if TYPE_CHECKING:  # nothing here needs torch: the names, parameters and sources of all methods are read without it
    from torch import Tensor

    from kvsuite.cache.decoding import Eviction
    from kvsuite.cache.layer import LayerCache
    from kvsuite.cache.observations import Observation
    from kvsuite.cache.prefill import PrefilledLayer
    from kvsuite.kernels.context import LayerContext
    from kvsuite.kernels.quantspec import QuantSpec
    from kvsuite.methods.artifact import Artifact

Kind = Literal["selector", "budget", "codec", "reader"]


@dataclass(frozen=True)
class Component:
    """One component of a method; its fields are what the grammar accepts after the colon."""

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
        fields = sorted(dataclasses.fields(self), key=lambda f: bool(f.kw_only))  # its own before those of all codecs
        values = {f.name: (getattr(self, f.name), f.default) for f in fields}
        given = [f"{name}={v}" for name, (v, default) in values.items() if v != default or name in self.always]
        return ":".join([self.name, ",".join(given)]) if given else self.name


@dataclass(frozen=True)
class Selector(Component):
    """Scores tokens; which stay is the budget's affair. One that also acts while decoding has an `eviction`."""

    kind: ClassVar[Kind] = "selector"
    one_set: ClassVar[bool] = False
    """Whether all heads of a layer keep the same tokens."""
    before_rope: ClassVar[bool] = False
    """Whether it looks at queries or keys as they were before RoPE."""

    @property
    def protects(self) -> tuple[int, str]:
        """How many tokens stay whatever their scores, and what they are called: a budget must be above it."""
        return 0, ""

    @property
    def observes(self) -> tuple[Observation, ...]:
        """What it must see of the prefill."""
        return ()

    @property
    def eviction(self) -> Eviction | None:
        """What it does while a sequence is decoded, if anything."""
        return None

    @property
    def artifact(self) -> Artifact | None:
        """What the user gave it that was learned of a model; its hash stands in every record."""
        return None

    def tokens(self, length: int) -> int:
        """The mean number of tokens per head that stay of a context of ``length``."""
        raise NotImplementedError

    def check_model(self, layers: Sequence[LayerContext]) -> None:
        """UsageError where it is not for a model with these layers."""

    def check_context(self, longest: int) -> None:
        """UsageError where a share of the longest context contradicts another hyperparameter."""

    def score(self, seen: PrefilledLayer, tokens: int) -> Tensor:
        """Float (kv_heads, T), higher stays; +inf is protected."""
        raise NotImplementedError


@dataclass(frozen=True)
class BudgetSelector(Selector):
    """One whose size is its ``budget`` alone: tokens per head, or, below 1, a share of the context."""

    budget: float = 0.2

    def check(self) -> None:
        """Raise UsageError where the hyperparameters contradict each other."""
        protected, called = self.protects
        check_share(self.name, "budget", self.budget)
        if 1 <= self.budget <= protected:
            raise UsageError(f"{self.name}: budget={self.budget:g} must be above {called}")

    def check_context(self, longest: int) -> None:
        """UsageError where a share of the longest context is no more than what is protected."""
        protected, called = self.protects
        if self.budget < 1 and round(self.budget * longest) <= protected:
            kept = f"{round(self.budget * longest)} of {longest} tokens"
            raise UsageError(f"{self.name}: budget={self.budget:g} is {kept} and must be above {called}")

    def tokens(self, length: int) -> int:
        """The budget in tokens, one more than what is protected at least."""
        return share(self.budget, length, least=self.protects[0] + 1)


@dataclass(frozen=True)
class Budget(Component):
    """Shares the tokens that may stay out over layers and heads."""

    kind: ClassVar[Kind] = "budget"
    ragged: ClassVar[bool] = False
    """Whether the heads of a layer keep unlike numbers of tokens."""

    def check_selector(self, selector: Selector) -> None:
        """Raise UsageError where it cannot share this selector's tokens out."""
        if self.ragged and selector.one_set:
            raise UsageError(f"{self.name}: all heads of {selector.name} keep the same tokens; leave {self.name} out")
        if not self.decides:
            return
        if not isinstance(selector, BudgetSelector):
            raise UsageError(f"{self.name}: {selector.name} has other sizes than a budget, which cannot be set aside")
        if selector.budget != type(selector).budget:
            raise UsageError(f"{self.name} says how many tokens stay; leave {selector.name}'s budget out")

    @property
    def decides(self) -> bool:
        """Whether it says how many tokens stay, and the selector does not."""
        return False

    def check_model(self, layers: Sequence[LayerContext]) -> None:
        """UsageError where it is not for a model with these layers."""

    def whole(self, layer: int, layers: int) -> bool:
        """Whether a layer of so many keeps everything, also while decoding."""
        return False

    def most(self, tokens: int, length: int) -> tuple[int, int]:
        """The most tokens that one head may keep of a context of ``length``, and the most that the heads of a layer may
        keep in the mean; ``tokens`` is the mean over all."""
        return tokens, tokens

    def allot(self, scores: Sequence[Tensor], tokens: int) -> Tensor:
        """All layers' scores, each (kv_heads, T), to how many of the highest each head keeps: int64 (layers, kv_heads)
        on the CPU; `kvsuite.cache.decoding.UNLIMITED` for all, also while decoding."""
        raise NotImplementedError


@dataclass(frozen=True)
class Codec(Component):
    """How what stays is stored."""

    kind: ClassVar[Kind] = "codec"

    skip_first: int = dataclasses.field(default=0, kw_only=True)
    """So many first layers are stored as `full` stores them; ``skip_last``: so many last ones."""
    skip_last: int = dataclasses.field(default=0, kw_only=True)

    def check(self) -> None:
        """Raise UsageError where the hyperparameters contradict each other."""
        if self.skip_first < 0 or self.skip_last < 0:
            raise UsageError(f"{self.name}: skip_first and skip_last must not be negative")

    def at(self, layer: int, layers: int) -> Codec:
        """What stores one layer of so many. Raises UsageError where none is left that this codec stores."""
        skipped = self.skip_first + self.skip_last
        if not skipped:
            return self
        if skipped >= layers:
            raise UsageError(f"{self.spelled()}: leaves none of {layers} layers to {self.name}")
        if self.skip_first <= layer < layers - self.skip_last:
            return self
        from kvsuite.methods.codecs.full import Full

        return Full()

    @property
    def observes(self) -> tuple[Observation, ...]:
        """What `QuantSpec.fit` must see of the prefill."""
        return ()

    def calibrate(self, context: Sequence[PrefilledLayer]) -> Artifact | None:
        """What it must learn of a model, from a text that the model has prefilled; None where it learns nothing."""
        return None

    def specs(self, layer: LayerContext, artifact: Artifact | None = None) -> tuple[QuantSpec, QuantSpec]:
        """What is stored of one layer's K and V; ``artifact`` is what `calibrate` gave. Raises UsageError where the
        layer's shape does not fit."""
        raise NotImplementedError


@dataclass(frozen=True)
class RotatingCodec(Codec):
    """One that can turn K and V before it encodes them."""

    rotate: Literal["none", "hadamard"] = "none"

    @property
    def rotation(self) -> str:
        """`QuantSpec.rotation`."""
        return "" if self.rotate == "none" else self.rotate


@dataclass(frozen=True)
class Reader(Component, PageReader):
    """Keeps what is stored and chooses for each query which pages are read; what it must do `PageReader` says."""

    kind: ClassVar[Kind] = "reader"

    def check_context(self, longest: int) -> None:
        """UsageError where it would read everything of the longest context."""

    def reads_all(self, layer: int) -> bool:
        """Whether a layer reads everything."""
        return False


@dataclass(frozen=True)
class Method:
    """selector × budget × codec × reader; without a selector everything stays, without a reader everything is read."""

    selector: Selector | None
    budget: Budget
    codec: Codec
    reader: Reader | None = None

    @property
    def name(self) -> str:
        """Canonical text, as in records and test ids: ``h2o:budget=256+kivi:bits=4``."""
        parts: list[Component] = [] if self.selector is None else [self.selector]
        if self.budget.spelled() != "uniform":
            parts.append(self.budget)
        if self.codec.spelled() != "full" or not (parts or self.reader):
            parts.append(self.codec)
        if self.reader is not None:
            parts.append(self.reader)
        return "+".join(part.spelled() for part in parts)

    @property
    def observes(self) -> tuple[Observation, ...]:
        """What it must see of the prefill."""
        found = [*self.codec.observes]
        if self.selector is not None:
            found += self.selector.observes
        if self.selector is not None and self.selector.eviction is not None:
            found += [x for x in self.selector.eviction.observes if x.prefilling]
        return tuple(dict.fromkeys(found))

    def tokens(self, length: int) -> int:
        """Tokens per head that stay of a context of ``length``, before the budget shares them out."""
        return length if self.selector is None else min(length, self.selector.tokens(length))

    def check_context(self, longest: int) -> None:
        """UsageError where the budget could never act: at or above the longest context there is."""
        if self.reader is not None:
            self.reader.check_context(longest)
        if self.selector is None or self.budget.decides:
            return
        self.selector.check_context(longest)
        if self.selector.tokens(longest) >= longest:
            kept = self.selector.tokens(longest)
            raise UsageError(
                f"{self.name}: a budget of {kept} tokens keeps everything of a context of {longest}; "
                "make it smaller or the prompts longer"
            )

    @property
    def artifact(self) -> Artifact | None:
        """What the user gave the selector that was learned of a model."""
        return None if self.selector is None else self.selector.artifact

    def check_model(self, layers: Sequence[LayerContext]) -> None:
        """UsageError where it is not for a model with these layers: so many, of these sizes."""
        for layer in layers:
            self.codec.at(layer.index, layer.layers)
        if self.selector is not None:
            self.selector.check_model(layers)
        self.budget.check_model(layers)

    def capacity(self, length: int, new: int) -> int:
        """Slots that one head of a sequence of ``length`` context tokens needs at most for ``new`` more."""
        return self.budget.most(self.tokens(length), length)[0] + new

    def pages(self, layer: LayerContext, length: int, new: int) -> int:
        """Pages that such a sequence needs at most in a layer, all heads."""
        from kvsuite.kernels.quantspec import PAGE

        most, mean = self.budget.most(self.tokens(length), length)
        each = -(-(most + new) // PAGE)
        if mean < most:  # heads are ragged: each rounds up to pages by itself, before and behind what is new
            each = min(each, -(-mean // PAGE) + -(-new // PAGE) + 1)
        return layer.kv_heads * each

    def check_layers(self, layers: Sequence[LayerContext]) -> None:
        """UsageError where it cannot act on layers such as a model's; their number, and other sizes, do not matter."""
        if type(self.codec).calibrate is Codec.calibrate:
            for layer in layers:
                self.codec.specs(layer)
        if self.selector is None:
            return
        eviction = self.selector.eviction
        moves = eviction is not None and eviction.rerotated_sinks
        for layer in layers:
            if layer.window is not None:
                # a window drops tokens by itself: a budget would be spent on tokens nobody can read
                raise UsageError(
                    f"{self.name}: layer {layer.index} has a sliding window, where no selector can act yet"
                )
            if self.selector.before_rope and layer.rope is None:
                raise UsageError(f"{self.name}: cannot undo the rotation of layer {layer.index}'s queries and keys")
            if moves and layer.rope is None:
                raise UsageError(f"{self.name}: cannot re-rotate this model's keys; use positions=absolute")
        if moves and self.reader is not None:
            raise UsageError(f"{self.name}: a reader does not see keys that move; use positions=absolute")
        if len({layer.kv_heads for layer in layers}) > 1:
            raise UsageError(
                f"{self.name}: this model's layers differ in their kv heads, where no selector can act yet"
            )

    def cache(
        self,
        layer: LayerContext,
        rows: int,
        slots: int,
        pages: int | None = None,
        *,
        backend: str = "auto",
        artifact: Artifact | None = None,
    ) -> LayerCache:
        """This method's cache of one layer; the sizes are those of `LayerCache`."""
        from kvsuite.cache.layer import LayerCache

        self.check_layers([layer])
        reader = None if self.reader is None or self.reader.reads_all(layer.index) else self.reader
        eviction = None if self.selector is None else self.selector.eviction
        codec = self.codec.at(layer.index, layer.layers)
        return LayerCache(
            layer, codec.specs(layer, artifact), rows, slots, pages=pages, backend=backend,
            eviction=eviction, reader=reader, selects=self.selector is not None,
        )  # fmt: skip

    def compress(self, row: int, context: Sequence[PrefilledLayer], caches: Sequence[LayerCache]) -> None:
        """Put a prefilled context into row ``row`` of every layer's cache."""
        from kvsuite.cache.layer import highest

        length, heads = context[0].k.shape[1], context[0].k.shape[0]
        tokens, scores, counts = self.tokens(length), None, None
        if self.selector is not None:
            counts = [[self.selector.tokens(length)] * heads] * len(context)
            if tokens < length or self.budget.decides:
                if length <= self.selector.protects[0]:  # all stay, and may be too few to be scored
                    scores = [seen.k.new_full(seen.k.shape[:2], float("inf")) for seen in context]
                else:
                    scores = [self.selector.score(seen, tokens) for seen in context]
                counts = self.budget.allot(scores, tokens).tolist()
        for i, (seen, cache) in enumerate(zip(context, caches, strict=True)):
            whole = counts is None or self.budget.whole(i, len(context))
            budget = None if counts is None or whole else counts[i]
            keep = None
            if scores is not None and budget is not None:
                keep = highest(scores[i], [min(count, length) for count in budget])
            cache.load(row, seen, keep, budget)


def share(value: float, length: int, least: int = 1) -> int:
    """A budget parameter as tokens: a whole number is tokens, a fraction below 1 a share of the context."""
    return max(least, round(value * length)) if 0 < value < 1 else int(value)


def check_above_zero(owner: str, **values: float) -> None:
    """UsageError unless all are finite and above 0."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise UsageError(f"{owner}: {name}={value:g} must be above 0")


def check_share(owner: str, name: str, value: float, least: int = 1) -> None:
    """UsageError unless ``value`` is a fraction in (0, 1) or a whole number of at least ``least`` tokens."""
    if not (0 < value < 1 or (value >= least and value == int(value))):
        raise UsageError(
            f"{owner}: {name}={value:g} must be at least {least} tokens or a fraction of the context between 0 and 1"
        )
