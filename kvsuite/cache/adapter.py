"""How a cache plugs into transformers: no patching, only its own registries.

A layer's `update` returns *itself*, transformers hands it to the attention function as the keys, and that calls its
`attend`. Read ``transformers/cache_utils.py`` (Cache, CacheLayerMixin) and ``modeling_utils.py`` (AttentionInterface).
"""

from __future__ import annotations

import functools
import inspect
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from kvsuite.cache.attending import AttendingLayer
from kvsuite.cache.checker import AttentionChecker
from kvsuite.cache.layer import LayerCache
from kvsuite.cache.rope import find_rope
from kvsuite.errors import UsageError
from kvsuite.kernels.context import LayerContext

NAME = "kvsuite"
"""The ``attn_implementation`` under which a model reads our caches."""

KNOWN_LAYERS = {"full_attention", "sliding_attention"}


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
        hidden = k.new_zeros(len(q), q.shape[2], 0) if self.hidden is None else self.hidden
        sizes = [len(member.rows) for member in self.members]
        if sizes == [len(q)]:
            return self._member(self.members[0], k, v, q, hidden, scale, window, softcap, aux)
        sizes.append(len(q) - sum(sizes))
        *parts, idle = zip(*(x.split_with_sizes(sizes) for x in (k, v, q, hidden)), strict=True)
        out = [
            self._member(member, *own, scale, window, softcap, aux)
            for member, own in zip(self.members, parts, strict=True)
            if member.rows
        ]
        return torch.cat([*out, torch.zeros_like(idle[2])])

    def _member(self, member: Member, k: Tensor, v: Tensor, q: Tensor, hidden: Tensor, *how: Any) -> Tensor:
        """One member's items: k, v (items, kv_heads, Q, head_dim), q (items, heads, Q, head_dim) and hidden (items, Q,
        hidden size, or 0 where nobody wants it) -> q's shape."""
        if member.error is not None:
            return torch.zeros_like(q)
        start = time.perf_counter()
        tokens = [(k, v, q, hidden)]
        if member.caches[self.index].stepwise and q.shape[2] > 1:  # it sees token by token what it would see decoding
            parts = [x.split_with_sizes([1] * q.shape[2], -2) for x in (k, v, q, hidden)]
            tokens = list(zip(*parts, strict=True))
        try:
            out = [self._one(member, *own, *how) for own in tokens]
        except Exception as error:
            if not member.isolated:
                raise
            member.error, out = error, [torch.zeros_like(q)]
        member.seconds += time.perf_counter() - start
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

    def _one(
        self,
        member: Member,
        k: Tensor,
        v: Tensor,
        q: Tensor,
        hidden: Tensor,
        scale: float,
        window: int | None,
        softcap: float | None,
        aux: Tensor | None,
    ) -> Tensor:
        cache, rows, checker = member.caches[self.index], member.rows, member.checker
        cache.append(k, v, rows, hidden)
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


def attention_forward(
    module: Any,
    query: Tensor,
    key: Any,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function registered with transformers. Whatever asks for more than it understands is refused."""
    if not isinstance(key, AttendingLayer):
        raise ValueError(f"attn_implementation={NAME!r} needs a cache of kvsuite")
    if attention_mask is not None or dropout or kwargs.get("position_bias") is not None:
        raise ValueError("kvsuite understands neither ready-made masks nor position biases nor dropout")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = key.attend(query, scale, sliding_window, softcap, s_aux)
    return out.transpose(1, 2), None


def mask_forward(*args: Any, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any) -> None:
    """The mask function registered with transformers: none is built, positions say what may be read. A mask that would
    be dropped without a word is refused."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("kvsuite does not take padding: give each sequence a row of its own instead of a padded batch")
    if use_vmap:
        raise ValueError("kvsuite does not understand this model's own attention mask")


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


def _catch_hidden(model: Any, layers: Sequence[AttendingLayer]) -> list[Any]:
    """Hooks on the attention modules that tell the layers which want it what their attention is given."""
    if not any(layer.wants_hidden for layer in layers):
        return []

    def catch(layer: AttendingLayer) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layer.hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

        return hook

    pairs = zip(attention_modules(model), layers, strict=True)
    return [module.register_forward_pre_hook(catch(x), with_kwargs=True) for module, x in pairs if x.wants_hidden]


@functools.cache  # a signature takes longer to read than a small layer to run
def cache_argument(forward: Callable[..., Any]) -> str:
    """The name of the cache argument of a model's forward: ``cache`` since transformers 5.23, before that
    ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def install(model: Any) -> None:
    """Let one model read our caches. Raises UsageError where its attention is not understood."""
    refuse_unknown(model.config)
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask_forward)
    model.set_attn_implementation(NAME)


def refuse_unknown(config: Any) -> None:
    """One sentence for a model whose cache would be misread."""
    config = config.get_text_config()
    kind = getattr(config, "model_type", "?")
    if getattr(config, "is_encoder_decoder", False):
        raise UsageError(f"model type {kind!r} is an encoder-decoder; kvsuite compresses decoder-only models")
    if getattr(config, "kv_lora_rank", None):
        raise UsageError(f"model type {kind!r} caches latent vectors (latent attention), not K and V per head")
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS)
    if strange:
        raise UsageError(f"model type {kind!r} has layers kvsuite does not understand: {', '.join(strange)}")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {p.get("rope_type") for p in (rope, *rope.values()) if isinstance(p, dict)}
    for moving in sorted({"dynamic", "longrope"} & kinds):
        # its frequencies follow the longest sequence of the batch, so a row would depend on its mates
        raise UsageError(f"model type {kind!r} uses {moving!r} RoPE, whose keys change with the length of the batch")


def attention_modules(model: Any) -> list[Any]:
    """A model's attention modules, in the order of its layers."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "layer_idx") and (hasattr(module, "k_proj") or hasattr(module, "qkv_proj"))
    ]


def contexts(model: Any, kv_dtype: torch.dtype | None = None) -> list[LayerContext]:
    """A `LayerContext` for every attention layer of a model, in order. ``kv_dtype``: what uncompressed K and V are
    stored in; the model's own dtype unless given."""
    found = attention_modules(model)
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    if len(found) != len(types):
        kind = getattr(config, "model_type", "?")
        raise UsageError(f"model type {kind!r} does not build its attention as Llama does; kvsuite cannot read it")
    ropes = {kind: find_rope(model, found[types.index(kind)], kind) for kind in dict.fromkeys(types)}
    return [
        LayerContext(
            index=index,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=module.head_dim,
            dtype=model.dtype,
            kv_dtype=kv_dtype or model.dtype,
            device=model.device,
            rope=ropes[kind] if getattr(module, "use_rope", True) else None,  # SmolLM3 leaves some layers unrotated
            window=_window(module, config, kind),
            hidden_size=config.hidden_size,
        )
        for index, (module, kind) in enumerate(zip(found, types, strict=True))
    ]


def _window(module: Any, config: Any, kind: str | None) -> int | None:
    """A layer's sliding window, as the model will pass it to the attention function; None where it never acts."""
    own = None if kind == "full_attention" else getattr(config, "sliding_window", None)
    window: int | None = getattr(module, "sliding_window", own)
    longest = getattr(config, "max_position_embeddings", None) or math.inf
    return window if window is not None and window < longest else None
