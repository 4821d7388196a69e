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

from teacher_proto.canary import Canary, canary_request, read_canary
from teacher_proto.dialect import Dialect
from teacher_proto.errors import StillhouseError, WireError
from teacher_proto.exchange import fetch_head
from teacher_proto.info import TeacherInfo, parse_info
from teacher_proto.replica_client import ReplicaClient
from teacher_proto.replicas import Replica
from teacher_proto.requests import TargetsRequest, check_request
from teacher_proto.targets import TokenTargets, check_answer
from teacher_proto.wire import TARGETS_FORMAT, Header


def _check_header(header: Header, request: TargetsRequest, info: TeacherInfo) -> None:
    spec = request.spec
    told = (header.vocab_size, header.top_k, header.temperatures)
    if told != (expected := (info.limits.vocab_size, spec.top_k, spec.temperatures)):
        raise WireError(f"the header speaks of a vocabulary, top_k and temperatures of {told}; {expected} were asked")


TARGETS = Dialect(
    noun="teacher",
    command="stillhouse-teacher",
    path="/v1/targets",
    answers=TARGETS_FORMAT,
    read_info=parse_info,
    check_request=lambda request, info: check_request(request, info.limits, info.kinds),
    check_header=_check_header,
    check_record=lambda targets, request, index, info: check_answer(targets, request, index, info.limits.vocab_size),
)


class TeacherClient(ReplicaClient[TargetsRequest, TokenTargets, TeacherInfo]):
    """Asks replicas of one teacher for targets. Arguments as `ReplicaClient`; use it from one event loop."""

    dialect = TARGETS

    @property
    def canary(self) -> Canary | None:
        """What the fixed sequences were answered with: to be kept with a run and given to its next client."""
        return self._expected.canary

    async def targets(self, request: TargetsRequest, *, deadline_s: float | None = None) -> list[TokenTargets]:
        """The targets of every sequence, in the order of the sequences. Errors as `stream`."""
        return await self.answers(request, deadline_s=deadline_s)

    async def head(self) -> bytes:
        """The teacher's output head as the safetensors file of `GET /v1/head`, from the first replica that gives it.

        NotFoundError where the teacher serves no hidden states; WrongTeacherError; TeacherUnavailableError.
        """
        await self.teacher()
        failures = []
        for replica in self._pool.replicas:
            if replica.info is not None:
                try:
                    timeouts = self._timeout(self.policy.read_timeout_s)
                    return await fetch_head(self._http, replica.url, self.dialect, replica.info.fingerprint, timeouts)
                except StillhouseError as error:
                    failures.append(error)
        raise failures[0]

    async def _inspect(self, replica: Replica[TeacherInfo], info: TeacherInfo, timeouts: httpx.Timeout) -> None:
        """Does it compute what it did?"""
        request = canary_request(info)
        if request is None:
            return
        answers: dict[int, TokenTargets] = {}
        async with aclosing(self._exchange(replica, request, info, timeouts)) as outcomes:
            async for index, outcome in outcomes:
                if isinstance(outcome, StillhouseError):
                    raise outcome
                answers[index] = outcome
        self._expected.check_canary(read_canary([answers[i] for i in range(len(answers))]), info, replica.url)
