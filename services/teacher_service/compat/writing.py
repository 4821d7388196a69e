"""From targets to another server's response: encoded sequence by sequence, outside the event loop. Used by the
compatible routes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing

from serving.http.replies import Work, outcomes
from serving.http.streams import Outlet
from teacher_proto.errors import StillhouseError
from teacher_proto.requests import Query
from teacher_proto.targets import TokenTargets
from teacher_service.service import TeacherService

Encode = Callable[[int, Query, TokenTargets], list[bytes]]


async def encoded(work: Work[Query], service: TeacherService, encode: Encode) -> dict[int, list[bytes]]:
    """What `encode` makes of each sequence's targets, in pieces, by the sequence's index. It is CPU work and runs in a
    thread. The first sequence that fails fails the request, as in the servers whose JSON this is.
    """
    found: dict[int, list[bytes]] = {}
    results = outcomes(work, service)
    async with aclosing(results):
        async for index, outcome in results:
            if isinstance(outcome, StillhouseError):
                raise outcome
            started = time.perf_counter()
            found[index] = await asyncio.to_thread(encode, index, work.jobs[index].query, outcome)
            service.metrics.encode_seconds.labels(work.client).inc(time.perf_counter() - started)
    return found


async def write_items(found: dict[int, list[bytes]], outlet: Outlet) -> None:
    """Write the items of a JSON list in order, without its brackets. Each item is freed once it is written."""
    for index in range(len(found)):
        item = found.pop(index)
        item[0] = (b"," if index else b"") + item[0]
        for piece in item:
            await outlet.write(piece)
        del item
