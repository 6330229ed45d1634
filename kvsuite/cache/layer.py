"""A layer's cache: what is appended to and attended to, scored and timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from kvsuite.cache.decoding import UNLIMITED, DecodeState, Eviction, LowestEviction, PageReader
from kvsuite.cache.observations import AttentionMass, HiddenStates, LastQueries, NewestAttention, QueryCentres
from kvsuite.cache.prefill import PrefilledLayer
from kvsuite.errors import UsageError
from kvsuite.kernels.backends import Items, choose
from kvsuite.kernels.context import AttentionParams, HeadView, LayerContext, Needs
from kvsuite.kernels.paged import PagedKV
from kvsuite.kernels.quantspec import PAGE, QuantSpec
from kvsuite.kernels.reference.attend import PageIndices, page_keys
from kvsuite.kernels.reference.store import KeepIndices

RELEASE_EVERY = 32
"""Steps of a sequence between two looks for pages without a token: each asks the device."""


class LayerCache:
    """The compressed K and V of one layer for a batch of ``rows`` sequences of different lengths.

    Sequences enter with `load` (a prefilled prompt), grow with `append`, are read with `attend`, leave with `reset`.
    Every row is computed by itself, so that it cannot depend on its mates. What is computed a backend computes; when
    pages are allocated, tokens evicted and rows compacted is decided here.
    """

    def __init__(
        self,
        layer: LayerContext,
        specs: tuple[QuantSpec, QuantSpec],
        rows: int,
        slots: int,
        *,
        eviction: Eviction | None = None,
        reader: PageReader | None = None,
        selects: bool = False,
        pages: int | None = None,
        backend: str = "auto",
    ) -> None:
        """``slots``: the most that one head of a row needs; ``pages``: the most that a row needs, unless given as many
        as hold ``slots`` for each head. ``selects``: tokens may be left out."""
        observes = () if eviction is None else eviction.observes
        if unseen := [x for x in observes if not x.decoding]:
            raise UsageError(f"{unseen[0]} cannot be observed while a sequence is decoded")
        hidden = next((x for x in observes if isinstance(x, HiddenStates)), None)
        needs = Needs(
            positions=selects or eviction is not None or reader is not None,
            evicts=eviction is not None,
            accumulated_attention=AttentionMass() in observes,
            newest_attention=NewestAttention() in observes,
            noted=hidden is not None,
            rerotated_sinks=0 if eviction is None else eviction.rerotated_sinks,
            recent_queries=max([x.window for x in observes if isinstance(x, LastQueries)], default=0),
            query_centres=_centre(layer) if QueryCentres() in observes else 0,
            parameters=0 if eviction is None else len(eviction.parameters(1)),
            summaries=() if reader is None else reader.summaries(layer.head_dim, layer.kv_dtype),
            reads_some=reader is not None,
        )
        self.layer, self.eviction, self.reader, self._hidden = layer, eviction, reader, hidden
        self.backend, self.refusal = choose(layer, *specs, needs, backend)
        """Who computes, and why others were not taken; empty where none was asked."""
        self.kv = PagedKV.empty(layer, specs, rows, slots, needs, pages=pages, arena=self.backend.ARENA)
        self.evict_lowest: Callable[[Items], None] | None = None
        """The backend's own way of evicting, where it has one for this eviction. It counts what it evicts."""
        if isinstance(eviction, LowestEviction) and hasattr(self.backend, "evict_lowest"):
            values = getattr(self.kv, eviction.field)
            self.evict_lowest = partial(self.backend.evict_lowest, self.kv, values=values, first=eviction.first)
        self.prepared = False
        """Whether `advance` and `settle` are called around a step, not by it: a graph replays what lies between."""
        self.pages_read: PageIndices | None = None
        """What a reader chose for the newest step, item by item of its batch; None where all is read."""
        self._left_out: dict[int, int] = {}
        """By row: pages that its newest step did not read."""

    @property
    def stepwise(self) -> bool:
        """Whether tokens must come one by one, because something is decided between two of them."""
        return self.eviction is not None or self.reader is not None

    @property
    def wants_hidden(self) -> bool:
        """Whether `append` must be given hidden states."""
        return self.kv.noted is not None

    def load(
        self, row: int, seen: PrefilledLayer, keep: KeepIndices | None = None, budget: Sequence[int] | None = None
    ) -> None:
        """Fill an empty row with a prefilled prompt, of which ``keep`` stays (None: all). From now on each head is
        kept at its ``budget`` of tokens; without one nothing is evicted."""
        if keep is not None and self.kv.positions is None:
            raise ValueError("a cache made without `selects` cannot leave tokens out")
        self.reset(row)
        kv, length = self.kv, seen.k.shape[1]
        for store, x in ((kv.k, seen.k), (kv.v, seen.v)):
            queries = seen.observed.get(LastQueries(store.spec.last_queries))
            found = store.spec.fit(x.to(store.residual.dtype), queries)
            for field, value in zip(store.fitted, found, strict=True):
                field[row] = value
        self.backend.fill(kv, row, seen.k, seen.v, keep, seen.observed.get(AttentionMass()))
        if kv.budget is not None:
            kv.host.budget[row] = UNLIMITED if budget is None else np.asarray(budget)
            kv.budget[row] = torch.from_numpy(kv.host.budget[row].astype(np.int32))
        if kv.parameters is not None and self.eviction is not None:
            kv.parameters[row] = torch.tensor(self.eviction.parameters(length), dtype=torch.int32)
        if kv.recent_queries is not None:
            n = kv.recent_queries.shape[2]
            kv.recent_queries[row] = 0
            wide = [what for what in seen.observed if isinstance(what, LastQueries) and what.window >= n]
            if wide:
                last = seen[wide[0]][:, -n:]
                ring = torch.arange(length - last.shape[1], length, device=last.device) % n
                kv.recent_queries[row].index_copy_(1, ring, last)
        if kv.query_centres is not None:
            kv.query_centres[row] = seen[QueryCentres()]
        if kv.noted is not None and self._hidden is not None:
            for head, own in enumerate(seen[self._hidden].expand(self.layer.kv_heads, -1)):
                slots = np.arange(int(kv.host.slots[row, head]))
                kv.noted.view(-1)[kv.places(row, head, slots)] = own if keep is None else own[keep[head]]
        self._summarise(row)

    def append(self, k: Tensor, v: Tensor, rows: Items = (0,), hidden: Tensor | None = None) -> None:
        """Add n tokens to every row: k, v (len(rows), kv_heads, n, head_dim); None marks an idle row of the batch.
        ``hidden`` (len(rows), n, hidden size), where it is wanted."""
        if self.stepwise and k.shape[2] > 1:
            raise ValueError("a cache that decides something at every step takes its tokens one by one")
        if not self.prepared:
            self.advance(rows, k.shape[2])
        self.backend.append(self.kv, k, v, rows)
        mapping = self.kv.mapping
        if self.kv.noted is not None and self._hidden is not None and mapping.rows:
            assert hidden is not None
            own = hidden[[b for b, row in enumerate(rows) if row is not None], 0]
            here = self.kv.places(np.array(mapping.rows)[:, None], np.arange(k.shape[1])[None], mapping.slots)
            noted = self._hidden.notes.note(own, self.layer.index).float()
            self.kv.noted.view(-1)[here] = noted.expand(k.shape[1], -1).T
        if self.reader is not None:
            for row, slots in zip(mapping.rows, mapping.slots, strict=True):
                self._summarise(row, None if self.kv.encodes else slots // PAGE)

    def attend(
        self,
        q: Tensor,
        scale: float,
        rows: Items = (0,),
        *,
        window: int | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Attention of the newest Q tokens of every row over what it holds, causal among the Q; then what is evicted at
        every step goes.

        Args: q (len(rows), heads, Q, head_dim), rotated; window, softcap, sink_logits (heads,) as the model asks.
        Returns: q's shape and dtype; idle rows are zero.
        """
        if self.reader is not None:
            self.pages_read = [None if row is None else self._choose(row, q[b, :, 0]) for b, row in enumerate(rows)]
            for row, chosen in zip(rows, self.pages_read, strict=True):
                if row is not None and chosen is not None:
                    self._left_out[row] = self.kv.held_pages(row) - sum(map(len, chosen))
        params = AttentionParams(scale, window, softcap, sink_logits)
        out = self.backend.attend(self.kv, q, rows, params, self.pages_read)
        if self.kv.recent_queries is not None:
            self._keep_queries(q, rows)
        if self.eviction is not None and self.eviction.every == 1:
            self._evict(rows)
        if not self.prepared:
            self.settle(rows)
        return out

    def advance(self, rows: Items, n: int = 1) -> None:
        """Count n tokens for every row and allocate their pages, before a step stores them."""
        self.backend.advance(self.kv, rows, n)

    def settle(self, rows: Items) -> None:
        """Count what a step evicted; from time to time compact a row, or give its empty pages back."""
        if self.eviction is None:
            return
        at = [row for row in rows if row is not None]
        if self.eviction.every > 1:
            for row in self._due(at, self.eviction.every):
                self._compact(row)
            return
        if self.evict_lowest is None:
            self.kv.count_evicted(at)
        if not self.kv.by_token and (due := self._due(at, RELEASE_EVERY)):
            self.backend.release_empty(self.kv, due)

    def read(self, row: int = 0) -> list[HeadView]:
        """What each kv head of a row holds, as `attend` sees it, in order of position: the checker's oracle."""
        return self.backend.read(self.kv, row)

    def reset(self, row: int) -> None:
        """Forget a row's sequence."""
        self._left_out.pop(row, None)
        self.kv.release(row)

    def seen(self, row: int) -> int:
        """Tokens that have passed, kept or not: the position of the next one."""
        return int(self.kv.host.seen[row])

    def kept(self, row: int) -> int:
        """Tokens a row can still attend to, over all kv heads."""
        return int(self.kv.host.tokens[row].sum())

    def row_nbytes(self, row: int) -> int:
        """Bytes one sequence holds: pages, page table, residual, lengths, and the state of its method."""
        return self.kv.row_nbytes(row)

    def read_nbytes(self, row: int) -> int:
        """Bytes that one step of a sequence reads: all it holds, but for pages that a reader leaves out."""
        summaries = sum(x[0].nbytes for x in self.kv.summaries)
        return self.row_nbytes(row) - self._left_out.get(row, 0) * (self.kv.page_bytes - summaries)

    def fragmentation(self, row: int) -> float:
        """The share of the slots in use that hold no token; slots of pages that were given back are not in use."""
        host = self.kv.host
        slots = int((host.slots[row] - host.gaps[row] * PAGE).sum())
        return 1 - self.kept(row) / slots if slots else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes held by all sequences."""
        return sum(self.row_nbytes(row) for row in range(len(self.kv.host.seen)))

    @property
    def slack(self) -> int:
        """Bytes reserved for rows and pages that no sequence holds yet."""
        return self.kv.allocated - self.nbytes

    def _keep_queries(self, q: Tensor, rows: Items) -> None:
        """Put a step's queries, (len(rows), heads, 1, head_dim), into their ring."""
        kv = self.kv
        assert kv.recent_queries is not None
        every = torch.arange(len(kv.host.seen), device=q.device)
        items = kv.rows_on_device(rows) if self.prepared else kv.items(rows)
        own = every[:, None] == items  # which item is each row's; idle ones are nobody's
        ring = (self._seen(slice(None)) - 1).clamp(min=0) % kv.recent_queries.shape[2]
        old = kv.recent_queries[every, :, ring]
        new = q[own.int().argmax(1), :, 0]
        kv.recent_queries[every, :, ring] = torch.where(own.any(1)[:, None, None], new, old)

    def _due(self, rows: list[int], every: int) -> list[int]:
        """Those of these rows whose steps since the prompt are a multiple of ``every``."""
        seen, prompt = self.kv.host.seen, self.kv.host.prompt
        return [row for row in rows if (seen[row] - prompt[row]) % every == 0]

    def _evict(self, rows: Items) -> None:
        """One token of every (row, head) beyond its budget. In a graph: of all rows, with the same shapes each time."""
        if self.evict_lowest is not None:
            self.evict_lowest(rows)
            return
        kv = self.kv
        at = [row for row in rows if row is not None]
        if self.prepared:
            at, columns = list(range(len(kv.host.seen))), kv.table.shape[2]
        elif not at or not (kv.host.tokens[at] > kv.host.budget[at]).any():
            return
        else:
            columns = int(kv.host.columns[at].max())
        state = self._state(at, columns)
        scores = self.eviction.score(state)  # type: ignore[union-attr]
        scores = torch.where(state.positions < 0, float("inf"), scores)
        if self.prepared or scores.device.type != "cpu":
            slots = scores.argmin(dim=-1)
        else:
            slots = torch.from_numpy(scores.numpy().argmin(axis=-1))  # eight times as fast
        self.backend.evict(kv, at, slots)
        if self.reader is not None:
            for row, own in zip(at, slots.cpu().numpy(), strict=True):
                self._summarise(row, own // PAGE)

    def _compact(self, row: int) -> None:
        """Bring a row back to its budget."""
        kv, budget = self.kv, self.kv.host.budget[row]
        if not (kv.host.tokens[row] > budget).any():
            return
        assert self.eviction is not None
        state = self._state([row], int(kv.host.columns[row].max()), alone=True)
        scores = self.eviction.score(state).masked_fill(state.positions < 0, float("-inf"))
        counts = np.minimum(budget, kv.host.tokens[row])
        self.backend.compact(kv, row, highest(scores, counts.tolist(), state.positions))
        self._summarise(row)

    def _state(self, rows: list[int], columns: int, alone: bool = False) -> DecodeState:
        """What the eviction sees of some rows, up to so many pages; of one ``alone``, with its keys and queries."""
        kv, device = self.kv, self.layer.device
        every = rows == list(range(len(kv.host.seen)))
        at = slice(None) if every else torch.tensor(rows, device=device)
        paged = (kv.positions, kv.accumulated_attention, kv.newest_attention, kv.noted)
        fields = [None if x is None else kv.slots_of(x, rows, columns) for x in paged]
        seen, own = self._seen(at)[:, None, None], () if kv.parameters is None else kv.parameters[at].unbind(1)
        parameters = tuple([x[:, None, None] for x in own])
        if not alone:
            return DecodeState(fields[0], seen, parameters, *fields[1:])  # type: ignore[arg-type]
        (row,), heads = rows, range(self.layer.kv_heads)
        k = torch.stack([page_keys(kv, row, head, np.arange(columns))[0].flatten(0, 1) for head in heads])
        queries = None
        if kv.recent_queries is not None:
            n, count = kv.recent_queries.shape[2], self.seen(row)
            ring = torch.arange(max(0, count - n), count, device=device) % n
            queries = kv.recent_queries[row][:, ring]
        first = [None if x is None else x[0] for x in fields]
        return DecodeState(
            first[0], seen[0], tuple(x[0] for x in parameters), first[1], first[2], first[3],  # type: ignore[arg-type]
            queries, k, None if kv.query_centres is None else kv.query_centres[row], self.layer.rope,
        )  # fmt: skip

    def _seen(self, rows: Tensor | slice) -> Tensor:
        """int64 (rows,): tokens that have passed; from the device where a graph replays."""
        if self.prepared:
            return self.kv.num_seen[rows, 0].long()
        return torch.from_numpy(self.kv.host.seen).to(self.layer.device)[rows]

    def _choose(self, row: int, q: Tensor) -> list[np.ndarray]:
        """The columns of the page table that are read, for each kv head: what the reader chooses, and the newest
        token's own, so that something may be read under every window. q (heads, head_dim)."""
        kv, chosen = self.kv, []
        newest = kv.mapping.slots[kv.mapping.rows.index(row)] // PAGE
        assert self.reader is not None
        for head, group in enumerate(q.view(self.layer.kv_heads, -1, q.shape[-1])):
            columns = np.flatnonzero(kv.table[row, head, : kv.host.columns[row, head]])
            pages = kv.pages(row, head, columns)
            own = self.reader.pages(group, tuple([x[pages] for x in kv.summaries]))
            chosen.append(np.union1d(columns[own.cpu().numpy()], newest[head]))
        return chosen

    def _summarise(self, row: int, columns: np.ndarray | None = None) -> None:
        """Keep what the reader knows of pages true: of one column of the table for each kv head, or of all."""
        if self.reader is None:
            return
        kv = self.kv
        for head in range(self.layer.kv_heads):
            own = np.flatnonzero(kv.table[row, head]) if columns is None else columns[head : head + 1]
            if not len(own):
                continue
            pages = kv.pages(row, head, own)
            for field, value in zip(kv.summaries, self.reader.summarise(*page_keys(kv, row, head, own)), strict=True):
                field[pages] = value.to(field.dtype)


def _centre(layer: LayerContext) -> int:
    """How many numbers `QueryCentres` has for a head."""
    return layer.head_dim + (0 if layer.rope is None else len(layer.rope.inverse_frequency))


def highest(scores: Tensor, counts: Sequence[int], positions: Tensor | None = None) -> KeepIndices:
    """The ``counts`` (kv_heads,) highest scores of each head: scores (kv_heads, n) to indices, ascending, or in order
    of ``positions`` (kv_heads, n)."""
    kept = []
    for head, count in enumerate(counts):
        index = scores[head].topk(count).indices.sort().values
        kept.append(index if positions is None else index[positions[head, index].argsort()])
    return kept
