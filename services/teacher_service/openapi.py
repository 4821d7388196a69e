"""The description of the API at `/openapi.json`: what FastAPI cannot see by itself, bodies that are not its models.

`app.py` gives its pieces to the routes; `docs/api.md` says the same with examples.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from serving.http.openapi import TENSOR, describe_app, list_of, whole
from teacher_proto.requests import Kind, Limits
from teacher_proto.targets import TENSORS
from teacher_proto.wire import records as wire
from teacher_service.compat import completion_fields, sglang_fields, token_fields
from teacher_service.compat.requests import Fields

_DESCRIPTION = """One teacher, many students: POST token ids, get for every position what a student needs to imitate
the teacher. Bodies are msgpack (WIRE.md is the specification) or JSON. Every answer carries `X-Request-Id`; a request
may bring its own."""


def _request(limits: Limits, kinds: tuple[Kind, ...], *, packed: bool) -> dict[str, Any]:
    """The body of `POST /v1/targets` with the limits of this very teacher."""
    ids = list_of(whole(0, limits.vocab_size - 1), 1, limits.max_sequence_length)
    many = limits.max_sequences
    temperature = {"type": "number", "minimum": 0.001, "maximum": 1000}
    gathered = list_of(list_of(whole(0, limits.vocab_size - 1), 1, limits.max_gather), 1, limits.max_sequence_length)
    sequence = {"anyOf": [ids, TENSOR]} if packed else ids
    fields = {
        "sequences": list_of(sequence, 1, many, description="token ids of each sequence"),
        "kinds": list_of({"enum": list(kinds)}, 1, len(kinds), uniqueItems=True, default=["top_k"]),
        "top_k": whole(0, limits.max_top_k, default=64, description="kind top_k: from 1 to the vocabulary"),
        "temperatures": list_of(
            temperature, 0, limits.max_temperatures, default=[], description="temperatures to be exact at; 1 always is"
        ),
        "fingerprint": {"type": ["string", "null"], "description": "the teacher that must answer"},
        "rows": list_of(
            list_of(whole(0, limits.max_sequence_length), 2, 2), 1, many, type=["array", "null"],
            description="a [start, stop) for each sequence; all rows if absent",
        ),
        "gather_ids": list_of(
            {"anyOf": [gathered, TENSOR]} if packed else gathered, 1, many, type=["array", "null"],
            description="kind gather: the ids to score, a row of them for each row asked, for each sequence",
        ),
        "num_samples": whole(0, limits.max_samples, default=50, description="kind sampled: draws a row, 1 or more"),
        "sample_temperature": temperature | {"default": 1.0},
        "seed": whole(0, 2**63 - 1, default=0),
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
_GENERATED = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "output_ids": {"type": "array"}, "meta_info": {"type": "object"}},
    "required": ["text", "output_ids", "meta_info"],
}
SGLANG_ANSWER: dict[str, Any] = {
    "description": "SGLang's answer: `meta_info` with `input_token_logprobs`, in a list where several sequences came",
    "content": {wire.JSON: {"schema": {"anyOf": [_GENERATED, {"type": "array", "items": _GENERATED}]}}},
}
TOKENS_ANSWER: dict[str, Any] = {
    "description": "vLLM's answer: `prompt_logprobs`, and `prompt_token_id_logprobs` as an `.npy` in base64",
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
HEAD_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "safetensors: weight [V, D], bias where there is one, scale, soft_cap; sha256 in Repr-Digest",
        "content": _HEAD_CONTENT,
    },
    206: {"description": "the part that a Range header asks for", "content": _HEAD_CONTENT},
}


def describe(app: FastAPI, limits: Limits, kinds: tuple[Kind, ...]) -> dict[str, Any]:
    """The OpenAPI document of a teacher with these limits, made once."""
    bodies = {
        "/v1/targets": _targets_body(limits, kinds), "/v1/completions": _completions_body(),
        "/generate": _sglang_body(), "/inference/v1/generate": _tokens_body(),
    }  # fmt: skip
    return describe_app(app, _DESCRIPTION, bodies)


def _targets_body(limits: Limits, kinds: tuple[Kind, ...]) -> dict[str, Any]:
    example = {"sequences": [[1, 2, 3]], "top_k": 2, "temperatures": [2.0]}
    return {
        wire.JSON: {"schema": _request(limits, kinds, packed=False), "example": example},
        wire.MSGPACK: {"schema": _request(limits, kinds, packed=True)},
    }


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
    """The schema of another server's body: the fields that are read, and what becomes of the others."""
    schema = kind.model_json_schema()
    schema.pop("$defs", None)
    ignored = {field: {"description": why} for why, fields in without_effect.items() for field in fields}
    refused = {
        field: {"enum": [*values, None], "description": "others are refused"} for field, values in neutral.items()
    }
    return schema | {"properties": schema["properties"] | ignored | refused, "additionalProperties": False}
