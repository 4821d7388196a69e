"""The routes of the teacher service, and nothing else. `create_app(service)` is a whole ASGI application.

Every route but the probes depends on `require_student`. What a route needs beyond its HTTP is in `asking.py`,
`replies.py`, `completions.py`, `service.py` and `serving`.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from serving.bodies import BodyGuard, BodyLimits
from serving.context import RequestContext
from serving.error_table import install_error_table
from serving.keys import require_student
from serving.metrics import MEDIA_TYPE
from serving.openapi import ASKING, POSTING, errors
from serving.streams import Outlet, RacedResponse
from teacher_proto.info import TeacherInfo
from teacher_service import completions, openapi, replies
from teacher_service.asking import max_body, read_json, read_targets
from teacher_service.pages import page
from teacher_service.service import TeacherService
from teacher_service.status import StatusBody

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
    app.add_middleware(BodyGuard, limits=BodyLimits(partial(max_body, service), timeout_s=settings.body_timeout))
    app.add_middleware(RequestContext, observe=service.metrics.observe)
    return app


def service_of(request: Request) -> TeacherService:
    return request.app.state.service


Service = Annotated[TeacherService, Depends(service_of)]


@router.post(
    "/v1/targets", response_class=Response,
    responses={**errors(*POSTING), 200: openapi.TARGETS_ANSWER},
)  # fmt: skip
async def post_targets(request: Request, student: Student, service: Service) -> Response:
    """Score token sequences: for every position, what a student needs to imitate the teacher."""
    service.require_started()
    asked, as_json = await read_targets(request, student, service)
    reply = replies.document if as_json else replies.stream

    async def work(outlet: Outlet) -> None:
        with service.admit(asked):
            await reply(asked, service, outlet)

    return RacedResponse(work, service.settings.stall_timeout)


@router.post(
    "/v1/completions", response_class=Response,
    responses={**errors(*POSTING, 404), 200: openapi.COMPLETIONS_ANSWER},
)  # fmt: skip
async def post_completions(request: Request, student: Student, service: Service) -> Response:
    """Score prompts in vLLM's JSON shape: `prompt_logprobs`, or `echo` with `logprobs`."""
    service.require_started()
    fields = await read_json(request, service.engine.limits)
    completion = completions.parse_completion(fields, service)
    text, pieces = await service.text()
    asked = completions.asked_of(completion, service, text, student, request.state.request_id)

    async def work(outlet: Outlet) -> None:
        with service.admit(asked):
            await completions.answer(completion, asked, service, text, pieces, outlet)

    return RacedResponse(work, service.settings.stall_timeout)


@router.get("/v1/teacher", responses=errors(*ASKING))
async def get_teacher(service: Service) -> TeacherInfo:
    """Who the teacher is, what it accepts and what it can answer."""
    service.require_started()
    return service.info()


@router.get("/v1/head", response_class=FileResponse, responses={**errors(*ASKING, 404), 200: openapi.HEAD_ANSWER})
async def get_head(service: Service) -> Response:
    """The output head as safetensors: with hidden states, the logits of the whole vocabulary."""
    service.require_started()
    fingerprint = service.engine.identity.fingerprint
    headers = {"X-Teacher-Fingerprint": fingerprint, "ETag": f'"{fingerprint}"'}
    return FileResponse(await service.head(), media_type="application/octet-stream", headers=headers)


@router.get("/v1/models", responses=errors(*ASKING))
async def get_models(service: Service) -> dict[str, Any]:
    """The one model that is served, as vLLM lists it."""
    service.require_started()
    return completions.models(service)


@router.get("/v1/status", responses=errors(*ASKING))
async def get_status(service: Service) -> StatusBody:
    """What the page at `/` shows: who is using the teacher, and how fast."""
    service.require_started()
    return service.status()


@router.get("/metrics", response_class=Response, responses={**errors(400, 401), 200: openapi.METRICS_ANSWER})
async def get_metrics(service: Service) -> Response:
    """Counters for Prometheus."""
    return Response(service.metrics.text(), media_type=MEDIA_TYPE)


@probes.get("/health/live", responses=errors(400))
async def get_live() -> openapi.Health:
    """200 as long as the process answers at all."""
    return openapi.Health(status="live")


@probes.get("/health", responses=errors(400, 503), name="get_health")
@probes.get("/health/ready", responses=errors(400, 503))
async def get_ready(service: Service) -> openapi.Health:
    """200 when a token gets through the engine; 503 while loading, draining or broken. `/health` is vLLM's name."""
    await service.check_ready()
    return openapi.Health(status="ready")


@router.get("/", include_in_schema=False)
async def get_page() -> Response:
    return page("status.html")


@router.get("/docs", include_in_schema=False)
async def get_docs() -> Response:
    return page("docs.html")


@router.get("/openapi.json", include_in_schema=False)
async def get_openapi(request: Request, service: Service) -> JSONResponse:
    service.require_started()
    return JSONResponse(openapi.describe(request.app, service.engine.limits, service.engine.kinds))
