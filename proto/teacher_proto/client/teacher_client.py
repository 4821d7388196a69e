"""`TeacherClient`: checked targets, in order, from one teacher behind one or more URLs, with retries.

    async with TeacherClient(["http://teacher-0:8000", "http://teacher-1:8000"], key="...") as client:
        info = await client.teacher()
        targets = await client.targets(TargetsRequest(sequences=[[1, 2, 3]], top_k=64, temperatures=[2.0]))

Used by the trainer's remote targets and by third-party trainers; `sync_client.py` is the blocking version for scripts.
The base class in `replica_client.py` does most of the work.
"""

from __future__ import annotations

import base64
import hashlib
import re
from contextlib import aclosing

import httpx

from teacher_proto.client.attempts import timeouts
from teacher_proto.client.exchange import AnyRoute, Route, error_of, exchange, open_response, plain_body
from teacher_proto.client.expectation import Canary, canary_request, read_canary
from teacher_proto.client.replica_client import OnProgress, ReplicaClient
from teacher_proto.client.replicas import Replica
from teacher_proto.errors import StillhouseError, TruncatedError, WireError, WrongTeacherError
from teacher_proto.info import HIDDEN_WIDTH, TeacherInfo
from teacher_proto.requests import TargetsRequest, check_request
from teacher_proto.targets import TokenTargets, check_targets
from teacher_proto.wire.records import TARGETS_FORMAT, Header

# Consecutive rounds over all replicas without another byte of the head, after which the download is given up.
_HEAD_TRIES = 4
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_SHA256 = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]+):")


def _check_header(header: Header, request: TargetsRequest, info: TeacherInfo) -> None:
    spec = request.spec
    told = (header.vocab_size, header.top_k, header.temperatures)
    if told != (expected := (info.limits.vocab_size, spec.top_k, spec.temperatures)):
        raise WireError(f"the response header gives vocabulary, top_k and temperatures {told}, expected {expected}")


TARGETS = Route(
    noun="teacher",
    command="stillhouse-teacher",
    path="/v1/targets",
    answers=TARGETS_FORMAT,
    info=TeacherInfo,
    check_request=lambda request, info: check_request(request, info.limits, info.kinds),
    check_header=_check_header,
    check_record=lambda targets, request, index, info: check_targets(
        targets, request.query(index), info.limits.vocab_size
    ),
    cost=lambda request, info: request.cost(info.hidden_width or HIDDEN_WIDTH),
)


class TeacherClient(ReplicaClient[TargetsRequest, TokenTargets, TeacherInfo]):
    """Client of the replicas of one teacher. Arguments as for `ReplicaClient`; use it from one event loop."""

    route = TARGETS

    @property
    def canary(self) -> Canary | None:
        """The logprobs of the fixed sequences, to be kept with a run and given to its next client."""
        return self._expected.canary

    async def targets(
        self, request: TargetsRequest, *, deadline_s: float | None = None,
        given: dict[int, TokenTargets] | None = None, on_progress: OnProgress | None = None,
    ) -> list[TokenTargets]:  # fmt: skip
        """The targets of every sequence, in the order of the sequences. Arguments as for `answers`, errors as for
        `stream`."""
        return await self.answers(request, deadline_s=deadline_s, given=given, on_progress=on_progress)

    async def head(self) -> bytes:
        """The teacher's output head as the safetensors file of `GET /v1/head`, from the first replica that gives it.

        An interrupted transfer is resumed, at this replica or the next, as long as it makes progress.
        NotFoundError if the teacher serves no hidden states; WrongTeacherError; TeacherUnavailableError.
        """
        await self.teacher()
        download, fruitless = _HeadDownload(), 0
        while True:
            before = download.size
            failure: StillhouseError | None = None
            for url, info in [(replica.url, replica.info) for replica in self._pool.replicas]:
                if info is None:
                    continue
                patience = timeouts(self.policy, self.policy.read_timeout_s)
                try:
                    return await _fetch_head(self._http, url, self.route, info.fingerprint, patience, download)
                except StillhouseError as error:
                    # Prefer an error that a retry may fix to one that it can't.
                    if failure is None or (error.retryable and not failure.retryable):
                        failure = error
            fruitless = 0 if download.size > before else fruitless + 1
            assert failure is not None, "a replica that passed its probe has info"
            if not failure.retryable or fruitless >= _HEAD_TRIES:
                raise failure
            await self._wait_before_head(failure, fruitless)

    async def _wait_before_head(self, failure: StillhouseError, attempt: int) -> None:
        backoff = self._timing.full_jitter(attempt, self.policy.backoff_base_s, self.policy.backoff_cap_s)
        await self._timing.sleep(min(max(backoff, failure.retry_after or 0.0), self.policy.max_retry_after_s))

    async def _inspect(self, replica: Replica[TeacherInfo], info: TeacherInfo, patience: httpx.Timeout) -> None:
        """Check the canary."""
        request = canary_request(info)
        if request is None:
            return
        answers: dict[int, TokenTargets] = {}
        outcomes = exchange(self._http, replica.url, self.route, request, info, patience)
        async with aclosing(outcomes):
            async for index, outcome in outcomes:
                if isinstance(outcome, StillhouseError):
                    raise outcome
                answers[index] = outcome
        self._expected.check_canary(read_canary([answers[i] for i in range(len(answers))]), info, replica.url)


class _HeadDownload:
    """A resumable download of the teacher's output head: the first `size` bytes of a file of `total` bytes. What has
    arrived is kept when a connection breaks, and `_fetch_head` requests the rest with `Range`, so that a gigabyte is
    not sent twice.
    """

    def __init__(self) -> None:
        self.size = 0
        self.total: int | None = None
        self._etag: str | None = None
        self._sha256: bytes | None = None
        self._chunks: list[bytes] = []

    def headers(self) -> dict[str, str]:
        """Headers of the next request: for the rest of the file if its beginning has come, with an entity tag."""
        if not self.size or self._etag is None:
            return {}
        return {"range": f"bytes={self.size}-", "if-range": self._etag}

    def begin(self, response: httpx.Response) -> None:
        """Start reading a response: 206 continues the file, 200 starts over. WireError for another range or file."""
        headers = response.headers
        if response.status_code == 206:
            place = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
            if place is None or int(place[1]) != self.size or headers.get("etag") != self._etag:
                size, etag = self.size, self._etag
                self.forget()
                raise WireError(
                    f"requested the rest of the teacher's head from byte {size} of {etag}, got "
                    f"{headers.get('content-range', 'no range')!r} of {headers.get('etag', 'no etag')}"
                )
            return
        self.forget()
        self._etag = headers.get("etag")
        length = headers.get("content-length", "")
        self.total = int(length) if length.isdigit() else None
        told = _SHA256.search(headers.get("repr-digest", ""))
        self._sha256 = base64.b64decode(told[1]) if told is not None else None

    def take(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self.size += len(chunk)

    def forget(self) -> None:
        self.__init__()  # type: ignore[misc]

    def whole(self) -> bytes:
        """The complete file. TruncatedError if its end is missing: what has arrived is kept. WireError if its sha256 is
        wrong: everything is discarded. Older teachers send no sha256."""
        if self.total is not None and self.size != self.total:
            got, total = self.size, self.total
            if got > total:
                self.forget()
            raise TruncatedError(f"got {got} of {total} bytes of the teacher's head")
        file = b"".join(self._chunks)
        if self._sha256 is not None and hashlib.sha256(file).digest() != self._sha256:
            self.forget()
            raise WireError(
                f"the teacher's head was corrupted in transit: the sha256 of its {len(file)} bytes is wrong"
            )
        return file


async def _fetch_head(
    http: httpx.AsyncClient, url: str, route: AnyRoute, fingerprint: str, timeouts: httpx.Timeout,
    download: _HeadDownload,
) -> bytes:  # fmt: skip
    """The file of `GET /v1/head`, continuing `download`. NotFoundError if the teacher serves none, WrongTeacherError if
    another teacher responds; what arrived before an error stays in `download`."""
    headers = download.headers()
    async with open_response(http, "GET", url, "/v1/head", route, timeouts=timeouts, headers=headers) as response:
        if response.status_code != 200 and not (response.status_code == 206 and headers):
            raise error_of(response, await plain_body(response), route)
        told = response.headers.get("x-teacher-fingerprint")
        if told != fingerprint:
            raise WrongTeacherError(
                f"{url} returned the head of teacher {told}, expected that of {fingerprint}",
                field="fingerprint", got=told, limit=fingerprint,
            )  # fmt: skip
        download.begin(response)
        async for chunk in response.aiter_bytes():
            download.take(chunk)
    return download.whole()
