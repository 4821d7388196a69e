"""The description of the API at `/openapi.json`: what FastAPI cannot see by itself, bodies that are not its models.

`app.py` gives its pieces to the routes; `docs/api.md` says the same with examples.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from serving.openapi import SECURITY_SCHEMES
from teacher_proto import wire
from teacher_proto.requests import Kind, Limits
from teacher_proto.targets import TENSORS
from teacher_service.completions import CompletionRequest

_DESCRIPTION = """One teacher, many students: POST token ids, get for every position what a student needs to imitate
the teacher. Bodies are msgpack (WIRE.md is the specification) or JSON. Every answer carries `X-Request-Id`; a request
may bring its own."""

_TENSOR = {
    "type": "object",
    "description": "msgpack only: little-endian numbers of this dtype and shape",
    "properties": {
        "dtype": {"type": "string", "enum": list(wire.ITEM_SIZE)},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
        "data": {"type": "string", "format": "binary"},
    },
    "required": ["dtype", "shape", "data"],
}


def _whole(low: int, high: int, **more: Any) -> dict[str, Any]:
    return {"type": "integer", "minimum": low, "maximum": high} | more


def _list_of(items: dict[str, Any], low: int, high: int, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": low, "maxItems": high} | more


def _request(limits: Limits, kinds: tuple[Kind, ...], *, packed: bool) -> dict[str, Any]:
    """The body of `POST /v1/targets` with the limits of this very teacher."""
    ids = _list_of(_whole(0, limits.vocab_size - 1), 1, limits.max_sequence_length)
    many = limits.max_sequences
    temperature = {"type": "number", "minimum": 0.001, "maximum": 1000}
    gathered = _list_of(_list_of(_whole(0, limits.vocab_size - 1), 1, limits.max_gather), 1, limits.max_sequence_length)
    sequence = {"anyOf": [ids, _TENSOR]} if packed else ids
    fields = {
        "sequences": _list_of(sequence, 1, many, description="token ids of each sequence"),
        "kinds": _list_of({"enum": list(kinds)}, 1, len(kinds), uniqueItems=True, default=["top_k"]),
        "top_k": _whole(1, min(limits.max_top_k, limits.vocab_size), default=64),
        "temperatures": _list_of(
            temperature, 0, limits.max_temperatures, default=[], description="temperatures to be exact at; 1 always is"
        ),
        "fingerprint": {"type": ["string", "null"], "description": "the teacher that must answer"},
        "rows": _list_of(
            _list_of(_whole(0, limits.max_sequence_length), 2, 2), 1, many, type=["array", "null"],
            description="a [start, stop) for each sequence; all rows if absent",
        ),
        "gather_ids": _list_of(
            {"anyOf": [gathered, _TENSOR]} if packed else gathered, 1, many, type=["array", "null"],
            description="kind gather: the ids to score, a row of them for each row asked, for each sequence",
        ),
        "num_samples": _whole(1, limits.max_samples, default=50, description="kind sampled: draws for each row"),
        "sample_temperature": temperature | {"default": 1.0},
        "seed": _whole(0, 2**63 - 1, default=0),
        "hidden_dtype": {"enum": ["float16", "bfloat16", "int8"], "default": "float16"},
    }  # fmt: skip
    return {"type": "object", "properties": fields, "required": ["sequences"], "additionalProperties": False}


_NUMBERS = {"type": "array", "items": {}}
_SEQUENCE = {
    "type": "object",
    "properties": {"index": {"type": "integer"}, "start": {"type": "integer"}, "error": {"type": "object"}}
    | dict.fromkeys(TENSORS, _NUMBERS),
    "required": ["index"],
    "additionalProperties": False,
}
_ANSWER = {
    "type": "object",
    "properties": {
        "version": {"const": wire.VERSION}, "request_id": {"type": "string"}, "fingerprint": {"type": "string"},
        "num_sequences": {"type": "integer"}, "vocab_size": {"type": "integer"}, "top_k": {"type": "integer"},
        "temperatures": {"type": "array", "items": {"type": "number"}},
        "sequences": {"type": "array", "items": _SEQUENCE},
    },
    "required": ["version", "request_id", "fingerprint", "num_sequences", "vocab_size", "top_k", "temperatures",
                 "sequences"],
    "additionalProperties": False,
}  # fmt: skip

TARGETS_ANSWER: dict[str, Any] = {
    "description": "msgpack: messages header, targets or error for each sequence in any order, end. JSON: one document",
    "content": {wire.JSON: {"schema": _ANSWER}, wire.MSGPACK: {"schema": {"type": "string", "format": "binary"}}},
}
COMPLETIONS_ANSWER: dict[str, Any] = {
    "description": "vLLM's completion: `choices` with `prompt_logprobs` and `logprobs`",
    "content": {
        wire.JSON: {
            "schema": {
                "type": "object",
                "properties": {"id": {"type": "string"}, "choices": {"type": "array"}, "usage": {"type": "object"}},
                "required": ["id", "choices", "usage"],
            }
        }
    },
}
HEAD_ANSWER: dict[str, Any] = {
    "description": "safetensors: weight [V, D], bias where there is one, scale and soft_cap",
    "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
}
METRICS_ANSWER: dict[str, Any] = {
    "description": "the text format of Prometheus",
    "content": {"text/plain": {"schema": {"type": "string"}}},
}


class Health(BaseModel):
    """What a probe answers when all is well."""

    status: str


def describe(app: FastAPI, limits: Limits, kinds: tuple[Kind, ...]) -> dict[str, Any]:
    """The OpenAPI document of a teacher with these limits, made once."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes)
        schema["components"]["securitySchemes"] = SECURITY_SCHEMES
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                if not path.startswith("/health"):
                    operation["security"] = [{"bearer": []}, {"basic": []}]
        bodies = {"/v1/targets": _targets_body(limits, kinds), "/v1/completions": _completions_body()}
        for path, content in bodies.items():
            schema["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
        app.openapi_schema = schema
    return app.openapi_schema


def _targets_body(limits: Limits, kinds: tuple[Kind, ...]) -> dict[str, Any]:
    example = {"sequences": [[1, 2, 3]], "top_k": 2, "temperatures": [2.0]}
    return {
        wire.JSON: {"schema": _request(limits, kinds, packed=False), "example": example},
        wire.MSGPACK: {"schema": _request(limits, kinds, packed=True)},
    }


def _completions_body() -> dict[str, Any]:
    example = {"prompt": [1, 2, 3], "max_tokens": 0, "prompt_logprobs": 2}
    return {wire.JSON: {"schema": CompletionRequest.model_json_schema(), "example": example}}
