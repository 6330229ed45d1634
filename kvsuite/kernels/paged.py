"""A layer's compressed cache: pools of pages and what is known of each sequence, on the device and on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvsuite.kernels.allocator import PageAllocator
from kvsuite.kernels.context import LayerContext, Needs
from kvsuite.kernels.quantspec import PAGE, QuantSpec, Shape

NULL_PAGE = 0
"""Where tokens may be left out: the page that stands in a table for one that was given back. It holds no token."""


@dataclass(frozen=True)
class SlotMapping:
    """Where the next token of some rows goes: slots, int64 (rows, kv_heads), on the host."""

    rows: list[int]
    slots: np.ndarray


@dataclass(frozen=True)
class KVStore:
    """K or V of one layer, for all rows."""

    spec: QuantSpec
    pools: tuple[Tensor, ...]
    """A field each: (pages, PAGE / block, *shape)."""
    residual: Tensor
    """(rows, kv_heads, residual, head_dim): the newest tokens, slot s at s % residual."""
    fitted: tuple[Tensor, ...]
    """Each (rows, kv_heads, *shape): what encoding knows of a sequence."""

    @classmethod
    def empty(cls, spec: QuantSpec, layer: LayerContext, rows: int, pages: int) -> KVStore:
        """Storage for ``rows`` sequences in ``pages`` pages."""
        dim, dtype, device = layer.head_dim, layer.kv_dtype, layer.device

        def make(before: Shape, fields: Sequence[tuple[Shape, torch.dtype]]) -> tuple[Tensor, ...]:
            return tuple([torch.empty((*before, *shape), dtype=kind, device=device) for shape, kind in fields])

        stored = spec.stored_dtype(dim, dtype)
        return cls(
            spec,
            make((pages, PAGE // spec.block), spec.fields(dim, dtype)),
            torch.empty((rows, layer.kv_heads, spec.residual, dim), dtype=stored, device=device),
            make((rows, layer.kv_heads), spec.fitted(dim, dtype)),
        )

    @property
    def by_token(self) -> bool:
        """Whether each token is stored by itself, so that another one can take its slot."""
        return self.spec.block == 1 and self.spec.residual == 0


@dataclass(frozen=True)
class Views:
    """Some heads' pages in a row: each field (heads, units, *shape)."""

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    positions: Tensor | None
    accumulated_attention: Tensor | None
    newest_attention: Tensor | None


@dataclass
class Rows:
    """What the host knows of each row, or of each (row, kv head); int64. A step changes it without asking the
    device."""

    slots: np.ndarray
    """Slots in use, empty ones included."""
    tokens: np.ndarray
    """Slots that hold a token."""
    seen: np.ndarray
    """(rows,): tokens that have passed, kept or not."""
    free_slot: np.ndarray
    """A slot that was evicted and that the next token takes; -1 for none. Backends on the host read it."""
    columns: np.ndarray
    """Entries of the page table that are in use, given-back pages included."""
    gaps: np.ndarray
    """Of these: pages that were given back."""
    limit: np.ndarray
    """Slots that a sequence may come to at most."""
    home: np.ndarray
    """In an arena: the first of its consecutive pages."""
    budget: np.ndarray
    """Tokens that may stay while decoding."""
    prompt: np.ndarray
    """(rows,): of those that have passed, how many came with the prompt."""

    @classmethod
    def empty(cls, rows: int, heads: int) -> Rows:
        """Nothing in any row."""
        both, one = [np.zeros((rows, heads), dtype=np.int64) for _ in range(8)], np.zeros(rows, dtype=np.int64)
        slots, tokens, free_slot, columns, gaps, limit, home, budget = both
        return cls(slots, tokens, one, free_slot - 1, columns, gaps, limit, home, budget, one.copy())


@dataclass
class PagedKV:
    """K and V of one layer for ``rows`` sequences of different lengths.

    Slots 0, 1, 2 … of a (row, kv head) lie in its pages, the newest perhaps in a residual. Slot s is the element
    s % PAGE of the page that ``page_table`` names in column s // PAGE. Pages are allocated on the host before a step
    and keep their places; so do all tensors, so that a CUDA graph replays at other lengths. In an *arena* a (row, head)
    has consecutive pages, sized by its own budget; in a *pool* it has any that are free.
    """

    layer: LayerContext
    needs: Needs
    k: KVStore
    v: KVStore
    page_table: Tensor
    """int32 (rows, kv_heads, columns); `NULL_PAGE` for a page that was given back."""
    num_slots: Tensor
    """int32 (rows, kv_heads), as are the next three: slots in use, empty ones included."""
    num_tokens: Tensor
    num_seen: Tensor
    free_slot: Tensor
    """An evicted slot that the next token takes; -1 for none."""
    positions: Tensor | None
    """int32 (pages, PAGE): a slot's token's position, -1 for none; None where slot and position are the same."""
    accumulated_attention: Tensor | None
    """float32 (pages, PAGE): the attention each token got from all queries, mean over the query group."""
    newest_attention: Tensor | None
    """float32 (pages, PAGE): the same from the newest query alone."""
    noted: Tensor | None
    """float32 (pages, PAGE): what an eviction noted of each token."""
    summaries: tuple[Tensor, ...]
    """A reader's: each (pages, *shape)."""
    original_sinks: Tensor | None
    """(rows, kv_heads, rerotated_sinks, head_dim): the first keys as they came, where pages hold them rotated."""
    recent_queries: Tensor | None
    """(rows, heads, n, head_dim): the query of position p at p % n."""
    query_centres: Tensor | None
    """float32 (rows, heads, n): what the prompt's queries were like."""
    budget: Tensor | None
    """int32 (rows, kv_heads): tokens that may stay while decoding."""
    parameters: Tensor | None
    """int32 (rows, n): a method's own numbers of each sequence."""
    arena: bool
    host: Rows
    table: np.ndarray
    """``page_table`` on the host."""
    allocator: PageAllocator
    pages_per_row: int
    mapping: SlotMapping = field(default_factory=lambda: SlotMapping([], np.zeros((0, 0), dtype=np.int64)))
    """Where the tokens of the step go that is being made."""
    encodes: bool = False
    """Whether this step encodes a residual as a whole."""
    bound: tuple[tuple[int | None, ...], Tensor] | None = None
    """A batch's rows and the tensor that holds them on the device."""
    layout: tuple[list[bool], list[list[int]]] | None = None
    """By row, for `spans`: whether its heads are alike, and each head's slots; None where the host has changed."""
    known_views: dict[tuple[int, int, int], Views] = field(default_factory=dict)
    native: Any = None
    """What a compiled backend keeps of this cache."""

    @classmethod
    def empty(
        cls,
        layer: LayerContext,
        specs: tuple[QuantSpec, QuantSpec],
        rows: int,
        slots: int,
        needs: Needs | None = None,
        *,
        pages: int | None = None,
        arena: bool = True,
    ) -> PagedKV:
        """``slots``: the most that one head of a row needs; ``pages``: the most that a row needs, all heads."""
        needs, heads, columns = needs or Needs(), layer.kv_heads, -(-slots // PAGE)
        pages = heads * columns if pages is None else pages
        first = int(needs.positions)  # the null page
        total, table = first + rows * pages, np.zeros((rows, heads, columns), dtype=np.int32)
        k, v = (KVStore.empty(spec, layer, rows, total) for spec in specs)

        def make(wanted: bool | int, shape: Shape, dtype: torch.dtype, value: float = 0) -> Tensor | None:
            return torch.full(shape, value, dtype=dtype, device=layer.device) if wanted else None

        lengths = torch.zeros((4, rows, heads), dtype=torch.int32, device=layer.device)
        lengths[3] = -1
        stored, sinks, n = k.residual.dtype, needs.rerotated_sinks, needs.recent_queries
        in_place = k.by_token and specs[0].layout == "plain" and stored == layer.dtype  # else reading makes a copy
        on_host = torch.from_numpy(table)
        kv = cls(
            layer, needs, k, v,
            on_host if layer.device.type == "cpu" else on_host.to(layer.device, copy=True),
            lengths[0], lengths[1], lengths[2], lengths[3],
            make(needs.positions, (total, PAGE), torch.int32, -1),
            make(needs.accumulated_attention, (total, PAGE), torch.float32),
            make(needs.newest_attention, (total, PAGE), torch.float32),
            make(needs.noted, (total, PAGE), torch.float32),
            tuple([torch.zeros((total, *shape), dtype=dtype, device=layer.device) for shape, dtype in needs.summaries]),
            make(in_place and sinks, (rows, heads, sinks, layer.head_dim), stored),
            make(n, (rows, layer.heads, n, layer.head_dim), layer.dtype),
            make(needs.query_centres, (rows, layer.heads, needs.query_centres), torch.float32),
            make(needs.evicts, (rows, heads), torch.int32),
            make(needs.parameters, (rows, needs.parameters), torch.int32),
            arena, Rows.empty(rows, heads), table, PageAllocator(range(first, total)), pages,
        )  # fmt: skip
        if needs.positions:
            for pool in (*k.pools, *v.pools):
                pool[NULL_PAGE].zero_()  # its tokens' weights are 0, and 0 times NaN is NaN
        for row in range(rows):
            kv.admit(row, np.zeros(heads, dtype=np.int64), 0)
        return kv

    @property
    def by_token(self) -> bool:
        """Whether an evicted token's slot can be taken by another."""
        return self.k.by_token and self.v.by_token

    def admit(self, row: int, counts: np.ndarray, seen: int) -> None:
        """Make room for ``counts`` (kv_heads,) tokens in an empty row, of ``seen`` that have passed."""
        host = self.host
        own, columns = -(-counts // PAGE), self.table.shape[2]
        sizes = np.full(len(own), columns)
        if int(own.sum()) > self.pages_per_row:
            raise ValueError(f"row {row} is full: {int(own.sum())} pages do not fit into {self.pages_per_row}")
        if self.pages_per_row < len(own) * columns:  # ragged heads: what each has, and an equal share of the rest
            sizes = np.minimum(own + max(0, self.pages_per_row - int(own.sum())) // len(own), columns)
        host.limit[row] = sizes * PAGE
        host.home[row] = int(self.needs.positions) + row * self.pages_per_row + np.cumsum(sizes) - sizes
        self._refuse_overflow([row], counts[None])
        self.known_views = {key: views for key, views in self.known_views.items() if key[0] != row}
        self.layout = None
        host.slots[row], host.tokens[row], host.seen[row], host.prompt[row] = counts, counts, seen, seen
        self.allocate([row])

    def advance(self, rows: list[int], n: int = 1) -> None:
        """Count ``n`` tokens more in each row before a step writes them, and allocate their pages."""
        host = self.host
        slots = host.slots[rows]
        after, first = slots + n, slots
        if self.needs.evicts and self.by_token and n == 1:
            again = host.tokens[rows] < slots
            after, first = np.where(again, slots, after), np.where(again, host.free_slot[rows], slots)
        self._refuse_overflow(rows, after)
        self.mapping = SlotMapping(rows, first)
        whole = [x.spec for x in (self.k, self.v) if x.spec.residual and not x.spec.rolling]
        self.encodes = any(bool((spec.num_encoded(after) > spec.num_encoded(slots)).any()) for spec in whole)
        self.layout = None
        host.slots[rows] = after
        host.tokens[rows] += n
        host.seen[rows] += n
        self.allocate(rows)

    def allocate(self, rows: list[int]) -> None:
        """Pages for the slots that the host has counted."""
        needed, have = self.num_pages(self.host.slots[rows]), self.host.columns[rows]
        if not (needed > have).any():
            return
        for i, head in np.argwhere(needed > have).tolist():
            row = rows[i]
            for column in range(int(have[i, head]), int(needed[i, head])):
                home = int(self.host.home[row, head]) + column
                page = self.allocator.claim(home) if self.arena else self.allocator.take()
                self.table[row, head, column] = page
        self.host.columns[rows] = np.maximum(needed, have)
        self._upload_table([rows[i] for i in np.flatnonzero((needed > have).any(1))])

    def rows_on_device(self, rows: Sequence[int | None]) -> Tensor:
        """A batch's rows as kernels take them: int32, -1 for an idle item."""
        if self.bound is None or self.bound[0] != tuple(rows):
            self.bound = tuple(rows), self.items(rows)
        return self.bound[1]

    def items(self, rows: Sequence[int | None]) -> Tensor:
        """The same, made anew."""
        own = [-1 if row is None else row for row in rows]
        return torch.tensor(own, dtype=torch.int32, device=self.page_table.device)

    def num_pages(self, slots: np.ndarray) -> np.ndarray:
        """Pages for so many slots: all of them where positions lie in pages, else those that are encoded."""
        stored = slots
        if not self.needs.positions:
            stored = np.maximum(self.k.spec.num_encoded(slots), self.v.spec.num_encoded(slots))
        pages: np.ndarray = (stored + PAGE - 1) // PAGE
        return pages

    def give_back(self, row: int, head: int, columns: np.ndarray) -> None:
        """Give the pages in these columns of the table back; what they hold is forgotten."""
        if self.needs.positions:
            columns = columns[self.table[row, head, columns] != NULL_PAGE]
        pages = self.table[row, head, columns]
        self.allocator.give(pages.tolist())
        self.layout = None
        self.host.gaps[row, head] += len(columns)
        if self.positions is not None:  # so that no free page holds a token
            self.positions[torch.from_numpy(pages).to(self.positions.device, torch.int64)] = -1
        self.table[row, head, columns] = NULL_PAGE
        self._upload_table([row])

    def shrink(self, row: int, counts: np.ndarray) -> None:
        """A row's tokens lie in its first ``counts`` (kv_heads,) slots now: give back the pages behind them."""
        needed = self.num_pages(counts)
        for head, (least, most) in enumerate(zip(needed, self.host.columns[row], strict=True)):
            if least < most:
                self.give_back(row, head, np.arange(least, most))
                self.host.gaps[row, head] -= most - least
        self.host.slots[row], self.host.tokens[row], self.host.columns[row] = counts, counts, needed
        self.host.free_slot[row] = -1
        self.layout = None

    def count_evicted(self, rows: list[int]) -> None:
        """Each (row, head) beyond its budget has lost a token."""
        self.host.tokens[rows] -= self.host.tokens[rows] > self.host.budget[rows]
        self.layout = None

    def release(self, row: int) -> None:
        """Forget a row's sequence; its pages go back."""
        self.host.seen[row] = 0
        self.shrink(row, np.zeros(self.layer.kv_heads, dtype=np.int64))
        self.upload(row)

    def upload(self, row: int) -> None:
        """A row's lengths from the host's own: after anything but a kernel has changed them."""
        host, heads = self.host, self.layer.kv_heads
        lengths = np.stack([host.slots[row], host.tokens[row], np.full(heads, host.seen[row])]).astype(np.int32)
        for tensor, values in zip((self.num_slots, self.num_tokens, self.num_seen), lengths, strict=True):
            tensor[row] = torch.from_numpy(values)
        self.free_slot[row] = -1

    def spans(self, row: int) -> list[tuple[slice, int]]:
        """Heads that can be computed together and the slots each has in use: all, where they are equally long and lie
        alike, else one by one."""
        if self.layout is None:
            host = self.host
            alike = [x == x[:, :1] for x in (host.slots, host.tokens, host.limit)]
            together = (alike[0] & alike[1] & alike[2] & (host.gaps == 0)).all(1)
            self.layout = together.tolist(), host.slots.tolist()
        together, slots = self.layout
        if together[row]:
            return [(slice(0, self.layer.kv_heads), slots[row][0])]
        return [(slice(head, head + 1), n) for head, n in enumerate(slots[row])]

    def consecutive(self, row: int, heads: slice) -> bool:
        """Whether these heads' pages are an arena without gaps."""
        return self.arena and (heads.stop - heads.start > 1 or not self.host.gaps[row, heads.start])

    def views(self, row: int, heads: slice) -> Views:
        """Some heads' pages of all fields without copying, where they are `consecutive`."""
        key = row, heads.start, heads.stop
        if key not in self.known_views:
            start, pages = int(self.host.home[row, heads.start]), int(self.host.limit[row, heads.start]) // PAGE
            n = heads.stop - heads.start

            def view(pool: Tensor) -> Tensor:
                return pool[start : start + n * pages].view(n, pages * pool.shape[1], *pool.shape[2:])

            own = (self.positions, self.accumulated_attention, self.newest_attention)
            k, v = (tuple([view(pool) for pool in store.pools]) for store in (self.k, self.v))
            self.known_views[key] = Views(k, v, *[None if x is None else view(x) for x in own])
        return self.known_views[key]

    def slots_of(self, field: Tensor, rows: list[int], columns: int) -> Tensor:
        """A field of single slots, (pages, PAGE), of the first ``columns`` of some rows: (rows, kv_heads, columns *
        PAGE). In an arena of equal heads it is a view for all rows; a page that was given back lies there, too."""
        heads, all_columns = self.table.shape[1:]
        if self.arena and self.pages_per_row == heads * all_columns:
            first = int(self.needs.positions)
            whole = field[first:].view(len(self.host.seen), heads, -1)[..., : columns * PAGE]
            return whole if rows == list(range(len(whole))) else whole[rows]
        at = torch.tensor(rows, device=self.page_table.device)
        return field[self.page_table[at][:, :, :columns].long()].flatten(2)

    def pages(self, rows: int | list[int], heads: int | slice, columns: slice | np.ndarray) -> Tensor:
        """The pages in these columns of the table, int64 on the device."""
        found = self.table[rows, heads][..., columns].astype(np.int64)
        return torch.from_numpy(found).to(self.page_table.device)

    def places(self, rows: int | np.ndarray, heads: int | np.ndarray, slots: np.ndarray) -> Tensor:
        """Where slots lie in pools of single tokens, page * PAGE + slot % PAGE, int64 on the device. All broadcast."""
        places = self.table[rows, heads, slots // PAGE].astype(np.int64) * PAGE + slots % PAGE
        return torch.from_numpy(places).to(self.page_table.device)

    def held_pages(self, row: int) -> int:
        """Pages that a row's sequence holds."""
        return int((self.host.columns[row] - self.host.gaps[row]).sum())

    @property
    def token_fields(self) -> list[Tensor]:
        """All tensors of pages that each slot has a part of."""
        own = (self.positions, self.accumulated_attention, self.newest_attention, self.noted)
        return [*self.k.pools, *self.v.pools, *(x for x in own if x is not None)]

    @property
    def paged_fields(self) -> list[Tensor]:
        """All tensors of pages."""
        return [*self.token_fields, *self.summaries]

    @property
    def row_fields(self) -> list[Tensor]:
        """All tensors that each row has a part of, but the table."""
        own = (self.original_sinks, self.recent_queries, self.query_centres, self.budget, self.parameters)
        lengths = (self.num_slots, self.num_tokens, self.num_seen, self.free_slot)
        stores = [x for store in (self.k, self.v) for x in (store.residual, *store.fitted)]
        return [*stores, *lengths, *(x for x in own if x is not None)]

    def row_nbytes(self, row: int) -> int:
        """Bytes one sequence holds: pages, page table, residual, lengths, and the state of its method."""
        if self.host.seen[row] == 0:
            return 0
        table = int(self.host.columns[row].sum()) * self.page_table.element_size()
        return self.held_pages(row) * self.page_bytes + table + sum(x[row].nbytes for x in self.row_fields)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all fields."""
        return sum(x[0].nbytes for x in self.paged_fields)

    @property
    def allocated(self) -> int:
        """Bytes reserved, whoever holds them."""
        return sum(x.nbytes for x in (*self.paged_fields, *self.row_fields, self.page_table))

    def _refuse_overflow(self, rows: list[int], slots: np.ndarray) -> None:
        over = slots > self.host.limit[rows]
        if over.any():
            i, head = (int(x[0]) for x in np.nonzero(over))
            limit = int(self.host.limit[rows[i], head])
            raise ValueError(f"row {rows[i]} is full: {slots[i, head]} tokens per head do not fit into {limit} slots")

    def _upload_table(self, rows: list[int]) -> None:
        if self.page_table.device.type != "cpu":  # elsewhere it is the host's own memory
            for row in rows:
                self.page_table[row] = torch.from_numpy(self.table[row])
