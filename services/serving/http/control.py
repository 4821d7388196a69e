"""Who may go past queue and admission with control traffic: few requests of a client a minute, and of all together.

Canaries are small and always computed. Those beyond the allowance queue and are charged as any other request. Asked by
a service's request layer.
"""

from __future__ import annotations

import asyncio
from collections import deque

PER_CLIENT = 4
PER_SERVICE = 16
_WITHIN_S = 60.0


class ControlLane:
    """Counts what was let past. All methods run in the event loop's thread."""

    def __init__(self) -> None:
        self._passed: deque[tuple[float, str]] = deque()

    def take(self, client: str) -> bool:
        """Whether this client may go past now; counts it if so."""
        now = asyncio.get_running_loop().time()
        while self._passed and now - self._passed[0][0] > _WITHIN_S:
            self._passed.popleft()
        of_client = sum(name == client for _, name in self._passed)
        if of_client >= PER_CLIENT or len(self._passed) >= PER_SERVICE:
            return False
        self._passed.append((now, client))
        return True
