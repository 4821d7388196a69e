"""The door: permits counted in one act, given back always, and shares that leave room for newcomers."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from serving.admission import Admission, RetryAfter
from teacher_proto.errors import OverloadedError, QuotaError


def door(capacity: int = 1000, *, shared: bool = True) -> Admission:
    return Admission(capacity, shared=shared, retry_after=RetryAfter())


def fill(admission: Admission, stack: ExitStack, student: str, cost: int = 10) -> int:
    """Permits of `cost` until the door says no; how much cost got in."""
    taken = 0
    while True:
        try:
            stack.enter_context(admission.admit(student, cost, 0))
        except (QuotaError, OverloadedError):
            return taken
        taken += cost


async def test_a_permit_counts_tokens_times_values_and_one() -> None:
    admission = door(10**6)
    with admission.admit("a", 100, 64) as permit:
        assert permit.cost == admission.cost == 6500 and admission.tokens == 100
    assert (admission.cost, admission.tokens, admission.permits) == (0, 0, 0)


async def test_a_permit_is_given_back_whatever_happens() -> None:
    admission = door()
    for error in (ValueError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error), admission.admit("a", 1, 1):
            raise error
    assert admission.cost == 0 and admission.empty.is_set() and not admission.students()


async def test_full_is_503_and_says_what_is_free() -> None:
    admission = door(shared=False)
    with admission.admit("a", 900, 0), pytest.raises(OverloadedError) as caught, admission.admit("b", 101, 0):
        pass
    assert (caught.value.status, caught.value.got, caught.value.limit) == (503, 101, 100)


async def test_one_student_alone_is_stopped_with_429_while_there_is_room_for_another() -> None:
    admission = door()
    with ExitStack() as stack:
        assert fill(admission, stack, "greedy") == 500
        with pytest.raises(QuotaError) as caught, admission.admit("greedy", 10, 0):
            pass
        assert (caught.value.status, caught.value.got, caught.value.limit) == (429, 510, 500)
        assert fill(admission, stack, "newcomer") == 330


async def test_greedy_students_have_equal_shares_once_all_have_asked() -> None:
    admission = door(10_000)
    names = ("first", "second", "third")
    for name in names:
        with admission.admit(name, 1, 0):
            pass
    with ExitStack() as stack:
        assert {fill(admission, stack, name) for name in names} == {2500}


async def test_a_student_that_holds_nothing_gets_its_first_request_in_where_it_fits() -> None:
    admission = door()
    with ExitStack() as stack:
        fill(admission, stack, "greedy")
        with admission.admit("newcomer", 480, 0):
            assert admission.cost == 980


async def test_without_keys_everyone_is_one_student_and_may_fill_the_house() -> None:
    admission = door(shared=False)
    with ExitStack() as stack:
        assert fill(admission, stack, "anonymous") == 1000


async def test_what_is_larger_than_the_house_is_let_in_when_it_is_empty() -> None:
    admission = door(100)
    with admission.admit("a", 500, 0), pytest.raises(OverloadedError), admission.admit("a", 1, 0):
        pass
    assert admission.cost == 0


async def test_closed_lets_nobody_in_and_those_inside_stay() -> None:
    admission = door()
    with admission.admit("a", 1, 0):
        admission.close("draining")
        with pytest.raises(OverloadedError, match="draining") as caught, admission.admit("b", 1, 0):
            pass
        assert caught.value.retry_after and not admission.empty.is_set()
    assert admission.empty.is_set()


def test_retry_after_is_the_time_that_the_queue_takes_at_the_measured_rate() -> None:
    retry = RetryAfter(low_s=1, high_s=60)
    assert retry.seconds(10_000) == 1
    for second in range(30):
        for part in range(10):
            retry.count(100, second + part / 10)
    assert retry.tokens_per_second == pytest.approx(1000, rel=0.1)
    assert retry.seconds(5000) == pytest.approx(5, rel=0.1)
    assert retry.seconds(10) == 1 and retry.seconds(10**9) == 60
