"""From the body of `POST /v1/targets` to the work that it makes and the reply that it gets. Used by `app.py`.

Everything wrong is a RequestError with the field at fault.
"""

from __future__ import annotations

from functools import partial

from fastapi import Request

from serving.engine import Job
from serving.http.replies import JSON_WEIGHT, Reply, Work, check_json_size
from serving.http.requests import check_fingerprint, read_fields
from serving.scheduling.admission import Permit
from teacher_proto.requests import Query, TargetsRequest, check_request, parse_request
from teacher_proto.targets import TokenTargets
from teacher_proto.wire import records as wire
from teacher_proto.wire.as_json import json_document
from teacher_service.service import TeacherService


async def read_targets(request: Request, client: str, service: TeacherService) -> Reply[Query, TokenTargets]:
    """What the request asks, checked against the engine's limits, and how it is answered."""
    engine = service.engine
    fields, as_json = await read_fields(request, engine.limits, TargetsRequest)
    asked = parse_request(fields)
    check_request(asked, engine.limits, engine.kinds)
    check_fingerprint(asked.fingerprint, engine.identity.fingerprint)
    if as_json:
        check_json_size(asked.cost(service.hidden_width))
    canary = service.is_canary(asked)
    work = work_of(
        asked, request.state.request_id, client, service, weight=JSON_WEIGHT if as_json else 1, fresh=canary,
        urgent=canary and service.control.take(client),
    )  # fmt: skip
    spec, vocab_size = asked.spec, engine.limits.vocab_size
    header = wire.Header(
        request_id=work.request_id, fingerprint=engine.identity.fingerprint, num_sequences=len(work.jobs),
        vocab_size=vocab_size, top_k=spec.top_k, temperatures=spec.temperatures,
    )  # fmt: skip
    return Reply(
        work=work, header=wire.encode_header(header),
        encode=lambda index, targets: wire.encode_targets(index, targets, vocab_size),
        document=partial(json_document, header), as_json=as_json,
    )  # fmt: skip


def work_of(
    asked: TargetsRequest, request_id: str, client: str, service: TeacherService, *, weight: int = 1,
    fresh: bool = False, urgent: bool = False,
) -> Work[Query]:  # fmt: skip
    """The work of a checked request. `weight`: what its answer takes, of what our wire does. `fresh` as of a `Job`; an
    `urgent` one goes past queue and admission."""
    jobs = [Job(query, f"{request_id}-{i}", urgent, fresh) for i, query in enumerate(asked.queries())]
    values = weight * (asked.values_per_token(service.hidden_width) + 1) - 1
    permit = Permit(client, 0, 0) if urgent else Permit.of(client, asked.num_tokens, values)
    return Work(request_id, client, permit, jobs)
