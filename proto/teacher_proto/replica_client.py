"""What every client does: records from one service behind one or many URLs, checked, in order, whatever happens.

`client.py` makes the teacher's client of it, `attention_client.py` the attention service's. What is retried and what is
not is written down in `call.py`.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Generic, Self

import httpx

from teacher_proto.call import Call, ClientStats
from teacher_proto.canary import Canary
from teacher_proto.dialect import Dialect, InfoT, RequestT
from teacher_proto.errors import (
    StillhouseError,
    TeacherUnavailableError,
    WireError,
    WrongTeacherError,
)
from teacher_proto.exchange import exchange, fetch_info
from teacher_proto.expectation import Expectation
from teacher_proto.identity import TeacherIdentity
from teacher_proto.replicas import Replica, ReplicaPool
from teacher_proto.retry import RetryBudget, RetryPolicy, Timing
from teacher_proto.waiting import Waiting
from teacher_proto.wire_answer import RecordT


class ReplicaClient(Generic[RequestT, RecordT, InfoT]):
    """Asks replicas of one service. Use it from one event loop. A subclass sets `dialect`.

    `urls`: roots of the replicas. `key`: the bearer key. `expect`: the identity or fingerprint that must answer;
    without it the first one met is expected of all others. `expect_canary`: a canary of an earlier run.
    `verify`: as httpx's. `transport` replaces the network, for tests; `timing` its clock and chance.
    """

    dialect: Dialect[RequestT, Any, RecordT, InfoT]

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
        roots = _roots(urls, self.dialect.noun)
        self._pool: ReplicaPool[InfoT] = ReplicaPool(roots, self._probe, self.policy, self._timing, self.dialect.noun)
        self._calls: set[Call[RequestT]] = set()
        self._budget = RetryBudget(self.policy, self._timing)
        headers = {"accept-encoding": "identity", "user-agent": "stillhouse"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        self._http = httpx.AsyncClient(
            headers=headers, transport=transport, verify=verify, limits=httpx.Limits(max_keepalive_connections=64)
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(replica.url for replica in self._pool.replicas)})"

    @property
    def outage_s(self) -> float:
        """For how long no replica could be asked, 0 while one can."""
        since = self._pool.down_since
        return 0.0 if since is None else self._timing.now() - since

    async def teacher(self, wait_s: float = 0.0) -> InfoT:
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

    async def answers(self, request: RequestT, *, deadline_s: float | None = None) -> list[RecordT]:
        """The records of every sequence, in the order of the sequences. Errors as `stream`."""
        async with aclosing(self.stream(request, deadline_s=deadline_s)) as stream:
            answers = {index: targets async for index, targets in stream}
        return [answers[i] for i in range(len(request.sequences))]

    async def stream(
        self, request: RequestT, *, deadline_s: float | None = None
    ) -> AsyncGenerator[tuple[int, RecordT], None]:
        """(index, record) of each sequence once, as they come, in any order.

        RequestError if the request is at fault; WrongTeacherError; PoisonBatchError with the sequences that two
        attempts answered with nonsense; TeacherUnavailableError when the deadline passes.
        """
        call = Call(request, self.policy, self._timing, deadline_s)
        ranked = self._pool.ranked(call.key)
        self._budget.note_call()
        self.stats.calls += 1
        self._calls.add(call)
        try:
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
        finally:
            self._calls.discard(call)

    def waiting(self) -> Waiting | None:
        """How far all calls under way are together; None where there is none. From any thread."""
        what = f"{self.dialect.noun} at {', '.join(replica.url for replica in self._pool.replicas)}"
        calls = [call.waiting(what) for call in list(self._calls)]
        if not calls:
            return None
        return Waiting(
            what,
            tokens_done=sum(call.tokens_done for call in calls),
            tokens=sum(call.tokens for call in calls),
            silent_s=min(call.silent_s for call in calls),
        )

    async def close(self) -> None:
        await self._pool.close()
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _attempt(
        self, call: Call[RequestT], replica: Replica[InfoT]
    ) -> AsyncGenerator[tuple[int, RecordT], None]:
        """Ask one replica for what is missing. Raises the first error, after what came beside it."""
        info = replica.info
        assert info is not None, "a replica whose probe has passed is known"
        if call.request.fingerprint is not None:
            self._check_addressee(call.request.fingerprint, info, replica.url)
        self.dialect.check_request(call.request, info)
        asked = sorted(call.missing)
        request = call.request.select(asked).model_copy(update={"fingerprint": info.fingerprint})
        call.begin(replica)
        self.stats.attempts += 1
        failure: StillhouseError | None = None
        timeout = self._timeout(min(self.policy.read_timeout_s, max(call.remaining_s, 0.001)))
        outcomes = self._exchange(replica, request, info, timeout, lambda size: self._on_chunk(call, size))
        async with aclosing(outcomes):
            async for place, outcome in outcomes:
                if isinstance(outcome, StillhouseError):
                    failure = failure if failure is not None and not failure.retryable else outcome
                    continue
                call.answered(asked[place])
                self._pool.succeeded(replica)
                yield asked[place], outcome
        if failure is not None:
            raise failure

    def _after_failure(self, call: Call[RequestT], replica: Replica[InfoT], error: StillhouseError) -> None:
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

    async def _pause(self, call: Call[RequestT]) -> None:
        """Before a replica hears this call again: the backoff, then the budget's leave."""
        delay = self._timing.full_jitter(call.attempts - 1, self.policy.backoff_base_s, self.policy.backoff_cap_s)
        await self._timing.sleep(min(delay, max(call.remaining_s, 0.0)))
        while (wait_s := self._budget.wait_s()) > 0 and call.remaining_s > 0:
            self.stats.budget_waits += 1
            pace = self._timing.random.uniform(0.5, 1.0) * self.policy.backoff_cap_s
            await self._timing.sleep(min(wait_s, pace, call.remaining_s))

    async def _probe(self, replica: Replica[InfoT]) -> None:
        """Connect or reconnect: who is it, is it who we expect, does it compute what it did."""
        self.stats.probes += 1
        timeout = self._timeout(self.policy.probe_timeout_s)
        info = await fetch_info(self._http, replica.url, self.dialect, timeout)
        self._expected.check_identity(info, replica.url)
        await self._inspect(replica, info, timeout)
        replica.info = info

    async def _inspect(self, replica: Replica[InfoT], info: InfoT, timeouts: httpx.Timeout) -> None:
        """What a probe looks at beyond the identity. Raises what speaks against this replica."""

    def _check_addressee(self, fingerprint: str, info: InfoT, url: str) -> None:
        """Hold a replica against the fingerprint that a single request names."""
        self._expected.check_fingerprint(fingerprint, info)

    def _exchange(
        self, replica: Replica[InfoT], request: RequestT, info: InfoT, timeout: httpx.Timeout,
        on_chunk: Callable[[int], None] = lambda n: None,
    ) -> AsyncGenerator[tuple[int, RecordT | StillhouseError], None]:  # fmt: skip
        return exchange(self._http, replica.url, self.dialect, request, info, timeout, on_chunk)

    def _on_chunk(self, call: Call[RequestT], size: int) -> None:
        self.stats.bytes_received += size
        call.heard_at = self._timing.now()
        if call.remaining_s <= 0:
            raise TeacherUnavailableError(f"the answer was still coming when its {call.deadline_s} s were over")

    def _timeout(self, read_s: float) -> httpx.Timeout:
        return httpx.Timeout(read_s, connect=min(self.policy.connect_timeout_s, read_s))


def _roots(urls: str | Sequence[str], noun: str) -> list[str]:
    """The replicas' roots, checked: http or https, a host, once each."""
    roots = [url.strip().rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
    if not roots:
        raise ValueError(f"no {noun} URL was given; one like http://localhost:8000 is expected")
    for root in roots:
        try:
            url = httpx.URL(root)
        except httpx.InvalidURL as error:
            raise ValueError(f"{noun} URL {root!r}: {error}") from None
        if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
            raise ValueError(f"{noun} URL {root!r}: http://HOST:PORT or https://HOST is expected")
    if len(set(roots)) != len(roots):
        raise ValueError(f"a {noun} URL is given twice: {', '.join(roots)}")
    return roots
