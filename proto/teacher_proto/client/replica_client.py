"""The base class of the clients: checked records from one service behind one or more URLs, with retries.

`teacher_client.py` and `attention_client.py` derive the two clients from it. `call.py` lists what is retried.
"""

from __future__ import annotations

import ssl
import sys
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Generic, Self

import httpx

from teacher_proto.client.attempts import Attempts, timeouts
from teacher_proto.client.call import Call, ClientStats, Evidence
from teacher_proto.client.exchange import InfoT, Route, fetch_info
from teacher_proto.client.expectation import Canary, Expectation
from teacher_proto.client.replicas import Replica, ReplicaPool, RetryPolicy, Timing, check_urls
from teacher_proto.client.splitting import least_of, merge, split
from teacher_proto.client.waiting import InFlight, Waiting
from teacher_proto.identity import TeacherIdentity
from teacher_proto.request_checks import RequestT
from teacher_proto.wire.responses import RecordT

OnProgress = Callable[[Waiting], None]


class ReplicaClient(Generic[RequestT, RecordT, InfoT]):
    """Client of the replicas of one service. Use it from one event loop. A subclass sets `route`.

    `urls`: root URLs of the replicas. `key`: the bearer key, none if it is empty. `expect`: the identity or fingerprint
    required of every replica; without it, that of the first to respond. `expect_canary`: a canary of an earlier run.
    `verify`: as in httpx. `transport` replaces the network in tests, and `timing` the clock and random numbers.
    """

    route: Route[RequestT, Any, RecordT, InfoT]

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
        roots = check_urls(urls, self.route.noun)
        self._pool: ReplicaPool[InfoT] = ReplicaPool(roots, self._probe, self.policy, self._timing, self.route.noun)
        self._what = f"{self.route.noun} at {', '.join(roots)}"
        self._evidence = Evidence()
        self._in_flight = InFlight(self._timing.now)
        headers = {"accept-encoding": "identity", "user-agent": "stillhouse"}
        if sent := _sendable(key or ""):
            headers["authorization"] = f"Bearer {sent}"
        self._http = httpx.AsyncClient(
            headers=headers, transport=transport, verify=verify, limits=httpx.Limits(max_keepalive_connections=64)
        )
        self._attempts = Attempts(
            self._http, self._pool, self.route, self.policy, self._timing, self.stats, self._in_flight,
            self._check_addressee,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(replica.url for replica in self._pool.replicas)})"

    @property
    def outage_s(self) -> float:
        """For how many seconds no replica has been available, 0 while one is."""
        since = self._pool.down_since
        return 0.0 if since is None else self._timing.now() - since

    async def teacher(self, wait_s: float = 0.0) -> InfoT:
        """The service's description. Probes each replica once, or with `wait_s` waits that long for one to be ready.

        TeacherUnavailableError if no Stillhouse service responds; WrongTeacherError with the difference.
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
        assert replica.info is not None, "a replica that passed its probe has info"
        return replica.info

    async def answers(
        self, request: RequestT, *, deadline_s: float | None = None, given: dict[int, RecordT] | None = None,
        on_progress: OnProgress | None = None,
    ) -> list[RecordT]:  # fmt: skip
        """The record of every sequence, in the order of the sequences. Errors as for `stream`.

        `given` holds records that the caller already has, by index. They are not requested, and new records are added
        to it, so that a call repeated after an error requests only the rest.
        """
        given = {} if given is None else given
        missing = [index for index in range(len(request.sequences)) if index not in given]
        if missing:
            rest = request.select(missing) if len(missing) < len(request.sequences) else request
            async with aclosing(self.stream(rest, deadline_s=deadline_s, on_progress=on_progress)) as stream:
                async for place, record in stream:
                    given[missing[place]] = record
        return [given[index] for index in range(len(request.sequences))]

    async def stream(
        self, request: RequestT, *, deadline_s: float | None = None, on_progress: OnProgress | None = None
    ) -> AsyncGenerator[tuple[int, RecordT], None]:
        """Yield (index, record) once per sequence, as they arrive, in any order. A request beyond what the service
        admits is sent in parts. `on_progress` is called at each record and each progress report of the service.

        RequestError if the request is at fault; WrongTeacherError; PoisonBatchError with the sequences that came back
        invalid in two attempts; TeacherUnavailableError when `deadline_s` passes without progress.
        """
        entry = self._in_flight.begin(request.num_tokens)
        try:
            parts = await self._split(request, deadline_s)
            calls = [
                Call(request.select(part), self.policy, self._timing, deadline_s, self._evidence) for part in parts
            ]
            entry.calls = calls

            def tell() -> None:
                if on_progress is not None:
                    on_progress(self._in_flight.waiting_for(self._what, [entry]))

            async with aclosing(merge([self._attempts.records(call, tell) for call in calls])) as records:
                async for which, (place, record) in records:
                    yield parts[which][place], record
                    tell()
        finally:
            self._in_flight.end(entry)

    def waiting(self) -> Waiting | None:
        """The progress of all requests in flight together, None if there are none. May be called from any thread."""
        return self._in_flight.waiting(self._what, len(self._pool.replicas))

    async def close(self) -> None:
        await self._pool.close()
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _split(self, request: RequestT, deadline_s: float | None) -> list[list[int]]:
        """Indexes of the sequences in each part, which any replica admits. Raises for what none would admit."""
        infos = [replica.info for replica in self._pool.replicas if replica.info is not None]
        if not infos:
            patience_s = self.policy.deadline_s if deadline_s is None else deadline_s
            replica = await self._pool.acquire(self._pool.replicas, (), self._timing.now() + patience_s)
            assert replica.info is not None, "a replica that passed its probe has info"
            infos = [replica.info]
        info = least_of(infos)
        limits = info.limits.model_copy(update={"max_sequences": sys.maxsize, "max_request_tokens": sys.maxsize})
        self.route.check_request(request, info.model_copy(update={"limits": limits}))
        return split(request, info, self.route.cost)

    async def _probe(self, replica: Replica[InfoT]) -> None:
        """Connect or reconnect: fetch the identity, check that it is the expected one, and `_inspect`."""
        self.stats.probes += 1
        patience = timeouts(self.policy, self.policy.probe_timeout_s)
        info = await fetch_info(self._http, replica.url, self.route, patience)
        self._expected.check_identity(info, replica.url)
        await self._inspect(replica, info, patience)
        replica.info = info

    async def _inspect(self, replica: Replica[InfoT], info: InfoT, patience: httpx.Timeout) -> None:
        """A probe's checks beyond the identity. Raises if one fails."""

    def _check_addressee(self, fingerprint: str, info: InfoT, url: str) -> None:
        """Check a replica against the fingerprint that a single request names."""
        self._expected.check_fingerprint(fingerprint, info)


def _sendable(key: str) -> str:
    """The key without the white space that a file or variable ends with. ValueError for one that no header can hold; it
    is not shown, as httpx's error would."""
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError("the API key holds a character that an HTTP header can't: printable ASCII is expected")
    return key
