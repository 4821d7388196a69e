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
from teacher_proto.requests import KINDS
from teacher_proto.targets import TENSORS
from teacher_service.completions import CompletionRequest

_DESCRIPTION = """One teacher, many students: POST token ids, get for every position what a student needs to imitate
the teacher. Bodies are msgpack (WIRE.md is the specification) or JSON. Every answer carries `X-Request-Id`; a request
may bring its own."""

_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
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
_FIELDS: dict[str, Any] = {
    "sequences": {"type": "array", "minItems": 1, "items": _IDS, "description": "token ids of each sequence"},
    "kinds": {
        "type": "array", "items": {"enum": list(KINDS)}, "minItems": 1, "uniqueItems": True, "default": ["top_k"],
    },
    "top_k": {"type": "integer", "minimum": 1, "default": 64},
    "temperatures": {
        "type": "array", "items": {"type": "number", "minimum": 0.001, "maximum": 1000}, "default": [],
        "description": "temperatures to be exact at; 1 always is",
    },
    "fingerprint": {"type": ["string", "null"], "description": "the teacher that must answer"},
    "rows": {
        "type": ["array", "null"], "description": "a [start, stop) a sequence; all rows if absent",
        "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 2, "maxItems": 2},
    },
    "gather_ids": {
        "type": ["array", "null"], "items": {"type": "array", "items": _IDS},
        "description": "kind gather: ids to score, a row of them for each row asked",
    },
    "num_samples": {"type": "integer", "minimum": 1, "default": 50},
    "sample_temperature": {"type": "number", "minimum": 0.001, "maximum": 1000, "default": 1.0},
    "seed": {"type": "integer", "minimum": 0, "default": 0},
    "hidden_dtype": {"enum": ["float16", "bfloat16", "int8"], "default": "float16"},
}  # fmt: skip
_REQUEST = {"type": "object", "properties": _FIELDS, "required": ["sequences"], "additionalProperties": False}
_PACKED_SEQUENCES = {"type": "array", "minItems": 1, "items": {"anyOf": [_IDS, _TENSOR]}}
_PACKED_REQUEST = _REQUEST | {"properties": _FIELDS | {"sequences": _PACKED_SEQUENCES}}
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

TARGETS: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            wire.JSON: {"schema": _REQUEST, "example": {"sequences": [[1, 2, 3]], "top_k": 2, "temperatures": [2.0]}},
            wire.MSGPACK: {"schema": _PACKED_REQUEST},
        },
    }
}
TARGETS_ANSWER: dict[str, Any] = {
    "description": "msgpack: messages header, targets or error for each sequence in any order, end. JSON: one document",
    "content": {wire.JSON: {"schema": _ANSWER}, wire.MSGPACK: {"schema": {"type": "string", "format": "binary"}}},
}
COMPLETIONS: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            wire.JSON: {
                "schema": CompletionRequest.model_json_schema(),
                "example": {"prompt": [1, 2, 3], "max_tokens": 0, "prompt_logprobs": 2},
            }
        },
    }
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


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, made once."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, description=_DESCRIPTION, routes=app.routes,
            separate_input_output_schemas=False,
        )  # fmt: skip
        schema["components"]["securitySchemes"] = SECURITY_SCHEMES
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                # FastAPI lists its own 422 for routes with parameters; ours are all in the error table.
                if not path.startswith("/health"):
                    operation["security"] = [{"bearer": []}, {"basic": []}]
        app.openapi_schema = schema
    return app.openapi_schema
