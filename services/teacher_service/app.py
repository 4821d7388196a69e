"""The teacher service's own routes; `create_app(service)` makes the complete ASGI application. Used by `run.py`.

Every route but the probes depends on `require_client`. What a route needs besides HTTP is in `compat`, `service.py` and
`serving`. An invalid request raises a RequestError that names the field at fault.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response

from serving.http import replies
from serving.http.bodies import read_request
from serving.http.openapi import GETTING, POSTING, errors
from serving.http.replies import JSON_WEIGHT, Reply, check_json_size
from serving.http.routes import Client, keyed_router, make_app
from serving.http.streams import Outlet, RacedResponse
from teacher_proto.info import TeacherInfo
from teacher_proto.requests import Query, TargetsRequest, check_request
from teacher_proto.targets import TokenTargets
from teacher_proto.wire import records as wire
from teacher_proto.wire.as_json import json_document
from teacher_service import openapi
from teacher_service.compat import completions, sglang_generate, token_generate
from teacher_service.compat.requests import answered
from teacher_service.head_file import send_head
from teacher_service.service import TeacherService

router = keyed_router()


def create_app(service: TeacherService) -> FastAPI:
    return make_app("Stillhouse teacher", service, router, partial(openapi.describe, service.engine))


def service_of(request: Request) -> TeacherService:
    return request.app.state.service


Service = Annotated[TeacherService, Depends(service_of)]


@router.post(
    "/v1/targets", response_class=Response,
    responses={**errors(*POSTING), 200: openapi.TARGETS_RESPONSE},
)  # fmt: skip
async def post_targets(request: Request, client: Client, service: Service) -> Response:
    """Score token sequences: the teacher's distribution at every position."""
    service.require_started()
    return replies.response(await _read_targets(request, client, service), service, request)


@router.post(
    "/v1/completions", response_class=Response,
    responses={**errors(*POSTING, 404), 200: openapi.COMPLETIONS_ANSWER},
)  # fmt: skip
async def post_completions(request: Request, client: Client, service: Service) -> Response:
    """Score prompts in vLLM's JSON format: `prompt_logprobs`, or `echo` with `logprobs`."""
    return await answered(request, client, service, completions.FACE)


@router.post(
    "/generate", response_class=Response,
    responses={**errors(*POSTING), 200: openapi.SGLANG_ANSWER},
)  # fmt: skip
async def post_generate(request: Request, client: Client, service: Service) -> Response:
    """Score token ids in SGLang's JSON format: `input_token_logprobs`, `input_top_logprobs`."""
    return await answered(request, client, service, sglang_generate.FACE)


@router.post(
    "/inference/v1/generate", response_class=Response,
    responses={**errors(*POSTING, 404), 200: openapi.TOKENS_RESPONSE},
)  # fmt: skip
async def post_tokens(request: Request, client: Client, service: Service) -> Response:
    """Score token ids in vLLM's JSON format: `prompt_logprobs`, or the logprobs of given ids as an array."""
    return await answered(request, client, service, token_generate.FACE)


@router.get("/v1/teacher", responses=errors(*GETTING))
async def get_teacher(service: Service) -> TeacherInfo:
    """The teacher's identity, its limits, and the kinds of target that it serves."""
    service.require_started()
    return service.info()


@router.get("/v1/head", response_class=Response, responses={**errors(*GETTING, 404), **openapi.HEAD_RESPONSES})
async def get_head(request: Request, service: Service) -> Response:
    """The output head as safetensors: applied to hidden states, it gives the logits of the whole vocabulary."""
    service.require_started()
    head = await service.head()

    async def work(outlet: Outlet) -> None:
        await send_head(request.headers, head, service.engine.identity.fingerprint, outlet)

    return RacedResponse(work)


@router.get("/v1/models", responses=errors(*GETTING))
async def get_models(service: Service) -> dict[str, Any]:
    """The one model that is served, in vLLM's format."""
    service.require_started()
    return completions.models(service)


async def _read_targets(request: Request, client: str, service: TeacherService) -> Reply[Query, TokenTargets]:
    """The request, checked against the engine's limits, as a `Reply`: its work and how its response is written."""
    engine = service.engine
    asked, as_json = await read_request(
        request, TargetsRequest, engine, lambda asked: check_request(asked, engine.limits, engine.kinds)
    )
    if as_json:
        check_json_size(asked.total_rows * (asked.values_per_token(service.hidden_width) + 1))
    canary = service.is_canary(asked)
    work = service.work_of(
        asked, request.state.request_id, client, weight=JSON_WEIGHT if as_json else 1, fresh=canary,
        urgent=canary and service.control.take(client),
    )  # fmt: skip
    spec, vocab_size = asked.spec, engine.limits.vocab_size
    header = wire.Header(
        request_id=work.request_id, fingerprint=engine.identity.fingerprint, num_sequences=len(work.jobs),
        vocab_size=vocab_size, top_k=spec.top_k, temperatures=spec.temperatures,
    )  # fmt: skip
    return Reply(
        work=work, header=wire.encode_header(header),
        encode=lambda index, targets, crc: wire.encode_targets(index, targets, vocab_size, crc),
        document=partial(json_document, wire.header_fields(header)), as_json=as_json,
    )  # fmt: skip
