"""Keeps track of results that may be requested again, bounded in bytes and time. Used by `coalescer.py`."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable


class Kept:
    """Keys of things stored elsewhere. `forget(key)` is called for what has to go: the oldest while all take more than
    `max_bytes`, and whatever is older than `max_s`. All methods run in the event loop's thread."""

    def __init__(self, max_bytes: int, max_s: float, forget: Callable[[Hashable], None]):
        self._max_bytes = max_bytes
        self._max_s = max_s
        self._forget = forget
        self._items: OrderedDict[Hashable, tuple[int, float]] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._items

    def add(self, key: Hashable, nbytes: int) -> None:
        self.discard(key)
        loop = asyncio.get_running_loop()
        self._items[key] = (nbytes, loop.time())
        self.nbytes += nbytes
        while self.nbytes > self._max_bytes:
            self._drop_oldest()
        if self._timer is None and self._items:
            self._timer = loop.call_later(self._max_s, self._expire)

    def discard(self, key: Hashable) -> None:
        """Remove a key without calling `forget`."""
        if key in self._items:
            self.nbytes -= self._items.pop(key)[0]

    def _drop_oldest(self) -> None:
        key, (nbytes, _) = self._items.popitem(last=False)
        self.nbytes -= nbytes
        self._forget(key)

    def _expire(self) -> None:
        loop = asyncio.get_running_loop()
        while self._items and loop.time() - next(iter(self._items.values()))[1] >= self._max_s:
            self._drop_oldest()
        self._timer = None
        if self._items:
            oldest = next(iter(self._items.values()))[1]
            self._timer = loop.call_at(oldest + self._max_s, self._expire)
