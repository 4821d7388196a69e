"""The routes of the attention service beside the common ones. `create_app(service)` is a whole ASGI application."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response

from attention_service import openapi
from attention_service.requests import read_attention
from attention_service.service import AttentionService
from serving.http import replies
from serving.http.openapi import ASKING, POSTING, errors
from serving.http.requests import progress_interval
from serving.http.routes import Client, keyed_router, make_app
from serving.http.streams import Outlet, RacedResponse
from teacher_proto.attention import AttentionInfo

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
    reply = await read_attention(request, client, service)
    every_s = progress_interval(request)

    async def work(outlet: Outlet) -> None:
        await replies.write(reply, service, outlet, every_s)

    return RacedResponse(work)


@router.get("/v1/teacher", responses=errors(*ASKING))
async def get_teacher(service: Service) -> AttentionInfo:
    """Whose attention it is, which layers are served, and what is accepted."""
    service.require_started()
    return service.info()
