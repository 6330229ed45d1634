"""How a cache plugs into transformers: no patching, only its own registries.

A layer's `update` returns *itself*, transformers hands it to the attention function as the keys, and that calls its
`attend`. Read ``transformers/cache_utils.py`` (Cache, CacheLayerMixin) and ``modeling_utils.py`` (AttentionInterface).
"""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from kvsuite import configs
from kvsuite.cache.attending import AttendingLayer
from kvsuite.cache.checker import AttentionChecker
from kvsuite.cache.layer import LayerCache
from kvsuite.cache.rope import find_rope, rotations
from kvsuite.cache.watched import AttentionLayer, WatchedCache
from kvsuite.errors import UsageError, first_line
from kvsuite.kernels.context import LayerContext
from kvsuite.kernels.reference.attention import causal_mask

NAME = "kvsuite"
"""The ``attn_implementation`` under which a model reads our caches."""


@dataclass
class Member:
    """One method's part in a batch that several methods share. The batch's items belong to the members in their order;
    items beyond the last member's are idle."""

    caches: Sequence[LayerCache]
    """One per layer."""
    rows: tuple[int | None, ...] = (0,)
    """The row of its caches that each of its items belongs to; None for an idle item."""
    checker: AttentionChecker | None = None
    """Watches every layer, where there is one."""
    isolated: bool = False
    """Whether an error of its own is kept in ``error`` rather than raised, since others go on."""
    error: Exception | None = None
    seconds: float = 0.0
    """Wall time spent in appending and attending, added up."""


class _Layer(AttendingLayer):
    def __init__(self, index: int, members: Sequence[Member]) -> None:
        super().__init__()
        self.index, self.members = index, members
        self._staged: tuple[Tensor, Tensor] | None = None
        self.wants_hidden = any(member.caches[index].wants_hidden for member in members)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._staged = key_states, value_states
        return self, value_states

    def attend(self, q: Tensor, scale: float, window: int | None, softcap: float | None, aux: Tensor | None) -> Tensor:
        assert self._staged is not None
        (k, v), self._staged = self._staged, None
        fed = (k, v, q) if self.hidden is None else (k, v, q, self.hidden)
        sizes = [len(member.rows) for member in self.members]
        if sizes == [len(q)]:
            return self._member(self.members[0], fed, scale, window, softcap, aux)
        sizes.append(len(q) - sum(sizes))
        *parts, idle = zip(*(x.split_with_sizes(sizes) for x in fed), strict=True)
        out = [
            self._member(member, own, scale, window, softcap, aux)
            for member, own in zip(self.members, parts, strict=True)
            if member.rows
        ]
        return torch.cat([*out, torch.zeros_like(idle[2])])

    def _member(self, member: Member, fed: tuple[Tensor, ...], *how: Any) -> Tensor:
        """One member's items: k, v (items, kv_heads, Q, head_dim), q (items, heads, Q, head_dim) and, where somebody
        wants them, hidden states (items, Q, hidden size) -> q's shape."""
        q = fed[2]
        if member.error is not None:
            return torch.zeros_like(q)
        start = time.perf_counter()
        tokens = [fed]
        if member.caches[self.index].stepwise and q.shape[2] > 1:  # it sees token by token what it would see decoding
            tokens = list(zip(*(x.split_with_sizes([1] * q.shape[2], -2) for x in fed), strict=True))
        try:
            out = [self._one(member, own, *how) for own in tokens]
        except Exception as error:
            if not member.isolated:
                raise
            member.error, out = error, [torch.zeros_like(q)]
        member.seconds += time.perf_counter() - start
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def _one(
        self,
        member: Member,
        fed: tuple[Tensor, ...],
        scale: float,
        window: int | None,
        softcap: float | None,
        aux: Tensor | None,
    ) -> Tensor:
        cache, rows, checker = member.caches[self.index], member.rows, member.checker
        k, v, q, *hidden = fed
        cache.append(k, v, rows, *hidden)
        if checker is not None:
            checker.before(cache)
        out = cache.attend(q, scale, rows, window=window, softcap=softcap, sink_logits=aux)
        if checker is not None:
            checker.after(cache, rows, q, out, scale, window, softcap, aux)
        return out

    def get_seq_length(self) -> int:
        held = [(member.caches[self.index], row) for member in self.members for row in member.rows if row is not None]
        return max((cache.seen(row) for cache, row in held), default=0)


class KVCache(Cache):
    """The layer caches of one method or several as one transformers cache. Give the model explicit ``position_ids``:
    rows differ in length."""

    def __init__(self, *members: Member) -> None:
        self.members = members
        super().__init__(layers=[_Layer(index, members) for index in range(len(members[0].caches))])


@dataclass(frozen=True)
class Causal:
    """What stands for a mask that is never built: a query reads the keys up to its own, at most ``window`` of them."""

    window: int | None


MEANINGLESS = frozenset(
    ("cache_position", "deterministic", "logits_to_keep", "output_attentions", "output_hidden_states",
     "output_router_logits", "position_ids", "return_dict", "use_cache")
)  # fmt: skip
"""What models hand down to attention that changes nothing there."""


def attention_forward(
    module: Any,
    query: Tensor,
    key: Any,
    value: Tensor,
    attention_mask: Causal | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers. Whatever asks for more than it understands is refused.

    The window is the mask's, as in transformers' own eager and SDPA attention, which read no ``sliding_window``.
    """
    if not isinstance(key, AttendingLayer):
        raise ValueError(f"attn_implementation={NAME!r} needs a cache of kvsuite")
    if not isinstance(attention_mask, Causal) or dropout:
        raise ValueError("kvsuite understands neither ready-made masks nor dropout")
    if sliding_window is not None and sliding_window != attention_mask.window:
        raise ValueError(f"attention is told a window of {sliding_window}, its mask one of {attention_mask.window}")
    _refuse_more("attention", kwargs, MEANINGLESS)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    key.module = module
    out = key.attend(query, scale, attention_mask.window, softcap, s_aux)
    return out.transpose(1, 2).contiguous(), None


def mask_forward(
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Causal:
    """The mask function registered with transformers: none is built, positions say what may be read. Any other mask
    than a causal one with a window is refused: three of a prompt's queries are asked what they may read."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("kvsuite does not take padding: give each sequence a row of its own instead of a padded batch")
    if use_vmap:
        raise ValueError("kvsuite does not understand this model's own attention mask")
    _refuse_more("the mask", kwargs, {"allow_is_bidirectional_skip", "allow_is_causal_skip", "allow_torch_fix",
                                      "batch_size", "config", "dtype"})  # fmt: skip
    if q_length > 1 or not q_offset:
        queries = torch.tensor([0, q_length // 2, q_length - 1], device=device) + q_offset
        keys, zero = torch.arange(kv_length, device=device) + kv_offset, torch.zeros(1, 1, 1, 1, device=device).long()
        allowed = mask_function(zero, zero, queries[None, None, :, None], keys[None, None, None])
        if not bool((allowed == causal_mask(queries, keys, local_size)).all()):
            raise ValueError("kvsuite understands causal masks with a sliding window, not this model's")
    return Causal(local_size)


def _refuse_more(who: str, told: Mapping[str, Any], known: Collection[str]) -> None:
    for name in sorted({*told} - {*known}):
        if told[name] is not None and not (name == "is_causal" and told[name] is True):
            raise ValueError(f"{who} is told {name!r}, which kvsuite does not understand")


def forward(model: Any, cache: Any, input_ids: Tensor, **inputs: Any) -> Tensor:
    """One pass of a model over a cache, under whichever name its version of transformers takes it.

    Args: input_ids (batch, n); inputs: further arguments of the model, such as position_ids (batch, n).
    Returns: the logits after the last token, (batch, vocabulary).
    """
    name, hooks = cache_argument(type(model).forward), _catch_hidden(model, cache.layers)
    try:
        out = model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **{name: cache}, **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    logits: Tensor = out.logits[:, -1]
    return logits


def _catch_hidden(model: Any, layers: Sequence[Any]) -> list[Any]:
    """Hooks on the attention modules that tell the layers which want it what their attention is given; transformers'
    own layers want nothing."""
    wanting = [isinstance(layer, AttendingLayer) and layer.wants_hidden for layer in layers]
    if not any(wanting):
        return []

    def catch(layer: AttendingLayer) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return hook

    pairs = zip(attention_modules(model), layers, wanting, strict=True)
    return [module.register_forward_pre_hook(catch(x), with_kwargs=True) for module, x, wants in pairs if wants]


@functools.cache  # a signature takes longer to read than a small layer to run
def cache_argument(forward: Callable[..., Any]) -> str:
    """The name of the cache argument of a model's forward: ``cache`` since transformers 5.23, before that
    ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def install(model: Any) -> None:
    """Let one model read our caches. Raises UsageError where its configuration is refused."""
    configs.refuse(model.config.to_dict())
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask_forward)
    model.set_attn_implementation(NAME)


FIRST, STEP = 3, 500
"""At which position a token is put, and how far it is moved where the model's context is long enough."""


@torch.inference_mode()
def attention_layers(model: Any) -> list[AttentionLayer]:
    """What the layers of an installed model do with one token at two positions. Raises UsageError where they do not
    attend as Llama's."""
    config, cache = model.config.get_text_config(), WatchedCache()
    kind = f"model type {getattr(config, 'model_type', '?')!r}"
    ids = torch.full((2, 1), config.vocab_size // 2, device=model.device)
    where = torch.tensor([[FIRST], [FIRST + _step(config)]], device=model.device)
    try:
        forward(model, cache, ids, position_ids=where)
    except Exception as error:  # whatever a model does with what it does not expect
        own = f"{WatchedCache.layer.__name__!r} object", f"{Causal.__name__!r} object"  # taken for tensors
        if any(name in str(error) for name in own):
            raise UsageError(
                f"{kind} computes its attention itself, not by transformers' attention interface"
            ) from error
        raise UsageError(f"{kind} cannot be run on kvsuite's cache: {first_line(error)}") from error
    layers = [layer for layer in cache.seen if layer is not None]
    if not layers or len(layers) < len(cache.seen):
        raise UsageError(f"{kind} has layers that do not hand their keys and values to a cache")
    _MODULES[model] = [layer.module for layer in layers]
    return layers


_MODULES: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()
"""Models that were seen, and their attention modules: a pass must not begin by looking for them."""


def attention_modules(model: Any) -> list[Any]:
    """An installed model's attention modules, in the order of its layers."""
    if model not in _MODULES:
        attention_layers(model)
    return _MODULES[model]


def contexts(model: Any, kv_dtype: torch.dtype | None = None) -> list[LayerContext]:
    """A `LayerContext` for every layer of an installed model, in order, as the layers were seen to attend.
    ``kv_dtype``: what uncompressed K and V are stored in; what they are computed in unless given. Raises UsageError
    where they do not attend as Llama's."""
    config, ropes = model.config.get_text_config(), list(rotations(model))
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    seen = attention_layers(model)
    return [
        LayerContext(
            index=index,
            heads=layer.heads,
            kv_heads=layer.k.shape[1],
            head_dim=layer.k.shape[2],
            dtype=layer.k.dtype,
            kv_dtype=kv_dtype or layer.k.dtype,
            device=layer.k.device,
            rope=find_rope(ropes, layer.k[0], layer.k[1], _step(config)),
            window=layer.window if layer.window is not None and layer.window < longest else None,
            layers=len(seen),
            hidden_size=getattr(config, "hidden_size", 0),
        )
        for index, layer in enumerate(seen)
    ]


def _step(config: Any) -> int:
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    return int(min(STEP, longest - FIRST - 1))
