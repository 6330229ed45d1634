"""Which pages of a layer's pools are free."""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """The free list of a pool, on the host. A page that was taken belongs to one (row, kv head) until it is given
    back."""

    def __init__(self, pages: Iterable[int]) -> None:
        self._free = dict.fromkeys(reversed(list(pages)))

    def __len__(self) -> int:
        """Pages that are free."""
        return len(self._free)

    def take(self) -> int:
        """Any free page. Raises ValueError where there is none."""
        if not self._free:
            raise ValueError("no page is free")
        return self._free.popitem()[0]

    def claim(self, page: int) -> int:
        """This very page. Raises ValueError where it is not free."""
        if page not in self._free:
            raise ValueError(f"page {page} is not free")
        del self._free[page]
        return page

    def give(self, pages: Iterable[int]) -> None:
        """Take pages back. Raises ValueError where one is free already."""
        for page in pages:
            if page in self._free:
                raise ValueError(f"page {page} was free already")
            self._free[page] = None
