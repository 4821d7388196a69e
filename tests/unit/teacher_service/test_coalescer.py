"""The way of one sequence: coalesced with its like, finished without who asked, refused when it is not finite."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serving.engine import Job
from serving.metrics import Metrics
from serving.scheduling import coalescer as coalescer_module
from serving.scheduling.coalescer import Coalescer
from serving.scheduling.fair import FairQueue, Rate
from teacher_proto.errors import EngineDeadError, EngineError, EngineMemoryError, OverloadedError
from teacher_proto.requests import Query, TargetSpec
from teacher_proto.targets import TokenTargets
from teacher_service.engines.scripted import Script, ScriptedEngine

SPEC = TargetSpec(("top_k",), 8, (2.0,))


def job(*tokens: int, spec: TargetSpec = SPEC, rows: tuple[int, int] | None = None,
        ids_RG: np.ndarray | None = None) -> Job[Query]:  # fmt: skip
    return Job(Query(np.array(tokens, dtype=np.int64), rows or (0, len(tokens)), spec, ids_RG), "r")


def make(
    script: Script | None = None, window: int = 10_000, **bounds: Any
) -> tuple[Coalescer[Query, TokenTargets], ScriptedEngine, list[EngineDeadError]]:
    engine, deaths = ScriptedEngine(script), []
    queue = FairQueue(window)
    answers = Coalescer(engine.score, queue, Rate(), Metrics(), deaths.append, **bounds)
    return answers, engine, deaths


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0)


async def test_identical_sequences_in_flight_are_computed_once_and_answered_to_all() -> None:
    answers, engine, _ = make(Script(delay_s=0.05))
    results = await asyncio.gather(*(answers.answer(job(1, 2, 3), client) for client in "abcd" * 4))
    assert engine.jobs_started == 1 and answers.in_flight == 0
    assert all(result is results[0] for result in results)


@pytest.mark.parametrize(
    "other",
    [job(1, 2, 4), job(1, 2), job(1, 2, 3, rows=(1, 3)), job(1, 2, 3, spec=replace(SPEC, top_k=9)),
     job(1, 2, 3, spec=replace(SPEC, temperatures=(3.0,))), job(1, 2, 3, spec=TargetSpec(("score",))),
     job(1, 2, 3, spec=TargetSpec(("gather",)), ids_RG=np.array([[1], [2], [3]]))],
)  # fmt: skip
async def test_what_differs_in_anything_is_not_coalesced(other: Job[Query]) -> None:
    answers, engine, _ = make(Script(delay_s=0.02))
    await asyncio.gather(answers.answer(job(1, 2, 3), "a"), answers.answer(other, "a"))
    assert engine.jobs_started == 2


async def test_gathers_of_different_ids_are_not_coalesced() -> None:
    answers, engine, _ = make(Script(delay_s=0.02))
    spec = TargetSpec(("gather",))
    jobs = [job(1, spec=spec, ids_RG=np.array([[i]])) for i in (5, 6, 5)]
    first, second, third = await asyncio.gather(*(answers.answer(one, "a") for one in jobs))
    assert engine.jobs_started == 2 and third is first
    assert first.gather_logprobs != second.gather_logprobs


async def test_who_asks_later_is_answered_from_bounded_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(coalescer_module, "RECENT_BYTES", 20_000)  # four short answers
    answers, engine, _ = make()
    first = await answers.answer(job(1, 2, 3), "a")
    assert await answers.answer(job(1, 2, 3), "b") is first and engine.jobs_started == 1
    for number in range(10):
        await answers.answer(job(1, number + 10), "a")
    assert len(answers._in_flight) == len(answers._recent) == 4 and answers.in_flight == 0
    await answers.answer(job(1, 2, 3), "b")
    assert engine.jobs_started == 12


async def test_the_first_may_leave_and_the_others_are_still_answered() -> None:
    answers, engine, _ = make(Script(delay_s=0.1))
    first = asyncio.create_task(answers.answer(job(1, 2), "a"))
    await until(lambda: engine.jobs_started == 1)
    second = asyncio.create_task(answers.answer(job(1, 2), "b"))
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).num_rows == 2
    assert engine.jobs_started == engine.jobs_finished == 1 and first.cancelled()


async def test_what_was_begun_is_finished_when_all_have_left_and_found_by_who_asks_again() -> None:
    answers, engine, _ = make(Script(delay_s=0.1))
    waiting = [asyncio.create_task(answers.answer(job(1, 2), s)) for s in "ab"]
    await until(lambda: engine.jobs_started == 1)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert answers.in_flight == 1 and answers._queue.running == 2
    while_it_runs = asyncio.create_task(answers.answer(job(1, 2), "c"))
    await asyncio.sleep(0)
    while_it_runs.cancel()
    await until(lambda: engine.jobs_finished == 1)
    await until(lambda: answers.unread_bytes > 0)
    assert (await answers.answer(job(1, 2), "c")).num_rows == 2 and answers.unread_bytes == 0
    assert (engine.jobs_started, engine.jobs_aborted, engine.tokens_computed) == (1, 0, 2)


async def test_what_never_began_is_dropped_when_all_have_left() -> None:
    answers, engine, _ = make(Script(hang_token=1), window=2)
    waiting = [asyncio.create_task(answers.answer(job(n, n), "a")) for n in (1, 2)]
    await until(lambda: engine.jobs_started == 1)
    waiting[1].cancel()
    await until(lambda: answers.in_flight == 1)
    assert answers._queue.waiting_tokens == 0 and engine.jobs_started == 1
    answers.abort(OverloadedError("the end"))


async def test_what_nobody_asks_for_again_is_bounded_in_bytes_and_time() -> None:
    # Four short answers fit.
    answers, engine, _ = make(Script(delay_s=0.01, hang_token=7), keep_s=2.0, keep_bytes=20_000)
    for number in range(10):
        task = asyncio.create_task(answers.answer(job(1, number + 10), "a"))
        await until(lambda n=number: engine.jobs_started == n + 1)
        task.cancel()
    hung = asyncio.create_task(answers.answer(job(7), "a"))
    await until(lambda: engine.jobs_started == 11)
    hung.cancel()
    await until(lambda: engine.jobs_finished == 10 and answers.unread_bytes > 0)
    assert answers.unread_bytes <= 20_000 and answers._queue.running == 1
    await until(lambda: answers.unread_bytes == 0 and engine.jobs_aborted == 1)
    await until(lambda: answers.in_flight == len(answers._in_flight) == answers._queue.running == 0)


async def test_a_drain_ends_what_nobody_waits_for_and_nothing_else() -> None:
    answers, engine, _ = make(Script(delay_s=0.1))
    left, stays = (asyncio.create_task(answers.answer(job(n), "a")) for n in (1, 2))
    await until(lambda: engine.jobs_started == 2)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    answers.drain()
    assert (await stays).num_rows == 1 and engine.jobs_aborted == 1
    leaves_later = asyncio.create_task(answers.answer(job(3), "a"))
    await until(lambda: engine.jobs_started == 3)
    leaves_later.cancel()
    await until(lambda: engine.jobs_aborted == 2)


async def test_a_fresh_job_is_computed_whatever_is_at_hand() -> None:
    answers, engine, _ = make(Script(delay_s=0.02))
    await answers.answer(job(1, 2), "a")
    fresh = replace(job(1, 2), fresh=True)
    await asyncio.gather(*(answers.answer(fresh, "a") for _ in range(3)))
    assert engine.jobs_finished == 4
    await answers.answer(job(1, 2), "a")
    assert engine.jobs_finished == 4


async def test_an_urgent_job_goes_past_those_that_wait_and_ends_with_its_client() -> None:
    answers, engine, _ = make(Script(hang_token=1, delay_s=0.01), window=4)
    waiting = [asyncio.create_task(answers.answer(job(1, n), "a")) for n in range(2, 9)]
    await until(lambda: engine.jobs_started == 2)
    urgent = replace(job(5, 6, 7), fresh=True, urgent=True)
    assert (await answers.answer(urgent, "b")).num_rows == 3 and answers._queue.running == 4
    hung = asyncio.create_task(answers.answer(replace(job(1), fresh=True, urgent=True), "b"))
    await until(lambda: engine.jobs_started == 4)
    hung.cancel()
    await until(lambda: engine.jobs_aborted == 1)
    assert answers._queue.running == 4
    answers.abort(OverloadedError("the end"))
    assert all(isinstance(r, OverloadedError) for r in await asyncio.gather(*waiting, return_exceptions=True))


async def test_all_that_wait_for_a_failure_get_it_and_the_next_tries_again() -> None:
    answers, engine, _ = make(Script(poison_token=7, delay_s=0.01))
    results = await asyncio.gather(*(answers.answer(job(7), s) for s in "abc"), return_exceptions=True)
    assert all(isinstance(result, EngineError) for result in results) and engine.jobs_started == 1
    with pytest.raises(EngineError):
        await answers.answer(job(7), "a")
    assert engine.jobs_started == 2


async def test_out_of_memory_halves_the_window_and_is_retryable() -> None:
    answers, _, _ = make(Script(oom_token=7), window=1000)
    with pytest.raises(EngineMemoryError) as caught:
        await answers.answer(job(7), "a")
    assert caught.value.status == 503 and caught.value.retryable
    assert answers._queue.window == 500
    for number in range(30):
        await answers.answer(job(1, number + 10), "a")
    assert answers._queue.window == 530


async def test_one_burst_of_failures_halves_the_window_once() -> None:
    answers, _, _ = make(Script(oom_above_tokens=15, delay_s=0.01), window=40)
    results = await asyncio.gather(*(answers.answer(job(*[n + 1] * 10), "a") for n in range(4)), return_exceptions=True)
    assert sum(isinstance(result, EngineMemoryError) for result in results) == 3
    assert answers._queue.window in (20, 21)


async def test_death_is_told_once_met() -> None:
    answers, _, deaths = make(Script(die_token=7))
    with pytest.raises(EngineDeadError):
        await answers.answer(job(7), "a")
    assert len(deaths) == 1


async def test_abort_answers_all_that_wait_and_all_that_come_later() -> None:
    answers, engine, _ = make(Script(hang_token=1), window=2)
    waiting = [asyncio.create_task(answers.answer(job(1, n), "a")) for n in range(5)]
    await until(lambda: engine.jobs_started == 1)
    answers.abort(OverloadedError("the end"))
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, OverloadedError) for result in results)
    with pytest.raises(OverloadedError):
        await answers.answer(job(2), "a")
    assert engine.tokens_running == 0 and answers.in_flight == 0


async def test_work_that_is_aborted_before_it_began_gives_its_turn_back() -> None:
    answers, engine, _ = make(window=4)
    waiting = asyncio.create_task(answers.answer(job(1, 2, 3), "a"))
    await asyncio.sleep(0)
    assert answers._queue.running == 3 and engine.jobs_started == 0
    answers.abort(OverloadedError("the end"))
    with pytest.raises(OverloadedError):
        await waiting
    assert answers._queue.running == 0 and engine.jobs_started == 0


@pytest.mark.parametrize("fault", ["nan", "infinite", "missing_row"])
@pytest.mark.parametrize("kinds", [("top_k",), ("score",)])
async def test_what_is_not_finite_or_not_whole_does_not_leave_the_house(fault: str, kinds: tuple[str, ...]) -> None:
    answers, _, _ = make(Script.model_validate({"corrupt": fault}))
    spec = TargetSpec(kinds=kinds, top_k=8 if "top_k" in kinds else 0)  # type: ignore[arg-type]
    with pytest.raises(EngineError) as caught:
        await answers.answer(job(1, 2, 3, spec=spec), "a")
    assert not caught.value.retryable


async def test_the_last_row_of_a_score_has_no_next_token_and_is_no_fault() -> None:
    answers, _, _ = make()
    targets = await answers.answer(job(1, 2, 3, spec=TargetSpec(("score",))), "a")
    assert targets.next_logprob is not None and np.isnan(targets.next_logprob[-1])
