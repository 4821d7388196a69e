"""The routes of the attention service beside the common ones. `create_app(service)` is a whole ASGI application.

Everything wrong with a request is a RequestError with the field at fault. `main.py` calls `run` once options are read.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response

from attention_service import openapi
from attention_service.engine import AttentionEngine
from attention_service.service import AttentionService
from attention_service.settings import AttentionSettings
from serving.engine import Job
from serving.http import replies
from serving.http.keys import Keys
from serving.http.openapi import ASKING, POSTING, errors
from serving.http.replies import JSON_WEIGHT, Reply, Work, check_json_size
from serving.http.requests import check_fingerprint, progress_interval, read_fields
from serving.http.routes import Client, keyed_router, make_app
from serving.http.streams import Outlet, RacedResponse
from serving.run import run_service
from serving.scheduling.admission import Permit
from teacher_proto.attention import (
    AttentionInfo,
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

router = keyed_router()


def create_app(service: AttentionService) -> FastAPI:
    def describe(app: FastAPI) -> dict[str, Any]:
        return openapi.describe(app, service.engine.limits, service.engine.shape)

    return make_app("Stillhouse attention", service, router, describe)


def service_of(request: Request) -> AttentionService:
    return request.app.state.service


Service = Annotated[AttentionService, Depends(service_of)]


@router.post(
    "/v1/attention", response_class=Response,
    responses={**errors(*POSTING, 404), 200: openapi.ATTENTION_ANSWER},
)  # fmt: skip
async def post_attention(request: Request, client: Client, service: Service) -> Response:
    """The attention of one layer over token sequences: states, relations between them, or maps."""
    service.require_started()
    reply = await _read_attention(request, client, service)
    every_s = progress_interval(request)

    async def work(outlet: Outlet) -> None:
        await replies.write(reply, service, outlet, every_s)

    return RacedResponse(work)


@router.get("/v1/teacher", responses=errors(*ASKING))
async def get_teacher(service: Service) -> AttentionInfo:
    """Whose attention it is, which layers are served, and what is accepted."""
    service.require_started()
    return service.info()


async def _read_attention(
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


def run(settings: AttentionSettings) -> int:
    """Serve until a signal; the exit code. ValueError for what can't be served."""

    def make_service(keys: Keys) -> AttentionService:
        return AttentionService(AttentionEngine(settings), settings, keys)

    return run_service(settings, make_service, create_app)
