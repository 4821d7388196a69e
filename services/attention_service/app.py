"""The attention service: a `serving.service` of attention, its own routes, and their OpenAPI description.

`create_app(service)` makes the complete ASGI application. An invalid request raises a RequestError that names the field
at fault. `main.py` calls `run` once options are parsed. `docs/api.md` says the same as `/openapi.json`, with examples.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

import numpy as np
from fastapi import Depends, FastAPI, Request
from fastapi.responses import Response

from attention_service.engine import AttentionEngine
from attention_service.settings import AttentionSettings
from serving.engine import Job
from serving.http import replies
from serving.http.bodies import read_request
from serving.http.keys import Keys
from serving.http.openapi import (
    GETTING,
    POSTING,
    describe_app,
    errors,
    items_of,
    list_of,
    records_response,
    request_body,
    whole,
    within,
)
from serving.http.replies import JSON_WEIGHT, Reply, Work, check_json_size
from serving.http.routes import Client, keyed_router, make_app
from serving.process import run_service
from serving.scheduling.admission import Permit
from serving.service import Service
from teacher_proto.attention import (
    AttentionInfo,
    AttentionQuery,
    AttentionRequest,
    AttentionSpec,
    check_attention_request,
    num_values,
    values_per_token,
)
from teacher_proto.attention_targets import ATTENTION_TENSORS, AttentionTargets
from teacher_proto.compute.relations import LAYER_NAMES
from teacher_proto.wire.as_json import json_document
from teacher_proto.wire.attention import AttentionHeader, encode_attention, encode_attention_header

_DESCRIPTION = """The attention of a teacher's layer: POST token ids, and get states, relations between them, or maps.
Bodies are msgpack (specified in WIRE.md) or JSON. Every response carries `X-Request-Id`; a request may supply its
own."""
_RESPONSE = records_response("attention", AttentionHeader, ATTENTION_TENSORS, {})
router = keyed_router()


class AttentionService(Service[AttentionEngine, AttentionSettings, AttentionQuery, AttentionTargets]):
    """A `Service` of attention."""

    unit = "numbers in responses"

    def readiness_job(self) -> Job[AttentionQuery]:
        query = AttentionQuery(np.zeros(1, dtype=np.int64), AttentionSpec("states", 0))
        return Job(query, "readiness", urgent=True)

    def cost_of_longest(self) -> int:
        return self.engine.limits.max_entries + self.engine.limits.max_sequence_length

    def info(self) -> AttentionInfo:
        """The body of `GET /v1/teacher`."""
        engine = self.engine
        limits = engine.limits.model_copy(update={"max_cost": self.admission.max_cost})
        return AttentionInfo(
            identity=engine.identity, fingerprint=engine.identity.fingerprint, limits=limits, shape=engine.shape
        )


def create_app(service: AttentionService) -> FastAPI:
    return make_app("Stillhouse attention", service, router, partial(_describe, service))


def _describe(service: AttentionService, app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of a service with its limits, made once."""
    limits, shape = service.engine.limits, service.engine.shape
    longest, many = limits.max_sequence_length, items_of(1, limits.max_sequences)
    layers = [
        whole(-shape.num_layers, shape.num_layers - 1), {"type": "number"} | within(0, 1), {"enum": list(LAYER_NAMES)},
    ]  # fmt: skip
    bounds = {
        "sequences": many,
        "layer": {"anyOf": layers, "description": f"at most layer {shape.max_layer}"},
        "relation_heads": within(1, limits.max_relation_heads),
        "block_size": within(1, longest),
        "rows": many,
    }
    arrays = {
        "sequences": list_of(whole(0, limits.vocab_size - 1), 1, longest),
        "rows": list_of(whole(0, longest - 1), 1, longest),
    }
    example = {"sequences": [[1, 2, 3]], "kind": "states", "layer": 0}
    return describe_app(app, _DESCRIPTION, {"/v1/attention": request_body(AttentionRequest, bounds, arrays, example)})


def service_of(request: Request) -> AttentionService:
    return request.app.state.service


TheService = Annotated[AttentionService, Depends(service_of)]


@router.post(
    "/v1/attention", response_class=Response,
    responses={**errors(*POSTING, 404), 200: _RESPONSE},
)  # fmt: skip
async def post_attention(request: Request, client: Client, service: TheService) -> Response:
    """The attention of one layer over token sequences: states, relations between them, or maps."""
    service.require_started()
    return replies.response(await _read_attention(request, client, service), service, request)


@router.get("/v1/teacher", responses=errors(*GETTING))
async def get_teacher(service: TheService) -> AttentionInfo:
    """The identity of the model whose attention is served, its shape and layers, and the limits."""
    service.require_started()
    return service.info()


async def _read_attention(
    request: Request, client: str, service: AttentionService
) -> Reply[AttentionQuery, AttentionTargets]:
    """The request, checked against the service's limits, as a `Reply`: its work and how its response is written."""
    engine = service.engine
    asked, as_json = await read_request(
        request, AttentionRequest, engine, lambda asked: check_attention_request(asked, engine.limits, engine.shape)
    )
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
        document=partial(json_document, asdict(header)), as_json=as_json,
    )  # fmt: skip


def run(settings: AttentionSettings) -> int:
    """Serve until a signal; returns the exit code. ValueError for what can't be served."""

    def make_service(keys: Keys) -> AttentionService:
        return AttentionService(AttentionEngine(settings), settings, keys)

    return run_service(settings, make_service, create_app)
