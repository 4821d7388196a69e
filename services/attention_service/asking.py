"""From an HTTP request to a question that the engine may hear, and its reply. Used by the routes in `app.py`.

Everything wrong is a RequestError with the field at fault.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from fastapi import Request

from attention_service.job import Job
from attention_service.service import AttentionService
from serving.admission import Permit
from serving.asking import check_fingerprint, read_fields
from serving.replies import JSON_WEIGHT, Reply, check_json_size
from teacher_proto.attention import (
    AttentionRequest,
    check_attention_request,
    num_values,
    parse_attention_request,
    values_per_token,
)
from teacher_proto.attention_targets import AttentionTargets
from teacher_proto.attention_wire import (
    AttentionHeader,
    attention_document,
    encode_attention,
    encode_attention_header,
)


@dataclass(frozen=True)
class Asked:
    """A checked request with who asked it; `values_per_token` is what a permit counts beside its tokens."""

    request: AttentionRequest
    student: str
    request_id: str
    values_per_token: int


async def read_attention(request: Request, student: str, service: AttentionService) -> tuple[Asked, bool]:
    """The body of `POST /v1/attention`, checked against the service's limits; and whether its answer is to be JSON."""
    engine = service.engine
    fields, as_json = await read_fields(request, engine.limits, AttentionRequest)
    parsed = parse_attention_request(fields)
    check_attention_request(parsed, engine.limits, engine.shape)
    check_fingerprint(parsed.fingerprint, engine.identity.fingerprint)
    values = values_per_token(parsed, engine.shape)
    if as_json:
        check_json_size(num_values(parsed, engine.shape))
        values = JSON_WEIGHT * (values + 1) - 1
    return Asked(parsed, student, request.state.request_id, values), as_json


def reply_to(asked: Asked, service: AttentionService) -> Reply[Job, AttentionTargets]:
    request, engine = asked.request, service.engine
    spec = request.spec(engine.shape.num_layers)
    header = AttentionHeader(
        request_id=asked.request_id, fingerprint=engine.identity.fingerprint, num_sequences=len(request.sequences),
        num_layers=engine.shape.num_layers, layer=spec.layer, kind=spec.kind,
    )  # fmt: skip
    rows = request.rows or [None] * len(request.sequences)
    jobs = [
        Job(tokens_T, spec, f"{asked.request_id}-{i}", rows_r)
        for i, (tokens_T, rows_r) in enumerate(zip(request.sequences, rows, strict=True))
    ]
    return Reply(
        permit=Permit.of(asked.student, request.num_tokens, asked.values_per_token), jobs=jobs,
        student=asked.student, header=encode_attention_header(header), encode=encode_attention,
        document=partial(attention_document, header),
    )  # fmt: skip
