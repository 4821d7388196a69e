"""OpenAPI descriptions of the routes: errors, request bodies and responses from their models, and authentication.

The services add their own bounds and examples, in `teacher_service/openapi.py` and `attention_service/app.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field, TypeAdapter

from teacher_proto.request_checks import SequencesRequest
from teacher_proto.wire import records as wire
from teacher_proto.wire.responses import VERSION
from teacher_proto.wire.tensors import ITEM_SIZE

_MEANING = {
    400: "Malformed: the body cannot be decoded, or a field is unknown or missing",
    401: "No key, or an unknown one",
    404: "No such route, model, head or layer",
    405: "The route does not support this method",
    408: "The body did not arrive in time",
    409: "The request names another teacher",
    413: "The body exceeds its limit",
    415: "The content type or encoding is not supported",
    422: "A value is outside its limits: field, got and limit say which",
    429: "The client's share is used up; Retry-After says when to retry",
    500: "The engine failed on this request; `retryable` says whether a retry may help",
    503: "Full, draining, loading, or out of memory; Retry-After says when to retry",
}
SECURITY_SCHEMES = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key of the file given with --keys"},
    "basic": {"type": "http", "scheme": "basic", "description": "The same key as the password, for browsers"},
}


class ErrorBody(BaseModel):
    """The body of every response that is not a success."""

    code: str = Field(description="the kind of error, one of the codes in `teacher_proto.errors`")
    message: str = Field(description="what was received, what was expected, what to do")
    field: str | None = Field(description="the part of the request at fault")
    got: Any = Field(description="the value received there")
    limit: Any = Field(description="what would have been accepted")
    request_id: str | None = Field(description="the X-Request-Id of the request")
    retryable: bool = Field(description="whether the same request may succeed later")


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that can end with these statuses."""
    return {status: {"model": ErrorBody, "description": _MEANING[status]} for status in statuses}


# Errors that any request with a key can get, and those that any request with a body can get.
GETTING = (400, 401, 503)
POSTING = (400, 401, 408, 409, 413, 415, 422, 429, 500, 503)

TENSOR = {
    "type": "object",
    "description": "msgpack only: little-endian numbers of this dtype and shape",
    "properties": {
        "dtype": {"type": "string", "enum": list(ITEM_SIZE)},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "data": {"type": "string", "format": "binary"},
    },
    "required": ["dtype", "shape", "data"],
}


def within(low: float, high: float) -> dict[str, Any]:
    return {"minimum": low, "maximum": high}


def whole(low: int, high: int) -> dict[str, Any]:
    return {"type": "integer"} | within(low, high)


def items_of(low: int, high: int, **more: Any) -> dict[str, Any]:
    return {"minItems": low, "maxItems": high} | more


def list_of(items: dict[str, Any], low: int, high: int) -> dict[str, Any]:
    return {"type": "array", "items": items} | items_of(low, high)


def request_body(
    kind: type[SequencesRequest], bounds: Mapping[str, dict[str, Any]], arrays: Mapping[str, dict[str, Any]],
    example: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The content of a POST as JSON and as msgpack: the model's fields, with the `bounds` of this service. `arrays` has
    the schema of an item for each array field; msgpack also accepts tensors for those."""

    def schema(packed: bool) -> dict[str, Any]:
        model = kind.model_json_schema()
        fields = {name: _one_type(field) | bounds.get(name, {}) for name, field in model["properties"].items()}
        for name, item in arrays.items():
            fields[name]["items"] = {"anyOf": [item, TENSOR]} if packed else item
        return {name: model[name] for name in ("type", "required", "additionalProperties")} | {"properties": fields}

    return {
        wire.JSON: {"schema": schema(packed=False), "example": example},
        wire.MSGPACK: {"schema": schema(packed=True)},
    }


def _one_type(field: dict[str, Any]) -> dict[str, Any]:
    """A field's schema, with `null` among its types where pydantic writes `anyOf` of a schema and null."""
    if field.get("anyOf", [])[1:] != [{"type": "null"}]:
        return field
    only = field["anyOf"][0]
    return {name: value for name, value in field.items() if name != "anyOf"} | only | {"type": [only["type"], "null"]}


def records_response(
    what: str, header: type, tensors: Iterable[str], sequence: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """A response of records, whose messages are called `what`: the fields of `header`, and those of each sequence."""
    numbers = {name: {"type": "array", "items": {}} for name in tensors}
    each = {"index": {"type": "integer"}, "error": {"type": "object"}, **sequence, **numbers}
    one = {"type": "object", "properties": each, "required": ["index"], "additionalProperties": False}
    fields = TypeAdapter(header).json_schema()["properties"] | {"version": {"const": VERSION}}
    fields["sequences"] = {"type": "array", "items": one}
    document = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    return {
        "description": f"msgpack: header, {what} or error for each sequence in any order, end. JSON: one document",
        "content": {wire.JSON: {"schema": document}, wire.MSGPACK: {"schema": {"type": "string", "format": "binary"}}},
    }


METRICS_RESPONSE: dict[str, Any] = {
    "description": "the text format of Prometheus",
    "content": {"text/plain": {"schema": {"type": "string"}}},
}


class Health(BaseModel):
    """The body of a successful probe."""

    status: str


def describe_app(app: FastAPI, description: str, bodies: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The OpenAPI document of a service, made once; `bodies` are the request bodies that FastAPI can't infer."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=description, routes=app.routes)
        schema["components"]["securitySchemes"] = SECURITY_SCHEMES
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                if not path.startswith("/health"):
                    operation["security"] = [{"bearer": []}, {"basic": []}]
        for path, content in bodies.items():
            schema["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
        app.openapi_schema = schema
    return app.openapi_schema
