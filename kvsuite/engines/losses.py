"""What a method's cache lacks of the uncompressed one: tokens, the attention that would go to them, and accuracy.

A sample is prefilled once more and compressed; then the baseline's answer is fed to the method's cache, token by token,
through its decode path. So what was evicted is what would have been when that answer was given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvsuite.cache import adapter
from kvsuite.cache.adapter import KVCache
from kvsuite.cache.layer import LayerCache
from kvsuite.cache.observations import LastQueries
from kvsuite.cache.prefill import PrefilledLayer
from kvsuite.engines.request import Request
from kvsuite.engines.worker import MethodWorker, Prompt, say
from kvsuite.kernels.context import HeadView
from kvsuite.kernels.reference.attention import last_query_weights
from kvsuite.methods import Method

if TYPE_CHECKING:
    from kvsuite.engines.transformers import TransformersEngine

POSITIONS = 32
"""Positions of an answer that are looked at, where it has more."""

HeldPositions = list[list[Tensor]]
"""For each layer and kv head the positions of the tokens it holds, int64 (n,)."""


@dataclass(frozen=True)
class ForcedAnswer:
    """A sample, as it was answered."""

    request: Request
    context: list[int]
    suffix: list[int]
    answer: list[int]
    """The baseline's tokens."""
    span: list[int]
    """Places of the tokens whose loss is to be told; none where it is not known which."""


@torch.inference_mode()
def losses(
    engine: TransformersEngine, asked: ForcedAnswer, parting: Mapping[Method, int | None]
) -> dict[Method, dict[str, Any]]:
    """The figures of `records.Loss` by method, or ``{"error": why}``. ``parting``: the place in the answer, from 0, at
    which each method's own parts from it; None where it does not."""
    prompt = engine.prefill(asked.request, asked.context, asked.suffix, [o for m in parting for o in m.observes])
    first = 0 if asked.suffix else 1  # the prefill itself, which is uncompressed, decides the first token
    n = len(asked.answer)
    count = min(POSITIONS, max(0, n - first))
    even = sorted({first + i * (n - first) // count for i in range(count)})
    apart = {at for at in parting.values() if at is not None and first <= at < n}
    at = sorted({*even, *apart})
    fed = asked.suffix + asked.answer[: max(at, default=0)]
    whole: list[PrefilledLayer] = []
    if at and any(method.selector for method in parting):
        window = LastQueries(at[-1] - at[0] + 1)
        whole = engine.prefill(asked.request, asked.context + fed, [], [window]).context
    found: dict[Method, dict[str, Any]] = {}
    for method, own in parting.items():
        try:
            found[method] = _look(engine, method, prompt, asked, whole, even, [own] if own in apart else [])
        except Exception as error:  # of a method's own: the others have figures
            found[method] = {"error": say(error)}
    return found


def _look(
    engine: TransformersEngine,
    method: Method,
    prompt: Prompt,
    asked: ForcedAnswer,
    whole: Sequence[PrefilledLayer],
    even: Sequence[int],
    apart: Sequence[int | None],
) -> dict[str, Any]:
    worker = engine.worker(method, 1, [(len(asked.context), len(asked.suffix) + len(asked.answer))])
    row = worker.compress(prompt)
    views = [cache.read(row) for cache in worker.caches]
    figures = _tokens(views, asked) | _errors(worker.caches, views, prompt.context, asked.span)
    if method.selector is None:  # it holds every token
        return figures | {"positions": len(even), "attention": 0.0 if even else None, "parting": 0.0 if apart else None}
    at = sorted({*even, *(p for p in apart if p is not None)})
    if not at:
        return figures
    lost = _attention(whole, _held(engine, worker, row, asked, at), at, len(asked.context) + len(asked.suffix))
    by_place = dict(zip(at, lost, strict=True))
    figures |= {"positions": len(even), "attention": sum(by_place[p] for p in even) / len(even)}
    return figures | {"parting": next((by_place[p] for p in apart if p is not None), None)}


def _tokens(views: Sequence[Sequence[HeadView]], asked: ForcedAnswer) -> dict[str, Any]:
    """How much of the prompt, and of its span, is held."""
    heads = [head for layer in views for head in layer]
    kept = sum(len(head.positions) for head in heads) / len(heads) / len(asked.context)
    found: dict[str, Any] = {"kept": kept, "span_tokens": len(asked.span)}
    if not asked.span:
        return found
    span = torch.tensor(asked.span, device=heads[0].positions.device)
    shares = [[float(torch.isin(span, head.positions).float().mean()) for head in layer] for layer in views]
    flat = [share for layer in shares for share in layer]
    gone = sum(share == 0 for share in flat) / len(flat)
    layers = [sum(layer) / len(layer) for layer in shares]
    return found | {"span_kept": sum(flat) / len(flat), "span_gone": gone, "layers": layers}


def _errors(
    caches: Sequence[LayerCache], views: Sequence[Sequence[HeadView]], context: Sequence[PrefilledLayer],
    span: Sequence[int],
) -> dict[str, float]:  # fmt: skip
    """Relative errors of K and V where they are held, of all tokens and of the span. Keys that a method moves on
    purpose, the sinks of StreamingLLM, are left out."""
    sums: dict[str, Tensor] = {}
    among = torch.tensor(span, device=context[0].k.device)
    for cache, heads, seen in zip(caches, views, context, strict=True):
        moved = 0 if cache.eviction is None else cache.eviction.rerotated_sinks
        for h, head in enumerate(heads):
            at = head.positions.long()
            inside = torch.isin(at, among)
            for name, mine, true in (("k_error", head.k, seen.k[h, at]), ("v_error", head.v, seen.v[h, at])):
                stays = (at >= moved) | (name == "v_error")
                squares = torch.stack([(mine.float() - true.float()) ** 2, true.float() ** 2]).sum(-1)
                for key, mask in ((name, stays), (f"span_{name}", stays & inside)):
                    sums[key] = sums.get(key, torch.zeros(2, device=at.device)) + squares[:, mask].sum(-1)
    return {key: math.sqrt(float(top / below)) for key, (top, below) in sums.items() if below > 0}


def _held(
    engine: TransformersEngine, worker: MethodWorker, row: int, asked: ForcedAnswer, at: Sequence[int]
) -> list[HeldPositions]:  # fmt: skip
    """What the cache holds when it attends for the answer's tokens ``at``: what it held before the step, and the token
    that is fed, since what a step evicts it has read."""
    worker.member.rows = (row,)
    cache, found = KVCache(worker.member), list[HeldPositions]()
    fed, start = asked.suffix + asked.answer, len(asked.context)
    for step in range(len(asked.suffix) + at[-1]):
        if step + 1 - len(asked.suffix) in at:
            newest = torch.tensor([start + step], device=engine.model.device)
            views = [own.read(row) for own in worker.caches]
            found.append([[torch.cat([head.positions.long(), newest]) for head in layer] for layer in views])
            if len(found) == len(at):
                return found
        ids, where = (torch.tensor([[x]], device=engine.model.device) for x in (fed[step], start + step))
        adapter.forward(engine.model, cache, ids, position_ids=where)
        if worker.member.error is not None:
            raise worker.member.error
    return found


def _attention(
    whole: Sequence[PrefilledLayer], held: Sequence[HeldPositions], at: Sequence[int], prompt: int
) -> list[float]:
    """For each place of the answer the share of attention that goes to tokens that are not held: mean over layers and
    query heads. ``whole`` ends with the token that decides the last place; ``prompt``: tokens before the answer."""
    window = LastQueries(at[-1] - at[0] + 1)
    sums = torch.zeros(len(at), device=whole[0].k.device)
    for layer, seen in enumerate(whole):
        q, length = seen[window], seen.k.shape[1]
        for head, weights in enumerate(last_query_weights(q, seen.k, seen.params)):  # (group, window, T)
            for i, place in enumerate(at):
                lost = torch.ones(length, dtype=torch.bool, device=sums.device)
                lost[held[i][layer][head]] = False
                sums[i] += weights[:, place - at[0], lost].sum(-1).mean()
    assert whole[0].k.shape[1] == prompt + at[-1]
    heads: int = len(whole) * whole[0].k.shape[0]
    return [float(x) / heads for x in sums]
