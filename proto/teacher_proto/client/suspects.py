"""Which request kills the engine: evidence by sequence, and a lane in which a suspect is asked about alone.

When an engine dies, whatever was being computed is suspect: the one that killed it, and its neighbours. Asked again all
at once, the one would kill the next engine and the neighbours would look as guilty. So suspects are asked one at a
time, with nothing else of this client in flight: an innocent one is answered and cleared, and the one at which the
engine dies again, twice, is named. Used by `call.py` and `replica_client.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Literal

from teacher_proto.errors import DeadlyRequestError
from teacher_proto.request_checks import SequencesRequest

# An engine that says that it died was computing what it was asked; a process that vanished may have been killed by
# anybody. One death or two make a suspect, two alone or three a culprit.
Death = Literal["died", "vanished"]
_WEIGHT: dict[Death, int] = {"died": 3, "vanished": 2}
_SUSPECT, _CULPRIT = 3, 6


class Evidence:
    """What speaks against sequences that one client asks about, whatever request they come in, until they are
    answered: a restart may take longer than a call waits."""

    def __init__(self) -> None:
        self._beside: Counter[bytes] = Counter()
        self._alone: Counter[bytes] = Counter()
        self._reasons: dict[bytes, list[str]] = {}

    def suspects(self, request: SequencesRequest, missing: Iterable[int]) -> list[int]:
        """Those of `missing` to be asked about alone, the least suspect first: they are cleared the sooner."""
        if not self._reasons:
            return []
        keys = {index: _key(request, index) for index in missing}
        found = [index for index, key in keys.items() if self._alone[key] or self._beside[key] >= _SUSPECT]
        return sorted(found, key=lambda index: (self._alone[keys[index]], index))

    def note(
        self, request: SequencesRequest, indexes: Iterable[int], death: Death, reason: str, *, alone: bool
    ) -> None:
        """The engine died while these were computed. DeadlyRequestError once it has died often enough of one of them,
        while nothing else of ours was computed."""
        for index in indexes:
            key = _key(request, index)
            (self._alone if alone else self._beside)[key] += _WEIGHT[death]
            self._reasons.setdefault(key, []).append(f"{'alone' if alone else 'beside others'}, {reason}")
            if self._alone[key] >= _CULPRIT:
                raise _deadly(request, index, tuple(self._reasons[key]))

    def forget(self, request: SequencesRequest, index: int) -> None:
        """This one is answered."""
        if self._reasons:
            key = _key(request, index)
            for counts in (self._beside, self._alone, self._reasons):
                counts.pop(key, None)


def _key(request: SequencesRequest, index: int) -> bytes:
    return hashlib.sha256(request.sequences[index].tobytes()).digest()


def _deadly(request: SequencesRequest, index: int, reasons: tuple[str, ...]) -> DeadlyRequestError:
    tokens_T = request.sequences[index]
    shown = ", ".join([*map(str, tokens_T[:8].tolist()), *(["..."] if len(tokens_T) > 8 else [])])
    return DeadlyRequestError(
        f"the engine dies of one sequence of {len(tokens_T)} tokens ({shown}), {len(reasons)} times now, and "
        "answers others: " + "; ".join(reasons),
        field="sequences", request=request.select([index]), reasons=reasons,
    )  # fmt: skip


class Lanes:
    """Any number of holders at once, or one alone; who waits to be alone goes before those who come later."""

    def __init__(self) -> None:
        self._running = 0
        self._alone = 0
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def enter(self, *, alone: bool) -> AsyncIterator[None]:
        self._alone += alone
        try:
            await self._until((lambda: not self._running) if alone else (lambda: not self._alone))
            self._running += 1
            try:
                yield
            finally:
                self._running -= 1
        finally:
            self._alone -= alone
            self._changed.set()

    async def _until(self, free: Callable[[], bool]) -> None:
        while not free():
            self._changed.clear()
            await self._changed.wait()
