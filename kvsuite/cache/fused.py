"""The same layer cache, stepping and attending by Triton kernels."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kvsuite.cache.context import Evictor, LayerContext, SideCodec, stored_dtype
from kvsuite.cache.layer import Held, Kept, LayerCache
from kvsuite.cache.pages import PagedStore
from kvsuite.kernels.paged import PAGE, Paged, Side


def refusal(layer: LayerContext, codecs: Sequence[SideCodec], evictor: Evictor | None) -> str:
    """Why kernels cannot do this layer, in a few words; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from kvsuite.kernels.fused.attend import readable

    if any(stored_dtype(codec, layer) != layer.dtype for codec in codecs):
        return f"what is stored is not {layer.dtype}, in which the model computes"
    if not all(readable(codec.format, layer.dtype, layer.head_dim) for codec in codecs):
        return f"no kernel for {layer.dtype} with head dimension {layer.head_dim}"
    if evictor is not None and evictor.shift:
        if codecs[0].format.kind != "plain":
            return "re-rotated sinks of encoded keys"
        if evictor.shift > PAGE:
            return "more sinks than a page holds"
    return ""


class FusedCache(LayerCache):
    """A `LayerCache` whose step is a kernel that encodes, one that attends and adds up attention mass, and, where a
    selector acts while decoding, the choice of a victim on the device.

    Lengths are device tensors, so a CUDA graph of a step replays at any length. What the host must know of them
    (is there room, must a residual be encoded, how many bytes are held) it counts itself: `advance` before a step,
    `settle` after it; nothing is ever read back. `append` and `attend` do both unless ``replaying`` is set.
    """

    path = "triton"

    def __init__(
        self,
        layer: LayerContext,
        codecs: tuple[SideCodec, SideCodec],
        rows: int,
        capacity: int,
        evictor: Evictor | None = None,
        selects: bool = False,
    ) -> None:
        super().__init__(layer, codecs, rows, capacity, evictor, selects)
        self._freed = None
        shape = (rows, layer.kv_heads)
        self._counters = torch.zeros((4, *shape), dtype=torch.int32, device=layer.device)
        used, live, seen, freed = self._counters
        freed.fill_(-1)
        k, v = (Side(s.codec.format, s.pools, s.residual, s.codec.rolling) for s in (self.k, self.v))
        self.paged = Paged(k, v, self.table, used, live, seen, freed, self.positions, self.scores)
        self.replaying = False
        self.flushes = False
        """Whether a step encodes residuals that are full; set by `advance`."""
        self._rows: tuple[Sequence[int | None], Tensor] | None = None
        self._stacked, self._budgets = evictor, np.zeros(rows, dtype=np.int64)
        self._settings: dict[str, Tensor] = {}
        if evictor is not None:  # each row has its own budget: hyperparameters become a column
            names = [n for n, value in vars(evictor).items() if type(value) is int and n != "shift"]
            self._settings = {n: torch.zeros((rows, 1, 1), dtype=torch.int32, device=layer.device) for n in names}
            self._stacked = dataclasses.replace(evictor, **self._settings)  # type: ignore[type-var]

    def load(
        self,
        row: int,
        k: Tensor,
        v: Tensor,
        keep: Kept | None = None,
        scores: Tensor | None = None,
        evictor: Evictor | None = None,
    ) -> None:
        """As `LayerCache.load`: gathered, encoded and written by one kernel."""
        from kvsuite.kernels.fused import store

        self.reset(row)
        length = k.shape[1]
        if keep is not None and self.positions is None:
            raise ValueError("a cache made without `selects` cannot leave tokens out")
        index, counts = keep if isinstance(keep, Tensor) else None, [length] * self.layer.kv_heads
        if isinstance(keep, list):
            index = torch.nn.utils.rnn.pad_sequence(keep, batch_first=True)
            counts = [len(one) for one in keep]
        elif index is not None:
            counts = [index.shape[1]] * self.layer.kv_heads
        self._refuse_overflow(row, max(counts))
        ragged = torch.tensor(counts, dtype=torch.int32, device=k.device) if isinstance(keep, list) else None
        store.fill(self.paged, row, self._moved(self.k, k), self._moved(self.v, v), index, ragged, scores)
        for head, n in enumerate(counts):
            self._grow(row, slice(head, head + 1), n, n)
            for side in (self.k, self.v):
                side.encoded[row, head] = side.settled(n)
        self._seen[row], self._evictors[row] = length, evictor
        most = torch.iinfo(torch.int32).max  # nothing is given up
        self._budgets[row] = most if evictor is None else evictor.budget
        for name, column in self._settings.items():
            column[row] = most if evictor is None else getattr(evictor, name)
        for heads, used in self._spans(row):
            self._anchor(row, heads, used)

    def append(self, k: Tensor, v: Tensor, rows: Sequence[int | None] = (0,)) -> None:
        """As `LayerCache.append`; several tokens at once are stored by PyTorch, one by a kernel."""
        if k.shape[2] == 1:
            from kvsuite.kernels.fused import store

            if not self.replaying:
                self.advance(rows)
            at = self._on_device(rows)
            store.append(self.paged, self._moved(self.k, k[:, :, 0]), self._moved(self.v, v[:, :, 0]), at)
            if self.flushes:
                store.flush(self.paged, at)
            return
        super().append(k, v, rows)
        for row in rows:
            if row is not None:
                self._upload(row)

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
        """As `LayerCache.attend`: one kernel over the pages and one that merges its parts."""
        from kvsuite.kernels.fused.attend import attend

        if self._anchors is not None:
            self._turn()
        out = attend(q, self.paged, self._on_device(rows), scale, window, softcap, sink_logits)
        if self._stacked is not None:
            self._give_up()
        if not self.replaying:
            self.settle(rows)
        return out

    def advance(self, rows: Sequence[int | None]) -> bool:
        """Count a token for every row before a step stores it; says whether residuals must be encoded in it."""
        at = self._places([row for row in rows if row is not None])
        if int(at.used.max(initial=0)) >= self._capacity:
            for row, used in zip(at.of, at.used, strict=True):
                self._refuse_overflow(row, int(used.max()) + 1)
        full = [side.count(at) for side in (self.k, self.v)]
        self.flushes = any(bool(x.any()) for x in full)
        self._count(at)
        for row in at.of:
            self._seen[row] += 1
        return self.flushes

    def settle(self, rows: Sequence[int | None]) -> None:
        """Count what a step gave up after it attended."""
        if self.evictor is not None:
            at = [row for row in rows if row is not None]
            self._live[at] -= self._live[at] > self._budgets[at, None]

    def reset(self, row: int) -> None:
        """Forget a row's sequence."""
        super().reset(row)
        self._counters[:3, row] = 0
        if self.positions is not None:
            self.positions[row] = -1

    def row_nbytes(self, row: int) -> int:
        """As `LayerCache.row_nbytes`, with the lengths that are kept on the device."""
        held = super().row_nbytes(row)
        columns = sum(column[row].nbytes for column in self._settings.values())
        return held + self._counters[:, row].nbytes + columns if held else 0

    @property
    def slack(self) -> int:
        """As `LayerCache.slack`."""
        own = [self._counters, *self._settings.values()]
        return super().slack + sum(x.nbytes for x in own)

    def materialise(self, row: int = 0) -> list[Held]:
        """As `LayerCache.materialise`. Where something is encoded kernels read it with other roundings than these."""
        exact = self.k.in_place and self.v.in_place
        return [dataclasses.replace(held, exact=exact) for held in super().materialise(row)]

    def bind(self, rows: Sequence[int | None], on_device: Tensor) -> None:
        """Name the tensor that holds ``rows`` on the device, so that a graph finds their changes in it."""
        self._rows = (rows, on_device)

    def _on_device(self, rows: Sequence[int | None]) -> Tensor:
        if self._rows is None or self._rows[0] != rows:
            self._rows = (rows, row_tensor(rows, self.layer.device))
        return self._rows[1]

    def _moved(self, side: PagedStore, x: Tensor) -> Tensor:
        """What a plain codec does to the numbers themselves (jitter's noise): x (..., head_dim)."""
        if side.codec.format.kind != "plain":
            return x
        return side.codec.encode(x.reshape(1, -1, 1, x.shape[-1]))[0].view(x.shape)

    def _upload(self, row: int) -> None:
        """A row's counters from the host's own."""
        counts = np.stack([self._slots[row], self._live[row], np.full(self.layer.kv_heads, self._seen[row])])
        self._counters[:3, row] = torch.from_numpy(counts).to(self.layer.device, torch.int32)

    def _turn(self) -> None:
        """Let the first tokens' keys stand where the cache has them, in their pages; while nothing is missing behind
        them they are as stored, and put aside."""
        assert self._anchors is not None
        if self.layer.rope is None:
            return
        gap = (self.paged.seen - self.paged.live)[..., None, None]
        pages, count = self.table[:, :, 0].long(), self._anchors.shape[2]
        first = self.k.pools[0][pages, :count]
        self._anchors.copy_(torch.where(gap > 0, self._anchors, first))
        self.k.pools[0][pages, :count] = self.layer.rope.rotate(self._anchors, gap)

    def _give_up(self) -> None:
        """One token of every (row, head) beyond its budget, on the device and with the same shapes at every step."""
        assert self._stacked is not None
        assert self.positions is not None
        p = self.paged
        due = p.live > torch.as_tensor(self._stacked.budget).squeeze(-1)
        victim = self._stacked.victim(self.positions, self.scores, p.seen[..., None])
        old = self.positions.gather(2, victim)
        self.positions.scatter_(2, victim, torch.where(due[..., None], -1, old))
        if self._reusable:
            p.freed.copy_(torch.where(due, victim[..., 0], p.freed))
        p.live.sub_(due.int())


def row_tensor(rows: Sequence[int | None], device: torch.device) -> Tensor:
    """Rows as kernels take them: int32, -1 for an idle item."""
    return torch.tensor([-1 if row is None else row for row in rows], dtype=torch.int32, device=device)
