"""Several streams of records as one, as they come. Used by `replica_client.py` for a request that is sent in parts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

from teacher_proto.errors import TeacherUnavailableError

T = TypeVar("T")


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """(number of the stream, item) of all of them. Leaving it closes them all.

    What one raises ends the others, but not TeacherUnavailableError: what the others are about to give is not thrown
    away, and it is raised once they are done.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield 0, item
        return
    arrived: asyncio.Queue[tuple[int, T] | asyncio.Task[None]] = asyncio.Queue()

    async def read(which: int, stream: AsyncGenerator[T, None]) -> None:
        async with aclosing(stream):
            async for item in stream:
                arrived.put_nowait((which, item))

    tasks = [asyncio.create_task(read(which, stream)) for which, stream in enumerate(streams)]
    for task in tasks:
        task.add_done_callback(arrived.put_nowait)
    unavailable: TeacherUnavailableError | None = None
    running = len(tasks)
    try:
        while running:
            entry = await arrived.get()
            if isinstance(entry, tuple):
                yield entry
                continue
            running -= 1
            try:
                entry.result()
            except TeacherUnavailableError as error:
                unavailable = unavailable or error
        if unavailable is not None:
            raise unavailable
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
