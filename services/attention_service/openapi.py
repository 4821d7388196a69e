"""The description of the attention service's API at `/openapi.json`: bodies that are not FastAPI's models.

`app.py` gives its pieces to the routes; `docs/api.md` says the same with examples.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from serving.http.openapi import describe_app, items_of, list_of, records_answer, request_body, whole, within
from teacher_proto.attention import AttentionLimits, AttentionRequest, AttentionShape
from teacher_proto.attention_targets import ATTENTION_TENSORS
from teacher_proto.compute.relations import LAYER_NAMES
from teacher_proto.wire.attention import AttentionHeader

_DESCRIPTION = """The attention of a teacher's layer: POST token ids, get states, relations between them, or maps.
Bodies are msgpack (WIRE.md is the specification) or JSON. Every answer carries `X-Request-Id`; a request may bring its
own."""


ATTENTION_ANSWER = records_answer("attention", AttentionHeader, ATTENTION_TENSORS, {})


def describe(app: FastAPI, limits: AttentionLimits, shape: AttentionShape) -> dict[str, Any]:
    """The OpenAPI document of a service with these limits, made once."""
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
