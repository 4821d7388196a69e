"""The description of the attention service's API at `/openapi.json`: bodies that are not FastAPI's models.

`app.py` gives its pieces to the routes; `docs/api.md` says the same with examples.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from serving.http.openapi import TENSOR, describe_app, list_of, whole
from teacher_proto.attention import ATTENTION_KINDS, AttentionLimits, AttentionShape
from teacher_proto.attention_targets import ATTENTION_TENSORS
from teacher_proto.compute.relations import FORMS, LAYER_NAMES
from teacher_proto.wire import records as wire

_DESCRIPTION = """The attention of a teacher's layer: POST token ids, get states, relations between them, or maps.
Bodies are msgpack (WIRE.md is the specification) or JSON. Every answer carries `X-Request-Id`; a request may bring its
own."""


def _request(limits: AttentionLimits, shape: AttentionShape, *, packed: bool) -> dict[str, Any]:
    """The body of `POST /v1/attention` with the limits of this very service."""
    longest, many = limits.max_sequence_length, limits.max_sequences
    ids = list_of(whole(0, limits.vocab_size - 1), 1, longest)
    positions = list_of(whole(0, longest - 1), 1, longest)
    layers = [
        whole(-shape.num_layers, shape.num_layers - 1), {"type": "number", "minimum": 0, "maximum": 1},
        {"enum": list(LAYER_NAMES)},
    ]  # fmt: skip
    fields = {
        "sequences": list_of(
            {"anyOf": [ids, TENSOR]} if packed else ids, 1, many, description="token ids of each sequence"
        ),
        "layer": {"anyOf": layers, "default": "late_middle", "description": f"at most layer {shape.max_layer}"},
        "kind": {"enum": list(ATTENTION_KINDS), "default": "states"},
        "dtype": {"enum": ["float16", "int8"], "default": "float16", "description": "int8: of states"},
        "form": {"enum": list(FORMS), "default": "official", "description": "kind relations"},
        "relation_heads": whole(1, limits.max_relation_heads, default=32, description="kind relations"),
        "causal": {"type": ["boolean", "null"], "description": "kind relations: mask what comes after"},
        "block_size": whole(1, longest, type=["integer", "null"], description="kind maps: only within blocks"),
        "rows": list_of(
            {"anyOf": [positions, TENSOR]} if packed else positions, 1, many, type=["array", "null"],
            description="kinds relations and maps: ascending positions for each sequence; all if absent",
        ),
        "fingerprint": {"type": ["string", "null"], "description": "the teacher that must answer"},
    }  # fmt: skip
    return {"type": "object", "properties": fields, "required": ["sequences"], "additionalProperties": False}


_SEQUENCE = {
    "type": "object",
    "properties": {"index": {"type": "integer"}, "error": {"type": "object"}}
    | {name: {"type": "array", "items": {}} for name in ATTENTION_TENSORS},
    "required": ["index"],
    "additionalProperties": False,
}
_ANSWER = {
    "type": "object",
    "properties": {
        "version": {"const": wire.VERSION}, "request_id": {"type": "string"}, "fingerprint": {"type": "string"},
        "num_sequences": {"type": "integer"}, "num_layers": {"type": "integer"}, "layer": {"type": "integer"},
        "kind": {"enum": list(ATTENTION_KINDS)}, "sequences": {"type": "array", "items": _SEQUENCE},
    },
    "required": ["version", "request_id", "fingerprint", "num_sequences", "num_layers", "layer", "kind", "sequences"],
    "additionalProperties": False,
}  # fmt: skip
ATTENTION_ANSWER: dict[str, Any] = {
    "description": "msgpack: header, attention or error for each sequence in any order, end. JSON: one document",
    "content": {wire.JSON: {"schema": _ANSWER}, wire.MSGPACK: {"schema": {"type": "string", "format": "binary"}}},
}


def describe(app: FastAPI, limits: AttentionLimits, shape: AttentionShape) -> dict[str, Any]:
    """The OpenAPI document of a service with these limits, made once."""
    example = {"sequences": [[1, 2, 3]], "kind": "states", "layer": 0}
    body = {
        wire.JSON: {"schema": _request(limits, shape, packed=False), "example": example},
        wire.MSGPACK: {"schema": _request(limits, shape, packed=True)},
    }
    return describe_app(app, _DESCRIPTION, {"/v1/attention": body})
