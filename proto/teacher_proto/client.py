"""`TeacherClient`: targets from one teacher behind one or many URLs, checked, in order, whatever happens on the way.

    async with TeacherClient(["http://teacher-0:8000", "http://teacher-1:8000"], key="...") as client:
        info = await client.teacher()
        targets = await client.targets(TargetsRequest(sequences=[[1, 2, 3]], top_k=64, temperatures=[2.0]))

Used by the trainer's remote targets and by anybody else's; `sync_client.py` is the same for scripts. What is retried
and what is not is written down in `call.py`.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType

import httpx

from teacher_proto.call import Call, ClientStats
from teacher_proto.canary import Canary, canary_request, read_canary
from teacher_proto.errors import (
    StillhouseError,
    TeacherUnavailableError,
    WireError,
    WrongTeacherError,
)
from teacher_proto.exchange import exchange, fetch_info
from teacher_proto.expectation import Expectation
from teacher_proto.identity import TeacherIdentity
from teacher_proto.info import TeacherInfo
from teacher_proto.replicas import Replica, ReplicaPool
from teacher_proto.requests import TargetsRequest, check_request
from teacher_proto.retry import RetryBudget, RetryPolicy, Timing
from teacher_proto.targets import TokenTargets


class TeacherClient:
    """Asks replicas of one teacher for targets. Use it from one event loop.

    `urls`: roots of the replicas. `key`: the bearer key. `expect`: the identity or fingerprint that must answer;
    without it the first teacher met is expected of all others. `expect_canary`: a canary of an earlier run.
    `verify`: as httpx's. `transport` replaces the network, for tests; `timing` its clock and chance.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        key: str | None = None,
        expect: TeacherIdentity | str | None = None,
        expect_canary: Canary | None = None,
        canary_tolerance: float | None = None,
        refuse_numeric_change: bool = False,
        policy: RetryPolicy | None = None,
        verify: ssl.SSLContext | bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
        timing: Timing | None = None,
    ):
        self.policy = policy or RetryPolicy()
        self.stats = ClientStats()
        self._timing = timing or Timing()
        self._expected = Expectation(expect, expect_canary, canary_tolerance, refuse_numeric_change, self.stats)
        self._pool = ReplicaPool(_roots(urls), self._probe, self.policy, self._timing)
        self._budget = RetryBudget(self.policy, self._timing)
        headers = {"accept-encoding": "identity", "user-agent": "stillhouse"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        self._http = httpx.AsyncClient(
            headers=headers, transport=transport, verify=verify, limits=httpx.Limits(max_keepalive_connections=64)
        )

    def __repr__(self) -> str:
        return f"TeacherClient({', '.join(replica.url for replica in self._pool.replicas)})"

    @property
    def outage_s(self) -> float:
        """For how long no replica could be asked, 0 while one can."""
        since = self._pool.down_since
        return 0.0 if since is None else self._timing.now() - since

    @property
    def canary(self) -> Canary | None:
        """What the fixed sequences were answered with: to be kept with a run and given to its next client."""
        return self._expected.canary

    async def teacher(self, wait_s: float = 0.0) -> TeacherInfo:
        """Who the teacher is. Probes each replica once; with `wait_s` waits that long for one to be ready.

        TeacherUnavailableError if nobody, or something else, answers; WrongTeacherError with the difference.
        """
        if wait_s > 0:
            deadline = self._timing.now() + wait_s
            replica = await self._pool.acquire(self._pool.replicas, (), deadline)
        else:
            await self._pool.probe_all()
            replicas = self._pool.replicas
            refused = next((r.refused for r in replicas if r.refused is not None), None)
            if refused is not None:
                raise refused
            ready = [r for r in replicas if not r.is_open]
            if not ready:
                errors = [r.last_error for r in replicas if r.last_error is not None]
                raise errors[0] if len(errors) == 1 else self._pool.unavailable(0.0)
            replica = ready[0]
        assert replica.info is not None, "a replica whose probe has passed is known"
        return replica.info

    async def targets(self, request: TargetsRequest, *, deadline_s: float | None = None) -> list[TokenTargets]:
        """The targets of every sequence, in the order of the sequences. Errors as `stream`."""
        async with aclosing(self.stream(request, deadline_s=deadline_s)) as stream:
            answers = {index: targets async for index, targets in stream}
        return [answers[i] for i in range(len(request.sequences))]

    async def stream(
        self, request: TargetsRequest, *, deadline_s: float | None = None
    ) -> AsyncGenerator[tuple[int, TokenTargets], None]:
        """(index, targets) of each sequence once, as they come, in any order.

        RequestError if the request is at fault; WrongTeacherError; PoisonBatchError with the sequences that two
        attempts answered with nonsense; TeacherUnavailableError when the deadline passes.
        """
        call = Call(request, self.policy, self._timing, deadline_s)
        ranked = self._pool.ranked(call.key)
        self._budget.note_call()
        self.stats.calls += 1
        while call.missing:
            replica = await self._pool.acquire(ranked, call.tried, call.deadline)
            if replica in call.tried:
                await self._pause(call)
                replica = await self._pool.acquire(ranked, call.tried, call.deadline)
            try:
                async with aclosing(self._attempt(call, replica)) as answers:
                    async for index, targets in answers:
                        yield index, targets
            except StillhouseError as error:
                self._after_failure(call, replica, error)

    async def close(self) -> None:
        await self._pool.close()
        await self._http.aclose()

    async def __aenter__(self) -> TeacherClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _attempt(self, call: Call, replica: Replica) -> AsyncGenerator[tuple[int, TokenTargets], None]:
        """Ask one replica for what is missing. Raises the first error, after what came beside it."""
        info = replica.info
        assert info is not None, "a replica whose probe has passed is known"
        if call.request.fingerprint is not None:
            self._expected.check_fingerprint(call.request.fingerprint, info)
        check_request(call.request, info.limits, info.kinds)
        asked = sorted(call.missing)
        request = call.request.select(asked).model_copy(update={"fingerprint": info.fingerprint})
        call.begin(replica)
        self.stats.attempts += 1
        failure: StillhouseError | None = None
        timeout = self._timeout(min(self.policy.read_timeout_s, max(call.remaining_s, 0.001)))
        async with aclosing(
            exchange(self._http, replica.url, request, info, timeout, lambda size: self._on_chunk(call, size))
        ) as outcomes:
            async for place, outcome in outcomes:
                if isinstance(outcome, StillhouseError):
                    failure = failure if failure is not None and not failure.retryable else outcome
                    continue
                call.missing.discard(asked[place])
                self._pool.succeeded(replica)
                yield asked[place], outcome
        if failure is not None:
            raise failure

    def _after_failure(self, call: Call, replica: Replica, error: StillhouseError) -> None:
        """Book the failure on the replica and the call; raises where the call ends with it."""
        self.stats.count(error)
        hangs = isinstance(error.__cause__, httpx.ReadTimeout)
        if isinstance(error, WrongTeacherError) or hangs:
            # Two more calls that wait for one that hangs would cost two more read timeouts; a probe tells sooner.
            replica.last_error = error
            self._pool.open(replica)
        elif isinstance(error, (TeacherUnavailableError, WireError)):
            self._pool.failed(replica, error)
        elif error.status in (429, 503):
            self._pool.busy(replica, error, call.attempts)
        call.judge(replica, error)

    async def _pause(self, call: Call) -> None:
        """Before a replica hears this call again: the backoff, then the budget's leave."""
        delay = self._timing.full_jitter(call.attempts - 1, self.policy.backoff_base_s, self.policy.backoff_cap_s)
        await self._timing.sleep(min(delay, max(call.remaining_s, 0.0)))
        while (wait_s := self._budget.wait_s()) > 0 and call.remaining_s > 0:
            self.stats.budget_waits += 1
            pace = self._timing.random.uniform(0.5, 1.0) * self.policy.backoff_cap_s
            await self._timing.sleep(min(wait_s, pace, call.remaining_s))

    async def _probe(self, replica: Replica) -> None:
        """Connect or reconnect: who is it, is it who we expect, does it compute what it did."""
        self.stats.probes += 1
        timeout = self._timeout(self.policy.probe_timeout_s)
        info = await fetch_info(self._http, replica.url, timeout)
        self._expected.check_identity(info, replica.url)
        request = canary_request(info)
        if request is not None:
            answers: dict[int, TokenTargets] = {}
            async with aclosing(exchange(self._http, replica.url, request, info, timeout)) as outcomes:
                async for index, outcome in outcomes:
                    if isinstance(outcome, StillhouseError):
                        raise outcome
                    answers[index] = outcome
            self._expected.check_canary(read_canary([answers[i] for i in range(len(answers))]), info, replica.url)
        replica.info = info

    def _on_chunk(self, call: Call, size: int) -> None:
        self.stats.bytes_received += size
        if call.remaining_s <= 0:
            raise TeacherUnavailableError(f"the answer was still coming when its {call.deadline_s} s were over")

    def _timeout(self, read_s: float) -> httpx.Timeout:
        return httpx.Timeout(read_s, connect=min(self.policy.connect_timeout_s, read_s))


def _roots(urls: str | Sequence[str]) -> list[str]:
    """The replicas' roots, checked: http or https, a host, once each."""
    roots = [url.strip().rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
    if not roots:
        raise ValueError("no teacher URL was given; one like http://localhost:8000 is expected")
    for root in roots:
        try:
            url = httpx.URL(root)
        except httpx.InvalidURL as error:
            raise ValueError(f"teacher URL {root!r}: {error}") from None
        if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
            raise ValueError(f"teacher URL {root!r}: http://HOST:PORT or https://HOST is expected")
    if len(set(roots)) != len(roots):
        raise ValueError(f"a teacher URL is given twice: {', '.join(roots)}")
    return roots
