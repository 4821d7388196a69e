"""The routes of the teacher service, and nothing else. `create_app(service)` is a whole ASGI application.

Every route but the two probes depends on `require_student`. What a route needs beyond the HTTP of it is in
`replies.py`, `service.py` and `serving`.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from serving.bodies import BodyGuard, BodyLimits
from serving.context import RequestContext
from serving.error_table import install_error_table
from serving.keys import require_student
from serving.metrics import MEDIA_TYPE
from serving.streams import Outlet, RacedResponse
from teacher_proto import wire
from teacher_proto.errors import MalformedError, UnsupportedTypeError, WrongTeacherError
from teacher_proto.identity import compare_fingerprints
from teacher_proto.requests import Limits, TargetsRequest, check_request, parse_request
from teacher_service import completions, replies
from teacher_service.pages import page
from teacher_service.service import TeacherService

Student = Annotated[str, Depends(require_student)]
router = APIRouter(dependencies=[Depends(require_student)])
probes = APIRouter()


def create_app(service: TeacherService) -> FastAPI:
    app = FastAPI(title="Stillhouse teacher", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.state.keys = service.keys
    app.include_router(probes)
    app.include_router(router)
    install_error_table(app)
    settings = service.settings
    app.add_middleware(BodyGuard, limits=BodyLimits(partial(_max_body, service), timeout_s=settings.body_timeout))
    app.add_middleware(RequestContext, observe=service.metrics.observe)
    return app


def service_of(request: Request) -> TeacherService:
    return request.app.state.service


Service = Annotated[TeacherService, Depends(service_of)]


@router.post("/v1/targets")
async def post_targets(request: Request, student: Student, service: Service) -> Response:
    """Score token sequences: for every position, what a student needs to imitate the teacher."""
    service.require_started()
    limits = service.engine.limits
    content_type = _media_type(request, wire.MSGPACK, wire.JSON)
    parsed = parse_request(_decode(await request.body(), content_type, limits))
    check_request(parsed, limits, service.engine.kinds)
    _check_fingerprint(parsed, service)
    asked = replies.Asked(parsed, student, request.state.request_id)
    as_json = _wants_json(request.headers.get("accept", ""), content_type)
    if as_json:
        replies.check_json_size(asked, service.hidden_width)
    reply = replies.document if as_json else replies.stream

    async def work(outlet: Outlet) -> None:
        with service.admission.admit(student, parsed.num_tokens, asked.values_per_token(service.hidden_width)):
            await reply(asked, service, outlet)

    return RacedResponse(work, service.settings.stall_timeout)


@router.post("/v1/completions")
async def post_completions(request: Request, student: Student, service: Service) -> Response:
    """Score prompts in vLLM's JSON shape: `prompt_logprobs`, or `echo` with `logprobs`."""
    service.require_started()
    content_type = _media_type(request, wire.JSON)
    fields = _decode(await request.body(), content_type, service.engine.limits)
    completion = completions.parse_completion(fields, service)
    text, pieces = await service.text()
    asked = completions.asked_of(completion, service, text, student, request.state.request_id)

    async def work(outlet: Outlet) -> None:
        with service.admission.admit(student, asked.request.num_tokens, asked.values_per_token(0)):
            await completions.answer(completion, asked, service, text, pieces, outlet)

    return RacedResponse(work, service.settings.stall_timeout)


@router.get("/v1/models")
async def get_models(service: Service) -> dict[str, Any]:
    """The one model that is served, as vLLM lists it."""
    service.require_started()
    return completions.models(service)


@router.get("/v1/teacher")
async def get_teacher(service: Service) -> dict[str, Any]:
    """Who the teacher is, what it accepts and what it can answer."""
    service.require_started()
    return {
        "identity": service.engine.identity.model_dump(mode="json"),
        "fingerprint": service.engine.identity.fingerprint,
        "limits": service.engine.limits.model_dump(mode="json"),
        "kinds": list(service.engine.kinds),
        "version": wire.VERSION,
    }


@router.get("/v1/head")
async def get_head(service: Service) -> Response:
    """The output head as safetensors: with hidden states, the logits of the whole vocabulary."""
    service.require_started()
    fingerprint = service.engine.identity.fingerprint
    headers = {"X-Teacher-Fingerprint": fingerprint, "ETag": f'"{fingerprint}"'}
    return FileResponse(await service.head(), media_type="application/octet-stream", headers=headers)


@router.get("/v1/status")
async def get_status(service: Service) -> dict[str, Any]:
    """What the page at `/` shows: who is using the teacher, and how fast."""
    service.require_started()
    return service.status()


@router.get("/", include_in_schema=False)
async def get_page() -> Response:
    return page("status.html")


@router.get("/docs", include_in_schema=False)
async def get_docs() -> Response:
    return page("docs.html")


@router.get("/metrics")
async def get_metrics(service: Service) -> Response:
    """Counters for Prometheus."""
    return Response(service.metrics.text(), media_type=MEDIA_TYPE)


@probes.get("/health/live")
async def get_live() -> dict[str, str]:
    """200 as long as the process answers at all."""
    return {"status": "live"}


@probes.get("/health")
@probes.get("/health/ready")
async def get_ready(service: Service) -> dict[str, str]:
    """200 when a token gets through the engine; 503 while loading, draining or broken."""
    await service.check_ready()
    return {"status": "ready"}


@router.get("/openapi.json", include_in_schema=False)
async def get_openapi(request: Request) -> JSONResponse:
    return JSONResponse(request.app.openapi())


def _media_type(request: Request, *spoken: str) -> str:
    given = request.headers.get("content-type", "")
    media_type = given.partition(";")[0].strip().lower()
    if media_type not in spoken:
        raise UnsupportedTypeError(
            f"Content-Type {given[:80]!r} is not spoken here: send {' or '.join(spoken)}", field="Content-Type",
            got=given[:80], limit=list(spoken),
        )  # fmt: skip
    return media_type


def _decode(body: bytes, content_type: str, limits: Limits) -> dict[str, Any]:
    """The plain fields of a request. WireError or MalformedError where the bytes are neither."""
    if content_type == wire.MSGPACK:
        return wire.decode_request(body, limits)
    try:
        fields = json.loads(body, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"the body is not JSON: {error}", field="body") from None
    if not isinstance(fields, dict):
        raise MalformedError(f"the body is a JSON {type(fields).__name__}, an object was expected", field="body")
    return fields


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object has the same key twice")
    return fields


def _wants_json(accept: str, content_type: str) -> bool:
    """The Accept header decides where it names one of the two, else the answer comes as the question did."""
    named = [part.partition(";")[0].strip().lower() for part in accept.split(",")]
    for media_type in named:
        if media_type in (wire.MSGPACK, wire.JSON):
            return media_type == wire.JSON
    return content_type == wire.JSON


def _check_fingerprint(request: TargetsRequest, service: TeacherService) -> None:
    """Refuse a request that is meant for a teacher with other weights. A numeric difference is the client's to judge:
    the header tells it."""
    ours = service.engine.identity.fingerprint
    if request.fingerprint is not None and compare_fingerprints(request.fingerprint, ours) == "semantic":
        raise WrongTeacherError(
            f"the request is for the teacher {request.fingerprint!r}, this is {ours}: GET /v1/teacher tells who it is",
            field="fingerprint", got=request.fingerprint, limit=ours,
        )  # fmt: skip


def _max_body(service: TeacherService, content_type: str) -> int:
    limits = service.engine.limits if service.started else Limits(vocab_size=1, max_sequence_length=1)
    return limits.max_json_bytes if content_type.startswith(wire.JSON) else limits.max_body_bytes
