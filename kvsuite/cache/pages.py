"""One side (K or V) of one layer for all rows of a batch: pages of encoded tokens and the full-precision residual."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kvsuite.cache.context import PAGE, LayerContext, SideCodec, stored_dtype
from kvsuite.kernels.paged import Count, settled


class Places:
    """The (row, head) pairs of a batch that get one token each. ``of``: the rows; ``used``: slots in use before,
    int64 (rows, heads), or one less where a given-up one is taken again, which ``again`` says."""

    def __init__(self, rows: list[int], used: np.ndarray, again: np.ndarray) -> None:
        self.of, self.again = rows, again
        self.used = used - again

    def to(self, device: torch.device) -> None:
        """Make ``rows``, ``heads`` and ``slots``, the next ones, for indexing on the device."""
        n, heads = self.used.shape
        where = np.repeat(self.of, heads), np.tile(np.arange(heads), n), self.used.ravel()
        self.rows, self.heads, self.slots = torch.from_numpy(np.stack(where)).to(device)


class PagedStore:
    """Slots 0, 1, 2 … of every (row, kv head), the oldest encoded in pages, the newest in the residual.

    A pool per field holds all pages; the page ``p`` of (row, head) is ``pool[table[row, head, p]]``. Here a (row, head)
    owns consecutive pages, so pool and table read as one view and nothing is gathered. Writing never moves anything.
    """

    def __init__(self, codec: SideCodec, layer: LayerContext, rows: int, pages: int) -> None:
        self.codec = codec
        self.dtype, self.stored = layer.dtype, stored_dtype(codec, layer)
        heads, per_page = layer.kv_heads, PAGE // codec.block
        self.pools = tuple(
            torch.empty((rows * heads * pages, per_page, *shape), dtype=dtype, device=layer.device)
            for shape, dtype in codec.fields(layer.head_dim, layer.kv_dtype)
        )
        self._views = tuple(p.view(rows, heads, pages * per_page, *p.shape[2:]) for p in self.pools)
        self.residual = torch.empty(
            (rows, heads, codec.residual, layer.head_dim), dtype=self.stored, device=layer.device
        )
        one = tuple(view[0, :, :1] for view in self._views)
        storage = codec.decode(one, layer.dtype).untyped_storage().data_ptr()
        self.in_place = codec.residual == 0 and storage == self.pools[0].untyped_storage().data_ptr()
        """Whether `read` gives the stored numbers themselves, not a decoded copy."""
        self.encoded = np.zeros((rows, heads), dtype=np.int64)
        """Slots in pages, per row and head; the rest of a sequence is in the residual, at slot % residual."""

    def append(self, row: int, heads: slice, start: int, x: Tensor) -> None:
        """Store x (heads, n, head_dim) in slots start … start + n - 1, which must be the next ones."""
        x = x.to(self.stored)
        end = start + x.shape[1]
        done, target = int(self.encoded[row, heads.start]), int(self.settled(end))
        if target > done:
            old = self._recent(row, heads, done, min(start, target))
            self._encode(row, heads, done, torch.cat([old, x[:, : max(0, target - start)]], dim=1))
        self.encoded[row, heads] = target
        stay = max(start, target)
        if stay < end:
            slots = torch.arange(stay, end, device=x.device) % self.codec.residual
            self.residual[row, heads].index_copy_(1, slots, x[:, stay - start :])

    def step(self, at: Places, x: Tensor) -> None:
        """Store one token x (N, head_dim) in each of N (row, head, slot) places: the next slot, or a freed one where
        `reusable`. All rows at once; what a token becomes does not depend on the others."""
        rows, heads, slots, x = at.rows, at.heads, at.slots, x.to(self.stored)
        r = self.codec.residual
        if r == 0:
            self._put(rows, heads, slots, x)
        else:
            ring = slots % r
            if self.codec.rolling:  # the oldest of the residual moves into its page, the new one takes its place
                out = np.flatnonzero(at.used >= r)
                if out.size:
                    who = slice(None) if out.size == at.used.size else torch.from_numpy(out).to(x.device)
                    old = self.residual[rows[who], heads[who], ring[who]]
                    self._put(rows[who], heads[who], slots[who] - r, old)
            self.residual.index_put_((rows, heads, ring), x)
        for i, head in np.argwhere(self.count(at)).tolist():
            row, one = at.of[i], slice(head, head + 1)
            self._encode(row, one, int(self.encoded[row, head]) - r, self.residual[row, one])

    def count(self, at: Places) -> np.ndarray:
        """Count one token more in each of the places. Returns bool (rows, heads): where a residual that is not rolling
        became full and must be encoded."""
        before = self.encoded[at.of]
        after = np.maximum(before, self.settled(at.used + 1))
        self.encoded[at.of] = after
        full: np.ndarray = (after > before) & (self.codec.residual > 0 and not self.codec.rolling)
        return full

    def read(self, row: int, heads: slice, length: int) -> Tensor:
        """(heads, length, head_dim) in the compute dtype, as attention sees it: a view of the pool where that is what
        is stored."""
        done = int(self.encoded[row, heads.start])
        units = done // self.codec.block
        fields = tuple([view[row, heads, :units] for view in self._views])
        pages = self.codec.decode(fields, self.dtype).flatten(1, 2)
        if done == length:
            return pages
        return torch.cat([pages, self._recent(row, heads, done, length).to(self.dtype)], dim=1)

    def reset(self, row: int) -> None:
        """Forget a row; its pages go back to the pool."""
        self.encoded[row] = 0

    @property
    def reusable(self) -> bool:
        """Whether a freed slot can take another token: only where a token is stored by itself."""
        return self.codec.block == 1 and self.codec.residual == 0

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, all fields."""
        return sum(pool[0].nbytes for pool in self.pools)

    def nbytes(self, row: int) -> int:
        """Bytes a row's sequence holds: its pages, whole, and its residual, which is reserved as a whole."""
        return int((-(-self.encoded[row] // PAGE)).sum()) * self.page_bytes + self.residual[row].nbytes

    def settled(self, length: Count) -> Count:
        """How many of ``length`` slots belong into pages."""
        return settled(length, self.codec.residual, self.codec.rolling)

    def _recent(self, row: int, heads: slice, first: int, last: int) -> Tensor:
        """Slots first … last - 1 out of the residual, (heads, last - first, head_dim)."""
        if last <= first:
            return self.residual[row, heads, :0]
        slots = torch.arange(first, last, device=self.residual.device) % self.codec.residual
        return self.residual[row, heads].index_select(1, slots)

    def _put(self, rows: Tensor, heads: Tensor, slots: Tensor, x: Tensor) -> None:
        for view, field in zip(self._views, self.codec.encode(x[:, None, None]), strict=True):
            view.index_put_((rows, heads, slots), field[:, 0])

    def _encode(self, row: int, heads: slice, start: int, x: Tensor) -> None:
        block = self.codec.block
        first, units = start // block, x.shape[1] // block
        blocks = x.reshape(x.shape[0], units, block, x.shape[2])
        for view, field in zip(self._views, self.codec.encode(blocks), strict=True):
            view[row, heads, first : first + units] = field
