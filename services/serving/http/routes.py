"""The routes that every service has, and the application around them: probes, metrics, status, HTML pages.

Every route but the probes depends on `require_client`. The pages are single files without a build step, which load
nothing from other hosts.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from serving.http.bodies import BodyGuard, BodyLimits
from serving.http.context import RequestContext
from serving.http.error_table import install_error_table
from serving.http.keys import require_client
from serving.http.openapi import GETTING, METRICS_RESPONSE, Health, errors
from serving.metrics import MEDIA_TYPE
from serving.service import Service
from serving.status import StatusBody
from teacher_proto.request_checks import SequenceLimits
from teacher_proto.wire.records import JSON

Client = Annotated[str, Depends(require_client)]
AnyService = Service[Any, Any, Any, Any]
_PAGES = Path(__file__).parent / "pages"


def keyed_router() -> APIRouter:
    """A router whose routes all require a key."""
    return APIRouter(dependencies=[Depends(require_client)])


common = keyed_router()
probes = APIRouter()


def make_app(
    title: str, service: AnyService, router: APIRouter, describe: Callable[[FastAPI], dict[str, Any]]
) -> FastAPI:
    """The complete ASGI application: a service's own routes and the common ones, behind limits, keys and the log.

    `describe` makes the OpenAPI document once the service has started.
    """
    app = FastAPI(title=title, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.service = service
    app.state.keys = service.keys
    app.state.describe = describe
    for part in (probes, router, common):
        app.include_router(part)
    install_error_table(app)
    limits = BodyLimits(partial(_max_body, service), timeout_s=service.settings.body_timeout,
                        shared=service.keys.required)  # fmt: skip
    app.add_middleware(BodyGuard, limits=limits)
    app.add_middleware(RequestContext, observe=service.metrics.observe)
    return app


def _max_body(service: AnyService, content_type: str) -> int:
    """Maximum size of a body of this content type, in bytes. The model's limits are unknown while it loads."""
    limits = service.engine.limits if service.started else SequenceLimits(vocab_size=1, max_sequence_length=1)
    return limits.max_json_bytes if content_type.lower().startswith(JSON) else limits.max_body_bytes


def _service_of(request: Request) -> AnyService:
    return request.app.state.service


TheService = Annotated[AnyService, Depends(_service_of)]


@common.get("/v1/status", responses=errors(*GETTING))
async def get_status(service: TheService) -> StatusBody:
    """The data behind the page at `/`: who is using the service, and at what rate."""
    service.require_started()
    return service.status()


@common.get("/metrics", response_class=Response, responses={**errors(400, 401), 200: METRICS_RESPONSE})
async def get_metrics(service: TheService) -> Response:
    """Counters for Prometheus."""
    return Response(service.metrics.text(), media_type=MEDIA_TYPE)


@probes.get("/health/live", responses=errors(400))
async def get_live() -> Health:
    """200 as long as the process responds."""
    return Health(status="live")


@probes.get("/health", responses=errors(400, 503), name="get_health")
@probes.get("/health/ready", responses=errors(400, 503))
async def get_ready(service: TheService) -> Health:
    """200 if the engine makes progress; 503 if it is loading, draining, stuck or dead. `/health` is vLLM's name."""
    await service.check_ready()
    return Health(status="ready")


@common.get("/", include_in_schema=False)
async def get_page() -> Response:
    return _page("status.html")


@common.get("/docs", include_in_schema=False)
async def get_docs() -> Response:
    return _page("docs.html")


@common.get("/openapi.json", include_in_schema=False)
async def get_openapi(request: Request, service: TheService) -> JSONResponse:
    service.require_started()
    return JSONResponse(request.app.state.describe(request.app))


@cache
def _read_page(name: str) -> tuple[str, str]:
    """A page and the Content-Security-Policy that allows its own script and style and nothing else."""
    text = (_PAGES / name).read_text(encoding="utf-8")
    sources = {
        tag: " ".join(f"'sha256-{_digest(body)}'" for body in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
        for tag in ("script", "style")
    }
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src data:; script-src {sources['script']}; "
        f"style-src {sources['style']}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _page(name: str) -> HTMLResponse:
    text, policy = _read_page(name)
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})
