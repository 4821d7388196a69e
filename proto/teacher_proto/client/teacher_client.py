"""`TeacherClient`: targets from one teacher behind one or many URLs, checked, in order, whatever happens on the way.

    async with TeacherClient(["http://teacher-0:8000", "http://teacher-1:8000"], key="...") as client:
        info = await client.teacher()
        targets = await client.targets(TargetsRequest(sequences=[[1, 2, 3]], top_k=64, temperatures=[2.0]))

Used by the trainer's remote targets and by anybody else's; `sync_client.py` is the same for scripts. How it does it is
in `replica_client.py`.
"""

from __future__ import annotations

from contextlib import aclosing

import httpx

from teacher_proto.client.attempts import timeouts
from teacher_proto.client.exchange import Route, exchange
from teacher_proto.client.expectation import Canary, canary_request, read_canary
from teacher_proto.client.head_download import HeadDownload, fetch_head
from teacher_proto.client.replica_client import OnProgress, ReplicaClient
from teacher_proto.client.replicas import Replica
from teacher_proto.errors import StillhouseError, WireError
from teacher_proto.info import TeacherInfo, parse_info
from teacher_proto.requests import TargetsRequest, check_request
from teacher_proto.targets import TokenTargets, check_targets
from teacher_proto.wire.records import TARGETS_FORMAT, Header

# Rounds over all replicas, one after the other, in which no byte more of the head came.
_HEAD_TRIES = 4
# What a hidden state is taken to hold where a teacher doesn't say: 7B models have 4096.
HIDDEN_WIDTH = 4096


def _check_header(header: Header, request: TargetsRequest, info: TeacherInfo) -> None:
    spec = request.spec
    told = (header.vocab_size, header.top_k, header.temperatures)
    if told != (expected := (info.limits.vocab_size, spec.top_k, spec.temperatures)):
        raise WireError(f"the header speaks of a vocabulary, top_k and temperatures of {told}; {expected} were asked")


TARGETS = Route(
    noun="teacher",
    command="stillhouse-teacher",
    path="/v1/targets",
    answers=TARGETS_FORMAT,
    read_info=parse_info,
    check_request=lambda request, info: check_request(request, info.limits, info.kinds),
    check_header=_check_header,
    check_record=lambda targets, request, index, info: check_targets(
        targets, request.query(index), info.limits.vocab_size
    ),
    cost=lambda request, info: request.cost(info.hidden_width or HIDDEN_WIDTH),
)


class TeacherClient(ReplicaClient[TargetsRequest, TokenTargets, TeacherInfo]):
    """Asks replicas of one teacher for targets. Arguments as `ReplicaClient`; use it from one event loop."""

    route = TARGETS

    @property
    def canary(self) -> Canary | None:
        """What the fixed sequences were answered with: to be kept with a run and given to its next client."""
        return self._expected.canary

    async def targets(
        self, request: TargetsRequest, *, deadline_s: float | None = None,
        given: dict[int, TokenTargets] | None = None, on_progress: OnProgress | None = None,
    ) -> list[TokenTargets]:  # fmt: skip
        """The targets of every sequence, in the order of the sequences. Arguments as `answers`, errors as `stream`."""
        return await self.answers(request, deadline_s=deadline_s, given=given, on_progress=on_progress)

    async def head(self) -> bytes:
        """The teacher's output head as the safetensors file of `GET /v1/head`, from the first replica that gives it.

        A transfer that breaks goes on where it was, at this replica or the next, as long as more of it comes.
        NotFoundError where the teacher serves no hidden states; WrongTeacherError; TeacherUnavailableError.
        """
        await self.teacher()
        download, fruitless = HeadDownload(), 0
        while True:
            before = download.size
            failure: StillhouseError | None = None
            for url, info in [(replica.url, replica.info) for replica in self._pool.replicas]:
                if info is None:
                    continue
                patience = timeouts(self.policy, self.policy.read_timeout_s)
                try:
                    return await fetch_head(self._http, url, self.route, info.fingerprint, patience, download)
                except StillhouseError as error:
                    # The first that a retry could mend says more than what cannot be mended anyway.
                    if failure is None or (error.retryable and not failure.retryable):
                        failure = error
            fruitless = 0 if download.size > before else fruitless + 1
            assert failure is not None, "a replica whose probe has passed is known"
            if not failure.retryable or fruitless >= _HEAD_TRIES:
                raise failure
            await self._wait_before_head(failure, fruitless)

    async def _wait_before_head(self, failure: StillhouseError, attempt: int) -> None:
        backoff = self._timing.full_jitter(attempt, self.policy.backoff_base_s, self.policy.backoff_cap_s)
        await self._timing.sleep(min(max(backoff, failure.retry_after or 0.0), self.policy.max_retry_after_s))

    async def _inspect(self, replica: Replica[TeacherInfo], info: TeacherInfo, patience: httpx.Timeout) -> None:
        """Does it compute what it did?"""
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
