"""More work than the teacher can do: who is let in, who shares how, what fails alone, when to come again."""

from __future__ import annotations

import asyncio
import time

import httpx
import psutil
import pytest

from tests.chaos.crowd import Crowd, ask, crowd, crowd_process, gauge, percentile, request_body, until_gauge
from tests.teacher_process import TeacherProcess

KEYS = {name: f"{name}-key-0123456789abcdef" for name in ("flood", "polite", "calm", "late")}
KEYS_FILE = "\n".join(f"{name} {key}" for name, key in KEYS.items())


@pytest.mark.parametrize("seconds", [8, pytest.param(60, marks=pytest.mark.slow)])
async def test_overload_is_refused_at_once_and_a_polite_client_keeps_its_share(seconds: float) -> None:
    # Eight requests of 50 tokens side by side, 0.4 s each: 20 a second. The flood asks ten times as much.
    slot = 50 * 9
    with TeacherProcess(
        "--capacity", str(16 * slot), "--window", "400", "--log-level", "error", keys=KEYS_FILE,
        script={"delay_s": 0.4},
    ) as teacher:  # fmt: skip
        process = psutil.Process(teacher.pid)
        alone = await Crowd(teacher.url, 1, 3, KEYS["polite"], seed=1).run()
        before = process.memory_info().rss
        polite, flood = await asyncio.gather(
            crowd_process(Crowd(teacher.url, 5, seconds, KEYS["polite"], seed=2)),
            crowd_process(Crowd(teacher.url, 36, seconds, KEYS["flood"], seed=3, pause_s=0.17)),
        )
        grown = (process.memory_info().rss - before) / 2**20
        async with httpx.AsyncClient(base_url=teacher.url, headers=_key("calm")) as client:
            assert await gauge(client, "queue_tokens") == 0 and await gauge(client, "admitted_cost") == 0
    everything = polite + flood
    assert {outcome.status for outcome in everything} <= {200, 429, 503}
    refused = [outcome for outcome in everything if outcome.status != 200]
    assert all(outcome.retry_after and outcome.retry_after >= 1 for outcome in refused)
    served, flooded = (sum(outcome.whole for outcome in some) for some in (polite, flood))
    unloaded, crowded = (percentile([o.seconds for o in some if o.status == 200], 0.99) for some in (alone, everything))
    print(f"{len(everything) / seconds:.0f} requests/s, {len(refused)} of {len(everything)} refused, p99 "
          f"{1000 * percentile([o.seconds for o in refused], 0.99):.0f} ms; p99 of accepted {1000 * crowded:.0f} ms, "
          f"alone {1000 * unloaded:.0f} ms; memory + {grown:.1f} MiB; the polite client got "
          f"{served / (served + flooded):.0%}")  # fmt: skip
    assert refused and grown < 50
    # Half is fair between two; 36 connections against 5 get the flood no more.
    assert served / (served + flooded) >= 0.4


async def test_queue_time_is_shared_by_tokens_whatever_the_sizes_and_connections() -> None:
    with TeacherProcess(
        "--window", "300", "--log-level", "error", keys=KEYS_FILE, script={"tokens_per_second": 8000}
    ) as teacher:
        end = time.monotonic() + 8
        sizes = {"flood": (64, 20), "polite": (4, 250), "calm": (8, 100), "late": (6, 60)}
        runs = [
            crowd(teacher.url, connections, lambda n, i=i, t=tokens: request_body(t, seed=i * 10**7 + n),
                  lambda: time.monotonic() > end, KEYS[name])
            for i, (name, (connections, tokens)) in enumerate(sizes.items())
        ]  # fmt: skip
        results = dict(zip(sizes, await asyncio.gather(*runs), strict=True))
    # What ends later has no competition any more.
    in_time = {name: sum(o.whole and o.started + o.seconds <= end for o in results[name]) for name in sizes}
    tokens = {name: in_time[name] * sizes[name][1] for name in sizes}
    shares = {name: count / sum(tokens.values()) for name, count in tokens.items()}
    print("shares of tokens:", ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    assert all(0.20 < share < 0.30 for share in shares.values())


async def test_retry_after_is_the_time_the_queue_takes() -> None:
    with TeacherProcess("--capacity", str(9 * 6000), script={"tokens_per_second": 1000}) as teacher:
        async with httpx.AsyncClient(base_url=teacher.url, timeout=60) as client:
            for n in range(6):
                assert (await ask(client, request_body(500, seed=n))).whole
            waiting = [asyncio.create_task(ask(client, request_body(1000, seed=100 + n))) for n in range(6)]
            await until_gauge(client, "admitted_tokens", lambda value: value >= 6000)
            refused = await ask(client, request_body(1000, seed=200))
            assert refused.status == 503 and refused.retry_after is not None
            print(f"Retry-After {refused.retry_after:.0f} s with 6 s of work inside")
            assert 3 <= refused.retry_after <= 12
            for task in waiting:
                task.cancel()


async def test_one_poisonous_sequence_fails_alone() -> None:
    with TeacherProcess(script={"poison_token": 0, "delay_s": 0.05}) as teacher:
        async with httpx.AsyncClient(base_url=teacher.url, timeout=30) as client:
            bodies = [request_body(30, seed=n, first=0 if n == 5 else 1) for n in range(10)]
            outcomes = await asyncio.gather(*(ask(client, body) for body in bodies))
            assert [outcome.status for outcome in outcomes] == [500 if n == 5 else 200 for n in range(10)]
            mixed = await client.post("/v1/targets", json={"sequences": [[1, 2], [0, 1], [3]], "top_k": 2})
        found = mixed.json()["sequences"]
        assert mixed.status_code == 200 and [one.get("error", {}).get("code") for one in found] == [
            None, "engine_failed", None,
        ]  # fmt: skip


async def test_out_of_memory_fails_what_does_not_fit_and_the_rest_goes_on_in_smaller_parts() -> None:
    with TeacherProcess("--window", "4000", script={"oom_above_tokens": 1000, "delay_s": 0.05}) as teacher:
        async with httpx.AsyncClient(base_url=teacher.url, timeout=30) as client:
            first = await asyncio.gather(*(ask(client, request_body(200, seed=n)) for n in range(20)))
            started = time.monotonic()
            failed = [outcome for outcome in first if outcome.status != 200]
            assert failed and all(outcome.status == 503 and outcome.retry_after for outcome in failed)
            assert b"engine_out_of_memory" in failed[0].body
            attempts = 0
            while failed:
                failed = [o for o in await asyncio.gather(
                    *(ask(client, request_body(200, seed=1000 * attempts + n)) for n in range(20))
                ) if o.status != 200]  # fmt: skip
                attempts += 1
                assert attempts < 20
            took, window = time.monotonic() - started, await gauge(client, "engine_window_tokens")
            print(f"{sum(o.status != 200 for o in first)} of 20 failed; all succeed {took:.2f} s later, with a window "
                  f"of {window:.0f} of 4000")  # fmt: skip
            assert await gauge(client, "engine_window_tokens") < 4000
            assert (await client.get("/health/ready")).status_code == 200


async def test_four_clients_over_the_same_data_cost_one_forward_pass() -> None:
    with TeacherProcess(keys=KEYS_FILE, script={"tokens_per_second": 20_000}) as teacher:
        bodies = [request_body(100, seed=n, sequences=4) for n in range(30)]

        async def client(key: str) -> None:
            async with httpx.AsyncClient(base_url=teacher.url, timeout=60) as client:
                for start in range(0, 30, 6):
                    some = await asyncio.gather(*(ask(client, body, key) for body in bodies[start : start + 6]))
                    assert all(outcome.whole and outcome.targets == 4 for outcome in some)

        async with asyncio.TaskGroup() as group:
            for key in KEYS.values():
                group.create_task(client(key))
        async with httpx.AsyncClient(base_url=teacher.url, headers=_key("calm")) as client:
            status = (await client.get("/v1/status")).json()
    computed = status["sources"]["engine"] / (30 * 4 * 100)
    print(f"four clients over the same data: {computed:.2f} forward passes")
    assert computed == 1.0 and sum(status["sources"].values()) == 4 * 30 * 4 * 100


def _key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}
