"""Turns at the engine: equal tokens for every client, whatever they send, and nothing lost to those who leave."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from serving.scheduling.fair import FairQueue, Ticket


async def serve(queue: FairQueue, order: list[str], client: str, tokens: int) -> None:
    """One piece of work that notes its client when its turn comes."""
    ticket = Ticket(tokens)
    queue.join(client, ticket)
    async with queue.turn(ticket):
        order.append(client)
        await asyncio.sleep(0)


async def test_a_flood_of_small_requests_gets_no_more_tokens_than_one_polite_client() -> None:
    queue, order = FairQueue(window=100), []
    async with asyncio.TaskGroup() as group:
        for _ in range(640):
            group.create_task(serve(queue, order, "flood", 10))
        for _ in range(20):
            group.create_task(serve(queue, order, "polite", 100))
    last_polite = max(i for i, client in enumerate(order) if client == "polite")
    served = Counter(order[: last_polite + 1])
    assert abs(served["flood"] * 10 - served["polite"] * 100) <= 200


async def test_three_clients_of_different_sizes_share_within_one_request_each() -> None:
    queue, order = FairQueue(window=64), []
    sizes = {"a": 7, "b": 33, "c": 64}
    async with asyncio.TaskGroup() as group:
        for client, size in sizes.items():
            for _ in range(20_000 // size):
                group.create_task(serve(queue, order, client, size))
    shares = Counter()
    for client in order[: len(order) // 2]:
        shares[client] += sizes[client]
    assert max(shares.values()) - min(shares.values()) <= 2 * 64


async def test_idleness_saves_nothing_up() -> None:
    queue, order = FairQueue(window=10), []
    await asyncio.gather(*(serve(queue, order, "early", 10) for _ in range(50)))
    order.clear()
    early = [asyncio.create_task(serve(queue, order, "early", 10)) for _ in range(20)]
    late = [asyncio.create_task(serve(queue, order, "late", 10)) for _ in range(20)]
    await asyncio.gather(*early, *late)
    assert abs(Counter(order[:20])["late"] - 10) <= 1


async def test_work_larger_than_the_window_goes_alone() -> None:
    queue, order = FairQueue(window=10), []
    tasks = [asyncio.create_task(serve(queue, order, "a", tokens)) for tokens in (5, 500, 5)]
    await asyncio.gather(*tasks)
    assert order == ["a"] * 3 and queue.running == 0


async def test_those_who_leave_are_not_served_and_not_charged() -> None:
    queue, order = FairQueue(window=10), []
    holder = Ticket(10)
    queue.join("holder", holder)
    async with queue.turn(holder):
        leaving = [asyncio.create_task(serve(queue, order, "fickle", 10)) for _ in range(30)]
        staying = [asyncio.create_task(serve(queue, order, s, 10)) for s in ("fickle", "steady") for _ in range(4)]
        await asyncio.sleep(0)
        assert queue.waiting_tokens == 380
        for task in leaving:
            task.cancel()
        await asyncio.sleep(0)
        assert queue.waiting_tokens == 80
    await asyncio.gather(*staying)
    assert abs(Counter(order[:4])["fickle"] - 2) <= 1 and queue.running == 0


async def test_a_turn_that_comes_in_the_instant_of_leaving_is_given_back() -> None:
    queue = FairQueue(window=10)
    first, second = Ticket(10), Ticket(10)
    queue.join("a", first)
    queue.join("b", second)
    waiting = asyncio.create_task(_wait(queue, second))
    await asyncio.sleep(0)
    async with queue.turn(first):
        pass
    assert not second.waiting and queue.running == 10
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert queue.running == 0


async def _wait(queue: FairQueue, ticket: Ticket) -> None:
    async with queue.turn(ticket):
        await asyncio.sleep(0)


async def test_work_that_two_clients_want_is_served_by_whoever_is_first_and_once() -> None:
    queue, order = FairQueue(window=10), []
    holder = Ticket(10)
    queue.join("holder", holder)
    async with queue.turn(holder):
        flood = [asyncio.create_task(serve(queue, order, "flood", 10)) for _ in range(10)]
        await asyncio.sleep(0)
        shared = Ticket(10)
        queue.join("flood", shared)
        queue.join("polite", shared)
        waiting = asyncio.create_task(_note(queue, shared, order))
        await asyncio.sleep(0)
    await asyncio.gather(*flood, waiting)
    assert order.index("shared") <= 1 and order.count("shared") == 1
    assert queue.running == 0 and queue.waiting_tokens == 0


async def _note(queue: FairQueue, ticket: Ticket, order: list[str]) -> None:
    async with queue.turn(ticket):
        order.append("shared")


async def test_the_busy_clock_runs_while_there_is_work_and_stands_still_otherwise() -> None:
    queue = FairQueue(window=100)
    await asyncio.sleep(0.05)
    assert queue.busy_s() == 0
    for _ in range(2):
        ticket, other = Ticket(10), Ticket(10)
        queue.join("a", ticket)
        queue.join("b", other)
        async with queue.turn(ticket):
            async with queue.turn(other):
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.05)
        stopped = queue.busy_s()
        await asyncio.sleep(0.1)
        assert queue.busy_s() == stopped
    assert stopped >= 0.2


async def test_the_window_halves_and_recovers() -> None:
    queue = FairQueue(window=1000)
    for expected in (500, 250, 125):
        ticket = Ticket(1)
        queue.join("a", ticket)
        queue.halve(ticket)
        queue.halve(ticket)
        assert queue.window == expected
    for _ in range(1000):
        queue.recover()
    assert queue.window == 1000


async def test_what_is_ahead_is_what_others_are_served_before() -> None:
    queue = FairQueue(window=10)
    running = Ticket(10)
    queue.join("a", running)
    lanes = {name: [Ticket(10) for _ in range(count)] for name, count in {"a": 10, "b": 3, "c": 5}.items()}
    for name, tickets in lanes.items():
        for ticket in tickets:
            queue.join(name, ticket)
    # Before c's last ticket, of 40: b is through with its 30, and a, of which 10 run, had 30 more.
    assert queue.tokens_ahead(lanes["c"]) == 10 + 30 + 30
    # The last of all waits for everybody, and for nothing but itself in its own lane.
    assert queue.tokens_ahead(lanes["a"]) == 10 + 30 + 50
    assert queue.tokens_ahead([running]) == queue.tokens_ahead([]) == 0
    assert queue.tokens_in_all() == 10 + 100 + 30 + 50
    for ticket in (*lanes["a"], *lanes["b"], running):
        queue.leave(ticket)
    await asyncio.sleep(0.6)  # an order is looked at for half a second
    assert queue.tokens_ahead(lanes["c"]) == 0


async def test_control_traffic_goes_at_once_and_counts_as_running() -> None:
    queue = FairQueue(window=10)
    running, waiting, urgent = Ticket(10), Ticket(10), Ticket(5)
    queue.join("a", running)
    queue.join("b", waiting)
    queue.rush(urgent)
    assert not urgent.waiting and waiting.waiting and queue.running == 15
    queue.leave(running)
    assert waiting.waiting
    queue.leave(urgent)
    assert not waiting.waiting and queue.running == 10


async def test_no_more_is_handed_over_than_the_pace_says() -> None:
    queue = FairQueue(window=100)
    queue.pace = 20
    tickets = [Ticket(10) for _ in range(5)]
    for ticket in tickets:
        queue.join("a", ticket)
    assert queue.running == 20
    queue.pace = 40
    queue.leave(tickets[0])
    assert queue.running == 40
