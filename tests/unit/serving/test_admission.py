"""Admission: permits counted in one act, given back always, shares that leave room for newcomers, and order."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from serving.scheduling import admission as admission_module
from serving.scheduling.admission import Admission, Permit
from serving.scheduling.fair import Rate
from teacher_proto.errors import OutOfRangeError, OverloadedError, QuotaError


def admission_of(capacity: int = 1000, *, shared: bool = True) -> Admission:
    return Admission(capacity, shared=shared, rate=Rate())


def permit(client: str, tokens: int, values: int = 0) -> Permit:
    return Permit.of(client, tokens, values)


async def fill(admission: Admission, stack: AsyncExitStack, client: str, cost: int = 10) -> int:
    """Permits of `cost` until there are no more; how much cost got in."""
    taken = 0
    while True:
        try:
            await stack.enter_async_context(admission.admit(permit(client, cost)))
        except (QuotaError, OverloadedError):
            return taken
        taken += cost


async def held(admission: Admission, wanted: Permit, release: asyncio.Event) -> None:
    """A client that is told of its progress: it waits for its permit and holds it until `release`."""
    async with admission.admit(wanted, told=True):
        await release.wait()


async def steps() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def end(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_permit_counts_tokens_times_values_and_one() -> None:
    admission = admission_of(10**6)
    async with admission.admit(permit("a", 100, 64)) as taken:
        assert taken.cost == admission.cost == 6500 and admission.tokens == 100
    assert (admission.cost, admission.tokens, admission.permits) == (0, 0, 0)


async def test_a_permit_is_given_back_whatever_happens() -> None:
    admission = admission_of()
    for error in (ValueError, KeyboardInterrupt, asyncio.CancelledError):
        with pytest.raises(error):
            async with admission.admit(permit("a", 1, 1)):
                raise error
    assert admission.cost == 0 and admission.empty.is_set() and not admission.clients()


async def test_full_is_503_and_says_what_is_free() -> None:
    admission = admission_of(shared=False)
    async with admission.admit(permit("a", 900)):
        with pytest.raises(OverloadedError) as caught:
            await admission.admit(permit("b", 101)).__aenter__()
    assert (caught.value.status, caught.value.got, caught.value.limit) == (503, 101, 100)


async def test_one_client_alone_is_stopped_with_429_while_there_is_room_for_another() -> None:
    admission = admission_of()
    async with AsyncExitStack() as stack:
        assert await fill(admission, stack, "greedy") == 500
        with pytest.raises(QuotaError) as caught:
            await admission.admit(permit("greedy", 10)).__aenter__()
        assert (caught.value.status, caught.value.got, caught.value.limit) == (429, 510, 500)
        assert await fill(admission, stack, "newcomer") == 330


async def test_greedy_clients_have_equal_shares_once_all_have_asked() -> None:
    admission = admission_of(10_000)
    names = ("first", "second", "third")
    for name in names:
        async with admission.admit(permit(name, 1)):
            pass
    async with AsyncExitStack() as stack:
        assert {await fill(admission, stack, name) for name in names} == {2500}


async def test_a_client_that_holds_nothing_gets_its_first_request_in_where_it_fits() -> None:
    admission = admission_of()
    async with AsyncExitStack() as stack:
        await fill(admission, stack, "greedy")
        async with admission.admit(permit("newcomer", 480)):
            assert admission.cost == 980


async def test_without_keys_everyone_is_one_client_and_may_fill_the_service() -> None:
    admission = admission_of(shared=False)
    async with AsyncExitStack() as stack:
        assert await fill(admission, stack, "anonymous") == 1000


async def test_what_an_empty_service_would_not_let_in_is_refused_with_what_fits() -> None:
    admission = admission_of(100)
    with pytest.raises(OutOfRangeError) as caught:
        await admission.admit(permit("a", 101)).__aenter__()
    assert (caught.value.got, caught.value.limit, caught.value.retryable) == (101, 100, False)
    admission.max_cost = 500
    async with admission.admit(permit("a", 500)):
        with pytest.raises(OverloadedError):
            await admission.admit(permit("b", 1)).__aenter__()
    assert admission.cost == 0


async def test_who_needs_an_empty_service_gets_it_before_those_who_come_later() -> None:
    admission, events = admission_of(100, shared=False), [asyncio.Event() for _ in range(3)]
    inside = [asyncio.create_task(held(admission, permit("small", 10), events[0])) for _ in range(10)]
    await steps()
    assert admission.cost == 100
    large = permit("large", 100)
    waiting = asyncio.create_task(held(admission, large, events[1]))
    await steps()
    later = [asyncio.create_task(held(admission, permit("small", 10), events[2])) for _ in range(10)]
    await steps()
    assert admission.waiting == 11 and admission.tokens_before(large) == 0
    with pytest.raises(OverloadedError):
        await admission.admit(permit("untold", 1)).__aenter__()
    events[0].set()
    await asyncio.gather(*inside)
    await steps()
    assert admission.clients() == {"large": 100}
    events[1].set()
    await waiting
    await steps()
    assert admission.clients() == {"small": 100} and not admission.waiting
    events[2].set()
    await asyncio.gather(*later)
    assert admission.cost == 0 and admission.empty.is_set()


async def test_who_waits_for_its_share_is_passed_by_others_and_not_by_itself() -> None:
    admission, release, never = admission_of(120), asyncio.Event(), asyncio.Event()
    first = asyncio.create_task(held(admission, permit("greedy", 40), release))
    await steps()
    large = asyncio.create_task(held(admission, permit("greedy", 60), never))
    small = asyncio.create_task(held(admission, permit("greedy", 1), never))
    await steps()
    other = asyncio.create_task(held(admission, permit("other", 30), never))
    await steps()
    assert admission.clients() == {"greedy": 40, "other": 30} and admission.waiting == 2
    release.set()
    await first
    await steps()
    assert admission.clients() == {"greedy": 60, "other": 30}
    await end(large, small, other)
    assert admission.cost == 0 and not admission.waiting and admission.empty.is_set()


async def test_who_leaves_while_it_waits_makes_room_for_the_next() -> None:
    admission, never = admission_of(100, shared=False), asyncio.Event()
    tasks = [asyncio.create_task(held(admission, permit("a", tokens), never)) for tokens in (50, 100, 50)]
    await steps()
    assert admission.cost == 50 and admission.waiting == 2
    tasks[1].cancel()
    await steps()
    assert admission.cost == 100 and not admission.waiting
    await end(*tasks)
    assert admission.cost == 0


async def test_a_large_request_whose_client_is_not_told_waits_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "_WITHOUT_PROGRESS_S", 0.05)
    admission, release = admission_of(100, shared=False), asyncio.Event()
    inside = asyncio.create_task(held(admission, permit("a", 60), release))
    await steps()
    with pytest.raises(OverloadedError):
        await admission.admit(permit("b", 50)).__aenter__()
    asyncio.get_running_loop().call_soon(release.set)
    async with admission.admit(permit("b", 50)):
        assert admission.cost == 50
    await inside


async def test_one_client_does_not_fill_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "_MAX_WAITING", 12)
    admission, release = admission_of(), asyncio.Event()
    greedy = [asyncio.create_task(held(admission, permit("greedy", 1000), release)) for _ in range(12)]
    await steps()
    refused = [task for task in greedy if task.done() and isinstance(task.exception(), OverloadedError | QuotaError)]
    assert len(refused) == 12 - 1 - 6 and admission.waiting == 6
    newcomer = asyncio.create_task(held(admission, permit("newcomer", 1000), release))
    await steps()
    assert not newcomer.done() and admission.waiting == 7
    await end(*greedy, newcomer)
    assert admission.waiting == admission.cost == 0


async def test_control_traffic_that_takes_long_keeps_its_clients_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """A canary at a slow teacher: it costs nothing and lasts longer than a client counts as one that asks."""
    monkeypatch.setattr(admission_module, "_ACTIVE_S", 0.0)
    admission = admission_of()
    async with admission.admit(Permit("a", 80, 0)):
        await asyncio.sleep(0.01)
        async with admission.admit(permit("b", 10)):
            pass
    assert admission.permits == 0 and admission.tokens == 0


async def test_control_traffic_is_let_in_past_everybody_and_counted() -> None:
    admission, never = admission_of(100, shared=False), asyncio.Event()
    tasks = [asyncio.create_task(held(admission, permit("a", 80), never)) for _ in range(2)]
    await steps()
    async with admission.admit(Permit("b", 0, 0)):
        assert admission.permits == 2 and admission.waiting == 1
    await end(*tasks)


async def test_closed_lets_nobody_in_and_those_inside_stay() -> None:
    admission, never = admission_of(), asyncio.Event()
    async with admission.admit(permit("a", 1000)):
        waiting = asyncio.create_task(held(admission, permit("b", 1000), never))
        await steps()
        admission.close("draining")
        with pytest.raises(OverloadedError, match="draining") as caught:
            await admission.admit(permit("c", 1)).__aenter__()
        with pytest.raises(OverloadedError, match="draining"):
            await waiting
        assert caught.value.retry_after and not admission.empty.is_set()
    assert admission.empty.is_set()


def test_retry_after_is_the_time_that_the_queue_takes_at_the_measured_rate() -> None:
    rate = Rate(low_s=1, high_s=60)
    assert rate.seconds(10_000) == 1
    for second in range(30):
        for part in range(1, 11):
            rate.count(100, second + part / 10)
    assert rate.tokens_per_second == pytest.approx(1000, rel=0.01)
    assert rate.seconds(5000) == pytest.approx(5, rel=0.01)
    assert rate.seconds(10) == 1 and rate.seconds(10**9) == 60


def test_the_rate_is_right_from_the_first_thing_that_finished() -> None:
    rate = Rate(at_most=lambda: 40.0)
    assert rate.tokens_per_second == 0 and rate.seconds(400) == 10
    rate.count(64, 3.2)
    assert rate.tokens_per_second == pytest.approx(20)
    rate.count(64, 6.4)
    assert rate.tokens_per_second == pytest.approx(20) and rate.seconds(400) == pytest.approx(20)
