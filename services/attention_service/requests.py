"""From the body of `POST /v1/attention` to the work that it makes and the reply that it gets. Used by `app.py`.

Everything wrong is a RequestError with the field at fault.
"""

from __future__ import annotations

from functools import partial

from fastapi import Request

from attention_service.service import AttentionService
from serving.engine import Job
from serving.http.replies import JSON_WEIGHT, Reply, Work, check_json_size
from serving.http.requests import check_fingerprint, read_fields
from serving.scheduling.admission import Permit
from teacher_proto.attention import (
    AttentionQuery,
    AttentionRequest,
    check_attention_request,
    num_values,
    parse_attention_request,
    values_per_token,
)
from teacher_proto.attention_targets import AttentionTargets
from teacher_proto.wire.attention import (
    AttentionHeader,
    attention_document,
    encode_attention,
    encode_attention_header,
)


async def read_attention(
    request: Request, client: str, service: AttentionService
) -> Reply[AttentionQuery, AttentionTargets]:
    """What the request asks, checked against the service's limits, and how it is answered."""
    engine = service.engine
    fields, as_json = await read_fields(request, engine.limits, AttentionRequest)
    asked = parse_attention_request(fields)
    check_attention_request(asked, engine.limits, engine.shape)
    check_fingerprint(asked.fingerprint, engine.identity.fingerprint)
    values = values_per_token(asked, engine.shape)
    if as_json:
        check_json_size(num_values(asked, engine.shape))
        values = JSON_WEIGHT * (values + 1) - 1
    num_layers, request_id = engine.shape.num_layers, request.state.request_id
    queries = [asked.query(i, num_layers) for i in range(len(asked.sequences))]
    work = Work(
        request_id, client, Permit.of(client, asked.num_tokens, values),
        [Job(query, f"{request_id}-{i}") for i, query in enumerate(queries)],
    )  # fmt: skip
    spec = queries[0].spec
    header = AttentionHeader(
        request_id=request_id, fingerprint=engine.identity.fingerprint, num_sequences=len(queries),
        num_layers=num_layers, layer=spec.layer, kind=spec.kind,
    )  # fmt: skip
    return Reply(
        work=work, header=encode_attention_header(header), encode=encode_attention,
        document=partial(attention_document, header), as_json=as_json,
    )  # fmt: skip
