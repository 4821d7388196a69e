"""The description of the API at `/openapi.json`: what FastAPI cannot infer, such as bodies that are not its models.

`app.py` attaches its parts to the routes; `docs/api.md` says the same with examples.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from serving.http.openapi import describe_app, items_of, list_of, records_response, request_body, whole, within
from teacher_proto.requests import Kind, Limits, TargetsRequest
from teacher_proto.targets import TENSORS
from teacher_proto.wire import records as wire
from teacher_service.compat import completion_fields, sglang_fields, token_fields
from teacher_service.compat.requests import Fields
from teacher_service.engines.protocol import Engine

_DESCRIPTION = """One teacher, many students: POST token ids, and get the teacher's distribution at every position.
Bodies are msgpack (specified in WIRE.md) or JSON. Every response carries `X-Request-Id`; a request may supply its
own."""


TARGETS_RESPONSE = records_response("targets", wire.Header, TENSORS, {"start": {"type": "integer"}})
COMPLETIONS_ANSWER: dict[str, Any] = {
    "description": "vLLM's response: `choices` with `prompt_logprobs` and `logprobs`",
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
_GENERATED = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "output_ids": {"type": "array"}, "meta_info": {"type": "object"}},
    "required": ["text", "output_ids", "meta_info"],
}
SGLANG_ANSWER: dict[str, Any] = {
    "description": "SGLang's response: `meta_info` with `input_token_logprobs`; a list if there are several sequences",
    "content": {wire.JSON: {"schema": {"anyOf": [_GENERATED, {"type": "array", "items": _GENERATED}]}}},
}
TOKENS_RESPONSE: dict[str, Any] = {
    "description": "vLLM's response: `prompt_logprobs`, and `prompt_token_id_logprobs` as an `.npy` in base64",
    "content": {
        wire.JSON: {
            "schema": {
                "type": "object",
                "properties": {
                    "request_id": {"type": "string"}, "choices": {"type": "array"},
                    "prompt_logprobs": {"type": ["array", "null"]},
                    "prompt_token_id_logprobs": {"type": ["string", "null"]},
                },
                "required": ["request_id", "choices", "prompt_logprobs", "prompt_token_id_logprobs"],
            }
        }
    },
}  # fmt: skip
_HEAD_CONTENT = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
HEAD_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "safetensors: weight [V, D], bias if there is one, scale, soft_cap; sha256 in Repr-Digest",
        "content": _HEAD_CONTENT,
    },
    206: {"description": "the part that a Range header requests", "content": _HEAD_CONTENT},
}


def describe(engine: Engine, app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of a started engine's service, made once."""
    bodies = {
        "/v1/targets": _targets_body(engine.limits, engine.kinds), "/v1/completions": _completions_body(),
        "/generate": _sglang_body(), "/inference/v1/generate": _tokens_body(),
    }  # fmt: skip
    return describe_app(app, _DESCRIPTION, bodies)


def _targets_body(limits: Limits, kinds: tuple[Kind, ...]) -> dict[str, Any]:
    """The body of `POST /v1/targets` with the limits of this teacher."""
    longest, many = limits.max_sequence_length, items_of(1, limits.max_sequences)
    token, temperature = whole(0, limits.vocab_size - 1), within(0.001, 1000)
    bounds = {
        "sequences": many,
        "kinds": items_of(1, len(kinds), items={"enum": list(kinds)}, uniqueItems=True),
        "top_k": within(0, limits.max_top_k),
        "temperatures": items_of(0, limits.max_temperatures, items={"type": "number"} | temperature),
        "rows": many | {"items": list_of(whole(0, longest), 2, 2)},
        "gather_ids": many,
        "num_samples": within(0, limits.max_samples),
        "sample_temperature": temperature,
        "seed": within(0, 2**63 - 1),
    }
    arrays = {
        "sequences": list_of(token, 1, longest),
        "gather_ids": list_of(list_of(token, 1, limits.max_gather), 1, longest),
    }
    example = {"sequences": [[1, 2, 3]], "top_k": 2, "temperatures": [2.0]}
    return request_body(TargetsRequest, bounds, arrays, example)


def _completions_body() -> dict[str, Any]:
    example = {"prompt": [1, 2, 3], "max_tokens": 0, "prompt_logprobs": 2}
    theirs = completion_fields
    schema = _theirs(theirs.CompletionRequest, theirs.WITHOUT_EFFECT, theirs.NEUTRAL)
    return {wire.JSON: {"schema": schema, "example": example}}


def _sglang_body() -> dict[str, Any]:
    example = {
        "input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 0}, "return_logprob": True,
        "logprob_start_len": 0, "top_logprobs_num": 2,
    }  # fmt: skip
    theirs = sglang_fields
    schema = _theirs(theirs.GenerateRequest, theirs.WITHOUT_EFFECT, theirs.NEUTRAL)
    schema["properties"]["sampling_params"] = _theirs(
        theirs.SamplingParams, theirs.SAMPLING_WITHOUT_EFFECT, theirs.SAMPLING_NEUTRAL
    )
    return {wire.JSON: {"schema": schema, "example": example}}


def _tokens_body() -> dict[str, Any]:
    params = {"max_tokens": 0, "prompt_logprob_token_ids": [[2, 5], [3, 9]]}
    theirs = token_fields
    schema = _theirs(theirs.TokenRequest, theirs.WITHOUT_EFFECT, theirs.NEUTRAL)
    schema["properties"]["sampling_params"] = _theirs(
        theirs.SamplingParams, theirs.SAMPLING_WITHOUT_EFFECT, theirs.SAMPLING_NEUTRAL
    )
    return {wire.JSON: {"schema": schema, "example": {"token_ids": [1, 2, 3], "sampling_params": params}}}


def _theirs(kind: type[BaseModel], without_effect: Fields, neutral: Fields) -> dict[str, Any]:
    """The schema of another server's body: the fields that are read, and how the others are treated."""
    schema = kind.model_json_schema()
    schema.pop("$defs", None)
    ignored = {field: {"description": why} for why, fields in without_effect.items() for field in fields}
    refused = {
        field: {"enum": [*values, None], "description": "others are refused"} for field, values in neutral.items()
    }
    return schema | {"properties": schema["properties"] | ignored | refused, "additionalProperties": False}
