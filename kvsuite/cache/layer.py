"""A layer's cache: what is appended to and attended to, scored and timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kvsuite.cache.context import PAGE, Evictor, LayerContext, SideCodec
from kvsuite.cache.pages import PagedStore, Places
from kvsuite.kernels.attention import attention, causal_mask, pack_sinks, probabilities

Kept = Tensor | list[Tensor]
"""Which tokens stay, ascending: int64 (kv_heads, n), or a list of (n_h,) per head where heads are ragged."""


@dataclass(frozen=True)
class Asked:
    """How the model wants its attention: see `LayerCache.attend`; sink_logits packed to (kv_heads, group * queries)."""

    queries: int
    scale: float
    window: int | None
    softcap: float | None
    sink_logits: Tensor | None


@dataclass(frozen=True)
class Held:
    """What one kv head holds, in order of position: k, v (n, head_dim) as attention reads them, positions (n,)."""

    k: Tensor
    v: Tensor
    positions: Tensor
    exact: bool = True
    """Whether attention reads these very numbers, not the stored codes with roundings of its own."""


class LayerCache:
    """The compressed K and V of one layer for a batch of ``rows`` sequences of different lengths.

    Sequences enter with `load` (a prefilled prompt), grow with `append`, are read with `attend`, leave with `reset`.
    Every row is computed by itself, so that it cannot depend on its mates. With an `Evictor` a step appends one token
    per row, attends, and gives up one token per head beyond the budget; the next token takes the freed slot where the
    codec stores tokens singly. Elsewhere (KIVI's blocks) the slot stays empty and is masked, and its page is held on.
    """

    path = "unfused"
    """What stores and attends: kernels by their name, or PyTorch (``unfused``)."""

    def __init__(
        self,
        layer: LayerContext,
        codecs: tuple[SideCodec, SideCodec],
        rows: int,
        capacity: int,
        evictor: Evictor | None = None,
        selects: bool = False,
    ) -> None:
        """``capacity``: slots reserved per row and head, rounded up to pages. ``selects``: whether tokens may be left
        out, so that each slot's position must be kept; an evictor always does."""
        pages = -(-capacity // PAGE)
        shape = (rows, layer.kv_heads, pages * PAGE)
        self.layer, self.evictor = layer, evictor
        self.k, self.v = (PagedStore(codec, layer, rows, pages) for codec in codecs)
        self.table = torch.arange(rows * layer.kv_heads * pages, dtype=torch.int32, device=layer.device).view(
            rows, layer.kv_heads, pages
        )
        self.positions: Tensor | None = None
        self.scores: Tensor | None = None
        self._anchors: Tensor | None = None
        self._freed: Tensor | None = None
        if selects or evictor is not None:
            self.positions = torch.full(shape, -1, dtype=torch.int32, device=layer.device)
        if evictor is not None:
            self._freed = torch.zeros(shape[:2], dtype=torch.int64, device=layer.device)
            if evictor.mass:
                self.scores = torch.zeros(shape, device=layer.device)
            if evictor.shift and self.k.in_place:
                anchors = (*shape[:2], evictor.shift, layer.head_dim)
                self._anchors = torch.empty(anchors, dtype=layer.dtype, device=layer.device)
        self._capacity = shape[2]
        self._reusable = self.k.reusable and self.v.reusable
        self._slots = np.zeros((rows, layer.kv_heads), dtype=np.int64)  # slots in use, given-up ones included
        self._live = np.zeros((rows, layer.kv_heads), dtype=np.int64)  # slots that hold a token
        self._seen = [0] * rows
        self._evictors: list[Evictor | None] = [None] * rows

    @property
    def stepwise(self) -> bool:
        """Whether tokens must come one by one, because something is given up between two of them."""
        return self.evictor is not None

    def load(
        self,
        row: int,
        k: Tensor,
        v: Tensor,
        keep: Kept | None = None,
        scores: Tensor | None = None,
        evictor: Evictor | None = None,
    ) -> None:
        """Fill an empty row with a prefilled prompt: k, v (kv_heads, T, head_dim), of which ``keep`` stays (None: all).
        ``scores`` (kv_heads, T) float32 is the mass so far; ``evictor`` acts on this sequence from now on."""
        self.reset(row)
        length = k.shape[1]
        if keep is not None and self.positions is None:
            raise ValueError("a cache made without `selects` cannot leave tokens out")
        for heads, index in self._kept_spans(keep):
            part = slice(heads.start, heads.stop)
            n = length if index is None else index.shape[1]
            self._refuse_overflow(row, n)
            for store, x in ((self.k, k), (self.v, v)):
                store.append(row, heads, 0, x[part] if index is None else _take(x[part], index))
            if self.positions is not None:
                where = torch.arange(length, device=k.device) if index is None else index
                self.positions[row, heads, :n] = where.to(torch.int32)
            if self.scores is not None and scores is not None:
                self.scores[row, heads, :n] = scores[part] if index is None else scores[part].gather(1, index)
            self._grow(row, heads, n, n)
        self._seen[row], self._evictors[row] = length, evictor
        for heads, used in self._spans(row):
            self._anchor(row, heads, used)

    def append(self, k: Tensor, v: Tensor, rows: Sequence[int | None] = (0,)) -> None:
        """Add n tokens to every row: k, v (len(rows), kv_heads, n, head_dim); None marks an idle row of the batch."""
        n = k.shape[2]
        if self.stepwise and n > 1:
            raise ValueError("a cache that evicts while decoding takes its tokens one by one")
        active = [(b, row) for b, row in enumerate(rows) if row is not None]
        for _, row in active:
            self._refuse_overflow(row, 0 if self._freed_slots(row) else int(self._slots[row].max()) + n)
        if n == 1 and active:
            items = [b for b, _ in active]
            every = len(items) == len(rows)
            self._step([row for _, row in active], k if every else k[items], v if every else v[items])
        elif n > 1:
            for b, row in active:
                for heads, used in self._spans(row):
                    self._extend(row, heads, used, k[b, heads], v[b, heads])
        for _, row in active:
            self._seen[row] += n

    def attend(
        self,
        q: Tensor,
        scale: float,
        rows: Sequence[int | None] = (0,),
        *,
        window: int | None = None,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
    ) -> Tensor:
        """Attention of the newest Q tokens of every row over what it holds, causal among the Q.

        Args: q (len(rows), heads, Q, head_dim), rotated; window, softcap, sink_logits (heads,) as the model asks.
        Returns: q's shape and dtype; idle rows are zero.
        """
        packed = q.reshape(q.shape[0], self.layer.kv_heads, -1, q.shape[3])  # the query group as rows
        out = torch.zeros_like(packed) if None in rows else torch.empty_like(packed)
        aux = None if sink_logits is None else pack_sinks(sink_logits, self.layer.kv_heads, q.shape[2])
        asked = Asked(q.shape[2], scale, window, softcap, aux)
        for b, row in enumerate(rows):
            if row is None:
                continue
            for heads, used in self._spans(row):
                out[b, heads] = self._attend(row, heads, used, packed[b, heads], asked)
        return out.view(q.shape)

    def materialise(self, row: int = 0) -> list[Held]:
        """What each kv head of a row holds, as `attend` sees it, in order of position: the tests' oracle."""
        held = []
        for heads, used in self._spans(row):
            k, v = self._keys(row, heads, used), self.v.read(row, heads, used)
            positions = self._positions(row, heads, used).expand(k.shape[0], -1)
            for h in range(k.shape[0]):
                order = positions[h].argsort()
                order = order[positions[h][order] >= 0]
                held.append(Held(k[h, order].clone(), v[h, order].clone(), positions[h, order].clone()))
        return held

    def reset(self, row: int) -> None:
        """Forget a row's sequence."""
        for store in (self.k, self.v):
            store.reset(row)
        self._slots[row] = self._live[row] = self._seen[row] = 0
        self._evictors[row] = None

    def seen(self, row: int) -> int:
        """Tokens that have passed, kept or not: the position of the next one."""
        return self._seen[row]

    def kept(self, row: int) -> int:
        """Tokens a row can still attend to, over all kv heads."""
        return int(self._live[row].sum())

    def row_nbytes(self, row: int) -> int:
        """Bytes one sequence holds: pages, scales, residual, page table, and the selector's state."""
        if self._seen[row] == 0:
            return 0
        pages = int((-(-self._slots[row] // PAGE)).sum())
        state = sum(x[0, 0, :PAGE].nbytes for x in (self.positions, self.scores) if x is not None)
        whole = sum(x[row].nbytes for x in (self._anchors, self._freed) if x is not None)
        per_page = self.table.element_size() + state
        return self.k.nbytes(row) + self.v.nbytes(row) + pages * per_page + whole

    @property
    def nbytes(self) -> int:
        """Bytes held by all sequences."""
        return sum(self.row_nbytes(row) for row in range(len(self._seen)))

    @property
    def slack(self) -> int:
        """Bytes reserved for rows and pages that no sequence holds yet."""
        tensors = [*self.k.pools, *self.v.pools, self.k.residual, self.v.residual, self.table]
        tensors += [x for x in (self.positions, self.scores, self._anchors, self._freed) if x is not None]
        return sum(x.untyped_storage().nbytes() for x in tensors) - self.nbytes

    def _grow(self, row: int, heads: slice, slots: int, live: int) -> None:
        self._slots[row, heads] += slots
        self._live[row, heads] += live

    def _spans(self, row: int) -> list[tuple[slice, int]]:
        """Heads that can be computed together: all of them where they are equally long, else one by one."""
        used = self._slots[row].tolist()
        if len(set(used)) == 1 and len(set(self._live[row].tolist())) == 1:
            return [(slice(0, len(used)), used[0])]
        return [(slice(head, head + 1), n) for head, n in enumerate(used)]

    def _kept_spans(self, keep: Kept | None) -> Iterator[tuple[slice, Tensor | None]]:
        every = slice(0, self.layer.kv_heads)
        if keep is None or isinstance(keep, Tensor):
            yield every, keep
        elif len({index.shape[0] for index in keep}) == 1:
            yield every, torch.stack(keep)
        else:
            for head, index in enumerate(keep):
                yield slice(head, head + 1), index[None]

    def _refuse_overflow(self, row: int, slots: int) -> None:
        if slots > self._capacity:
            raise ValueError(f"row {row} is full: {slots} tokens per head do not fit into {self._capacity} slots")

    def _freed_slots(self, row: int) -> bool:
        """Whether the next token takes a given-up slot in every head."""
        return self._reusable and bool((self._live[row] < self._slots[row]).all())

    def _step(self, rows: list[int], k: Tensor, v: Tensor) -> None:
        """One token more in each of ``rows``: k, v (len(rows), kv_heads, 1, head_dim)."""
        at = self._places(rows)
        at.to(k.device)
        if self._freed is not None and at.again.any():
            again = torch.from_numpy(at.again.ravel()).to(k.device)
            at.slots = torch.where(again, self._freed[at.rows, at.heads], at.slots)
        self.k.step(at, k.flatten(0, 2))
        self.v.step(at, v.flatten(0, 2))
        where = (at.rows, at.heads, at.slots)
        if self.positions is not None:
            seen = np.repeat([self._seen[row] for row in rows], at.used.shape[1])
            self.positions.index_put_(where, torch.from_numpy(seen).to(k.device, torch.int32))
        if self.scores is not None:
            self.scores.index_put_(where, self.scores.new_zeros(()))
        self._count(at)

    def _places(self, rows: list[int]) -> Places:
        """Where the next token of each row goes: into a given-up slot where there is one that can be used again."""
        used = self._slots[rows]
        return Places(rows, used, (self._live[rows] < used) & self._reusable)

    def _count(self, at: Places) -> None:
        self._slots[at.of] = at.used + 1
        self._live[at.of] += 1

    def _extend(self, row: int, heads: slice, used: int, k: Tensor, v: Tensor) -> None:
        """Several tokens more in one row's next slots: k, v (heads, n, head_dim)."""
        n, first = k.shape[1], self._seen[row]
        self.k.append(row, heads, used, k)
        self.v.append(row, heads, used, v)
        if self.positions is not None:
            new = torch.arange(first, first + n, dtype=torch.int32, device=k.device)
            self.positions[row, heads, used : used + n] = new
        self._grow(row, heads, n, n)

    def _attend(self, row: int, heads: slice, used: int, q: Tensor, asked: Asked) -> Tensor:
        """q (heads, group * queries, head_dim) of one row -> the same shape."""
        k, v = self._keys(row, heads, used), self.v.read(row, heads, used)
        mask = self._mask(row, heads, used, asked.queries, asked.window)
        if mask is not None:
            mask = mask.repeat(1, q.shape[1] // asked.queries, 1)
        aux = None if asked.sink_logits is None else asked.sink_logits[heads]
        if self.scores is None:
            out = attention(q, k, v, asked.scale, mask, asked.softcap, aux)
        else:
            p = probabilities(q, k, asked.scale, mask, asked.softcap, aux)
            out = torch.matmul(p, v.float()).to(q.dtype)
            self.scores[row, heads, :used] += p.mean(dim=1)
        self._evict(row, heads, used)
        return out

    def _keys(self, row: int, heads: slice, used: int) -> Tensor:
        """K as attention sees it. With ``shift`` the first tokens stand where the cache has them: turned on from the
        stored originals by as many positions as were given up, never from an already turned copy."""
        k = self.k.read(row, heads, used)
        gap = self._seen[row] - int(self._live[row, heads.start])
        if self.evictor is not None and self.evictor.shift and self.layer.rope is not None and gap > 0:
            first = slice(0, self.evictor.shift)
            stored = k[:, first] if self._anchors is None else self._anchors[row, heads]
            k[:, first] = self.layer.rope.rotate(stored, gap)
        return k

    def _anchor(self, row: int, heads: slice, used: int) -> None:
        """Put the first tokens' keys aside when for the first time tokens are missing behind them, where reading gives
        the stored keys themselves: turning them would turn what is stored."""
        if self._anchors is not None and self._seen[row] > int(self._live[row, heads.start]):
            self._anchors[row, heads] = self.k.read(row, heads, used)[:, : self._anchors.shape[2]]

    def _positions(self, row: int, heads: slice, used: int) -> Tensor:
        if self.positions is not None:
            return self.positions[row, heads, :used]
        return torch.arange(used, dtype=torch.int32, device=self.layer.device)[None]

    def _mask(self, row: int, heads: slice, used: int, queries: int, window: int | None) -> Tensor | None:
        """bool (heads or 1, queries, used), or None where everything may be read."""
        seen = self._seen[row]
        holes = int(self._live[row, heads.start]) < used
        if queries == 1 and not holes and (window is None or seen <= window):
            return None
        newest = torch.arange(seen - queries, seen, dtype=torch.int32, device=self.layer.device)
        return causal_mask(newest, self._positions(row, heads, used), window)

    def _evict(self, row: int, heads: slice, used: int) -> None:
        evictor, live = self._evictors[row], int(self._live[row, heads.start])
        if evictor is None or self.positions is None or self._freed is None or live <= evictor.budget:
            return
        positions = self.positions[row, heads, :used]
        scores = None if self.scores is None else self.scores[row, heads, :used]
        slots = evictor.victim(positions, scores, self._seen[row])
        positions.scatter_(1, slots, -1)
        self._freed[row, heads] = slots[:, 0]
        complete = live == self._seen[row]
        self._grow(row, heads, 0, -1)
        if complete:
            self._anchor(row, heads, used)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x (heads, T, D) at index (heads, n)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
