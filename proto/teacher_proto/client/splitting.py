"""Splits a request into parts that a service admits, by sequences, tokens, body bytes and cost, and merges the streams.

Used by `replica_client.py`, and by the trainer to check before a run that its longest sequence fits alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from teacher_proto.client.exchange import InfoT
from teacher_proto.errors import OutOfRangeError, TeacherUnavailableError
from teacher_proto.info import ServiceInfo
from teacher_proto.request_checks import RequestT

T = TypeVar("T")

# A part of several sequences costs at most an eighth of what an empty service admits, so that several parts fit in.
SHARE_OF_COST = 8
# Bytes of a body apart from its sequences: names, kinds, temperatures, a fingerprint.
FIXED_BYTES = 1024


def least_of(infos: Sequence[InfoT]) -> InfoT:
    """The first of several replicas, with the lowest of all their limits: any of them may get the request."""
    limits = [info.limits for info in infos]
    costs = [limit.max_cost for limit in limits if limit.max_cost is not None]
    least: dict[str, int | None] = {
        name: min(getattr(limit, name) for limit in limits)
        for name in ("max_sequence_length", "max_sequences", "max_request_tokens", "max_body_bytes")
    }
    least["max_cost"] = min(costs, default=None)
    return infos[0].model_copy(update={"limits": limits[0].model_copy(update=least)})


def split(request: RequestT, info: InfoT, cost_of: Callable[[RequestT, InfoT], int]) -> list[list[int]]:
    """Indexes of the sequences in each part, in order. OutOfRangeError for a sequence that is not admitted even alone,
    with its size and the limit."""
    limits, parts = info.limits, list[list[int]]()
    tokens = num_bytes = values = 0
    for index, tokens_T in enumerate(request.sequences):
        cost, size = cost_of(request.select([index]), info), request.sequence_bytes(index)
        check_alone(f"sequences.{index}", len(tokens_T), size + FIXED_BYTES, cost, info)
        # Every token of a request costs as much as those of its most expensive sequence.
        own = -(-cost // max(len(tokens_T), 1))
        worst = max(values, own)
        fits = (
            bool(parts)
            and len(parts[-1]) < limits.max_sequences
            and tokens + len(tokens_T) <= limits.max_request_tokens
            and num_bytes + size <= limits.max_body_bytes
            and (limits.max_cost is None or (tokens + len(tokens_T)) * worst <= limits.max_cost // SHARE_OF_COST)
        )
        if fits:
            parts[-1].append(index)
        else:
            parts.append([index])
            tokens, num_bytes, worst = 0, FIXED_BYTES, own
        tokens, num_bytes, values = tokens + len(tokens_T), num_bytes + size, worst
    return parts


def check_alone(field: str, num_tokens: int, num_bytes: int, cost: int, info: ServiceInfo) -> None:
    """OutOfRangeError if a sequence of these sizes is not admitted even alone. `field` names it."""
    limits = info.limits
    if num_bytes > limits.max_body_bytes:
        raise OutOfRangeError(
            f"{field}: the request for its {num_tokens} tokens takes a body of {num_bytes} bytes, the "
            f"service accepts at most {limits.max_body_bytes}: shorten it to "
            f"{num_tokens * limits.max_body_bytes // num_bytes} tokens, or gather fewer ids",
            field=field, got=num_bytes, limit=limits.max_body_bytes,
        )  # fmt: skip
    if limits.max_cost is not None and cost > limits.max_cost:
        raise OutOfRangeError(
            f"{field}: the request for its {num_tokens} tokens costs {cost} (tokens x (numbers returned per "
            f"token + 1)), the service admits at most {limits.max_cost}: shorten it to "
            f"{num_tokens * limits.max_cost // cost} tokens, request fewer numbers, or start the service with "
            f"--capacity {cost}",
            field=field, got=cost, limit=limits.max_cost,
        )  # fmt: skip


async def merge(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yield (number of the stream, item) from all streams. Closing the generator closes them all.

    An exception in one stream ends the others, except for TeacherUnavailableError: it is raised once the others are
    done, so that their records are not lost.
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
