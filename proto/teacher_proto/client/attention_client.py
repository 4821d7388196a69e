"""`AttentionClient`: attention targets from the service that runs beside a teacher; otherwise like `TeacherClient`.

    async with AttentionClient("http://attention:8001", beside=teacher_info.identity) as client:
        states = await client.attention(AttentionRequest(sequences=[[1, 2, 3]], layer="late_middle"))

Used by the trainer's relation loss and by third-party trainers; `sync_client.py` is the blocking version for scripts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from teacher_proto.attention import (
    AttentionInfo,
    AttentionRequest,
    attention_cost,
    check_attention_request,
)
from teacher_proto.attention_targets import AttentionTargets, check_attention
from teacher_proto.client.exchange import Route
from teacher_proto.client.replica_client import OnProgress, ReplicaClient
from teacher_proto.client.replicas import Replica
from teacher_proto.errors import WireError, WrongTeacherError
from teacher_proto.identity import TeacherIdentity, compare_fingerprints
from teacher_proto.wire.attention import ATTENTION_FORMAT, AttentionHeader


def _check_header(header: AttentionHeader, request: AttentionRequest, info: AttentionInfo) -> None:
    told = (header.kind, header.layer, header.num_layers)
    spec = request.spec(info.shape.num_layers)
    if told != (expected := (spec.kind, spec.layer, info.shape.num_layers)):
        raise WireError(f"the response header gives kind, layer and depth {told}, expected {expected}")


ATTENTION = Route(
    noun="attention service",
    command="stillhouse-attention",
    path="/v1/attention",
    answers=ATTENTION_FORMAT,
    info=AttentionInfo,
    check_request=lambda request, info: check_attention_request(request, info.limits, info.shape),
    check_header=_check_header,
    check_record=lambda targets, request, index, info: check_attention(
        targets, request.query(index, info.shape.num_layers), info.shape
    ),
    cost=lambda request, info: attention_cost(request, info.shape),
)


class AttentionClient(ReplicaClient[AttentionRequest, AttentionTargets, AttentionInfo]):
    """Client of the replicas of one attention service. Use it from one event loop.

    `beside`: identity or fingerprint of the teacher whose model the service must hold. Weights, tokenizer, dtype and
    everything else in the semantic half must be equal; the engine may differ. A service with another model raises
    WrongTeacherError with the fields that differ. Other arguments as for `ReplicaClient`.
    """

    route = ATTENTION

    def __init__(self, urls: str | Sequence[str], *, beside: TeacherIdentity | str | None = None, **arguments: Any):
        self._beside = beside
        super().__init__(urls, **arguments)

    async def attention(
        self, request: AttentionRequest, *, deadline_s: float | None = None,
        given: dict[int, AttentionTargets] | None = None, on_progress: OnProgress | None = None,
    ) -> list[AttentionTargets]:  # fmt: skip
        """The attention targets of every sequence, in order. Arguments as for `answers`, errors as for `stream`."""
        return await self.answers(request, deadline_s=deadline_s, given=given, on_progress=on_progress)

    async def _inspect(self, replica: Replica[AttentionInfo], info: AttentionInfo, patience: httpx.Timeout) -> None:
        """Check that the service holds the teacher's model."""
        if self._beside is not None:
            check_beside(self._beside, info, replica.url)

    def _check_addressee(self, fingerprint: str, info: AttentionInfo, url: str) -> None:
        check_beside(fingerprint, info, url)


def check_beside(teacher: TeacherIdentity | str, info: AttentionInfo, url: str) -> None:
    """Raise WrongTeacherError, with the fields that differ, unless the service at `url` holds the teacher's model."""
    fingerprint = teacher if isinstance(teacher, str) else teacher.fingerprint
    if compare_fingerprints(fingerprint, info.fingerprint) != "semantic":
        return
    lines = [] if isinstance(teacher, str) else teacher.difference(info.identity)
    what = "; ".join(line for line in lines if line.startswith("semantic."))
    raise WrongTeacherError(
        f"{url} does not hold the teacher's model: {what or f'expected {fingerprint}, got {info.fingerprint}'}; "
        "start it with the teacher's MODEL, --revision, --name and --dtype",
        field="fingerprint", got=info.fingerprint, limit=fingerprint,
    )  # fmt: skip
