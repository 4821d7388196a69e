"""Every kind of bad request has its documented status, code, field, got and limit, and the engine never hears of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx
import msgpack
import numpy as np
import pytest
import pytest_asyncio
from pydantic import BaseModel, ValidationError

from teacher_proto.attention import AttentionRequest
from teacher_proto.requests import TargetsRequest
from teacher_proto.wire import records as wire
from teacher_proto.wire.tensors import encode_tensor
from teacher_service.app import create_app
from teacher_service.compat.completion_fields import CompletionRequest
from teacher_service.compat.sglang_fields import GenerateRequest
from teacher_service.compat.token_fields import TokenRequest
from teacher_service.engines.scripted import Script, ScriptedEngine
from teacher_service.service import TeacherService
from teacher_service.settings import TeacherSettings

VOCAB, LONGEST = 512, 2048
ABSENT = object()


@dataclass
class Bench:
    client: httpx.AsyncClient
    engine: ScriptedEngine


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    engine = ScriptedEngine(Script(vocab_size=VOCAB, max_sequence_length=LONGEST))
    service = TeacherService(engine, TeacherSettings(model="scripted", engine="scripted"))
    await service.start()
    transport = httpx.ASGITransport(create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://teacher") as client:
        yield Bench(client, engine)


def tensor(ids: Any, dtype: str = "<i4") -> dict[str, Any]:
    return encode_tensor(np.array(ids, dtype=dtype))


GOOD = [1, 2, 3]
# name: (body, status, code, field, got, limit); got and limit may be left open.
CASES: dict[str, tuple[dict[str, Any], int, str, str, Any, Any]] = {
    "no sequence": ({"sequences": []}, 422, "out_of_range", "sequences", 0, 1),
    "an empty sequence": ({"sequences": [GOOD, []]}, 422, "out_of_range", "sequences.1", 0, 1),
    "an empty tensor": ({"sequences": [tensor([])]}, 422, "out_of_range", "sequences.0", 0, 1),
    "an id of V": ({"sequences": [[0, VOCAB]]}, 422, "out_of_range", "sequences.0", VOCAB, VOCAB - 1),
    "an id of -1": ({"sequences": [tensor([5, -1])]}, 422, "out_of_range", "sequences.0", -1, VOCAB - 1),
    "an id that is true": ({"sequences": [[1, True]]}, 422, "out_of_range", "sequences.0", ABSENT, ABSENT),
    "an id that is a float": ({"sequences": [[1, 2.0]]}, 422, "out_of_range", "sequences.0", ABSENT, ABSENT),
    "an id beyond 64 bits": ({"sequences": [[2**63]]}, 422, "out_of_range", "sequences.0", ABSENT, ABSENT),
    "a tensor of floats": ({"sequences": [tensor(GOOD, "<f4")]}, 422, "out_of_range", "sequences.0", ABSENT, ABSENT),
    "a tensor of two axes": ({"sequences": [tensor([GOOD])]}, 422, "out_of_range", "sequences.0", ABSENT, ABSENT),
    "a sequence that is a string": ({"sequences": ["abc"]}, 422, "out_of_range", "sequences.0", "'abc'", ABSENT),
    "a sequence one too long": (
        {"sequences": [tensor([1] * (LONGEST + 1))]}, 422, "out_of_range", "sequences.0", LONGEST + 1, LONGEST,
    ),
    "a list one too long": (
        {"sequences": [[1] * (LONGEST + 1)]}, 422, "out_of_range", "sequences.0", LONGEST + 1, LONGEST,
    ),
    "too many sequences": ({"sequences": [[1]] * 257}, 422, "out_of_range", "sequences", 257, 256),
    "too many tokens": (
        {"sequences": [tensor([1] * LONGEST)] * 65}, 422, "out_of_range", "sequences", 65 * LONGEST, 131_072,
    ),
    "K of 0": ({"sequences": [GOOD], "top_k": 0}, 422, "out_of_range", "top_k", 0, 1),
    "K of -1": ({"sequences": [GOOD], "top_k": -1}, 422, "out_of_range", "top_k", -1, 1),
    "K of 10^9": ({"sequences": [GOOD], "top_k": 10**9}, 422, "out_of_range", "top_k", 10**9, 256),
    "K of true": ({"sequences": [GOOD], "top_k": True}, 422, "out_of_range", "top_k", "True", ABSENT),
    "K of 2.5": ({"sequences": [GOOD], "top_k": 2.5}, 422, "out_of_range", "top_k", "2.5", ABSENT),
    "K as text": ({"sequences": [GOOD], "top_k": "64"}, 422, "out_of_range", "top_k", "'64'", ABSENT),
    "an unknown field": ({"sequences": [GOOD], "topk": 4}, 400, "malformed", "topk", None, None),
    "no field sequences": ({"top_k": 4}, 400, "malformed", "sequences", None, None),
    "another teacher": (
        {"sequences": [GOOD], "fingerprint": "0" * 32 + "." + "0" * 16}, 409, "wrong_teacher", "fingerprint",
        "0" * 32 + "." + "0" * 16, ABSENT,
    ),
    "an unknown kind": ({"sequences": [GOOD], "kinds": ["logits"]}, 422, "out_of_range", "kinds.0", "'logits'", ABSENT),
    "no kind": ({"sequences": [GOOD], "kinds": []}, 422, "out_of_range", "kinds", [], ABSENT),
    "a kind twice": (
        {"sequences": [GOOD], "kinds": ["score", "score"]}, 422, "out_of_range", "kinds", ["score", "score"], ABSENT,
    ),
    "temperature 0": (
        {"sequences": [GOOD], "temperatures": [1.0, 0]}, 422, "out_of_range", "temperatures.1", 0.0, [1e-3, 1e3],
    ),
    "temperature true": (
        {"sequences": [GOOD], "temperatures": [True]}, 422, "out_of_range", "temperatures.0", "True", ABSENT,
    ),
    "temperature NaN": (
        {"sequences": [GOOD], "temperatures": [float("nan")]}, 422, "out_of_range", "temperatures.0", "nan", ABSENT,
    ),
    "temperature infinite": (
        {"sequences": [GOOD], "temperatures": [float("inf")]}, 422, "out_of_range", "temperatures.0", "inf", ABSENT,
    ),
    "nine temperatures": ({"sequences": [GOOD], "temperatures": [2] * 9}, 422, "out_of_range", "temperatures", 9, 8),
    "rows for too few": ({"sequences": [GOOD] * 2, "rows": [[0, 1]]}, 422, "out_of_range", "rows", 1, 2),
    "rows beyond the end": ({"sequences": [GOOD], "rows": [[0, 4]]}, 422, "out_of_range", "rows.0", [0, 4], 3),
    "rows backwards": ({"sequences": [GOOD], "rows": [[2, 1]]}, 422, "out_of_range", "rows.0", [2, 1], 3),
    "rows of three": ({"sequences": [GOOD], "rows": [[0, 1, 2]]}, 422, "out_of_range", "rows.0", ABSENT, ABSENT),
    "gather without ids": ({"sequences": [GOOD], "kinds": ["gather"]}, 422, "out_of_range", "gather_ids", None, 1),
    "gather of too few rows": (
        {"sequences": [GOOD], "kinds": ["gather"], "gather_ids": [tensor([[1]] * 2)]},
        422, "out_of_range", "gather_ids.0", 2, 3,
    ),
    "gather of an id of V": (
        {"sequences": [GOOD], "kinds": ["gather"], "gather_ids": [tensor([[VOCAB]] * 3)]},
        422, "out_of_range", "gather_ids.0", VOCAB, VOCAB - 1,
    ),
    "gather of 257 ids": (
        {"sequences": [GOOD], "kinds": ["gather"], "gather_ids": [tensor([[1] * 257] * 3)]},
        422, "out_of_range", "gather_ids.0", 257, 256,
    ),
    "gather of no ids": (
        {"sequences": [GOOD], "kinds": ["gather"], "gather_ids": [tensor(np.zeros((3, 0)))]},
        422, "out_of_range", "gather_ids.0", 0, 1,
    ),
    "no sample": (
        {"sequences": [GOOD], "kinds": ["sampled"], "num_samples": 0}, 422, "out_of_range", "num_samples", 0, 1,
    ),
    "too many samples": (
        {"sequences": [GOOD], "kinds": ["sampled"], "num_samples": 4097},
        422, "out_of_range", "num_samples", 4097, 4096,
    ),
    "samples at temperature 0": (
        {"sequences": [GOOD], "kinds": ["sampled"], "sample_temperature": 0.0},
        422, "out_of_range", "sample_temperature", 0.0, [1e-3, 1e3],
    ),
    "a negative seed": (
        {"sequences": [GOOD], "kinds": ["sampled"], "seed": -1}, 422, "out_of_range", "seed", -1, 0,
    ),
    "hidden states in float64": (
        {"sequences": [GOOD], "kinds": ["hidden"], "hidden_dtype": "float64"},
        422, "out_of_range", "hidden_dtype", "'float64'", ABSENT,
    ),
    "a tensor with too few bytes": (
        {"sequences": [{"dtype": "<i4", "shape": [4], "data": b"123"}]}, 400, "malformed", "body", None, None,
    ),
    "a tensor of a dtype that is not on the wire": (
        {"sequences": [{"dtype": "<i8", "shape": [1], "data": b"12345678"}]}, 400, "malformed", "body", None, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
async def test_a_bad_value_names_field_got_and_limit(bench: Bench, name: str) -> None:
    body, status, code, field, got, limit = CASES[name]
    response = await bench.client.post(
        "/v1/targets", content=msgpack.packb(body), headers={"Content-Type": wire.MSGPACK, "X-Request-Id": "mine-1"}
    )
    answer = response.json()
    assert (response.status_code, answer["code"], answer["field"]) == (status, code, field)
    if got is not ABSENT:
        assert answer["got"] == got
    if limit is not ABSENT:
        assert answer["limit"] == limit
    assert answer["request_id"] == response.headers["x-request-id"] == "mine-1"
    assert answer["retryable"] is False and len(answer["message"]) < 300
    assert bench.engine.jobs_started == 0


WHOLE = msgpack.packb({"sequences": [tensor(GOOD)]})
RAW: dict[str, tuple[bytes, dict[str, str], int, str, str]] = {
    "no body": (b"", {}, 400, "malformed", "body"),
    "a body cut short": (WHOLE[:-1], {}, 400, "malformed", "body"),
    "a byte too many": (WHOLE + b"\x00", {}, 400, "malformed", "body"),
    "not a map": (msgpack.packb([1, 2]), {}, 400, "malformed", "body"),
    "a key twice": (b"\x82\xa5top_k\x01\xa5top_k\x02", {}, 400, "malformed", "body"),
    "an extension type": (msgpack.packb({"sequences": msgpack.ExtType(4, b"1")}), {}, 400, "malformed", "body"),
    "text that is not UTF-8": (b"\x81\xa9sequences\xa2\xff\xff", {}, 400, "malformed", "body"),
    "nested too deep": (b"\x91" * 5000, {}, 400, "malformed", "body"),
    "JSON cut short": (b'{"sequences": [[1]', {"Content-Type": wire.JSON}, 400, "malformed", "body"),
    "JSON that is a list": (b"[[1]]", {"Content-Type": wire.JSON}, 400, "malformed", "body"),
    "JSON with a key twice": (
        b'{"top_k": 1, "top_k": 2, "sequences": [[1]]}', {"Content-Type": wire.JSON}, 400, "malformed", "body"),
    "JSON nested too deep": (b"[" * 100_000, {"Content-Type": wire.JSON}, 400, "malformed", "body"),
    "JSON with a lone surrogate": (
        b'{"sequences": [[1]], "fingerprint": "\\ud800"}', {"Content-Type": wire.JSON}, 400, "malformed", "body"),
    "JSON with a surrogate in its bytes": (
        b'{"sequences": [[1]], "fingerprint": "\xed\xa0\x80"}', {"Content-Type": wire.JSON}, 400, "malformed", "body"),
    "JSON in UTF-16 with a lone surrogate": (
        '{"sequences": [], "fingerprint": "\\ud800"}'.encode("utf-16"), {"Content-Type": wire.JSON}, 400, "malformed",
        "body",
    ),
    "JSON with a huge number": (
        b'{"sequences": [[1]], "top_k": 1' + b"0" * 5000 + b"}", {"Content-Type": wire.JSON}, 400, "malformed", "body"),
    "no content type": (WHOLE, {"Content-Type": ""}, 415, "unsupported_type", "Content-Type"),
    "another content type": (WHOLE, {"Content-Type": "text/plain"}, 415, "unsupported_type", "Content-Type"),
    "gzip": (WHOLE, {"Content-Encoding": "gzip"}, 415, "unsupported_type", "Content-Encoding"),
    "a body too large": (b"\x00" * (16 * 2**20 + 1), {}, 413, "too_large", "body"),
    "JSON too large": (b" " * (2**20 + 1), {"Content-Type": wire.JSON}, 413, "too_large", "body"),
    "JSON too large, in capitals": (b" " * (2**20 + 1), {"Content-Type": "Application/JSON"}, 413, "too_large", "body"),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
async def test_bytes_that_are_no_request_are_refused(bench: Bench, name: str) -> None:
    content, headers, status, code, field = RAW[name]
    response = await bench.client.post("/v1/targets", content=content, headers={"Content-Type": wire.MSGPACK} | headers)
    answer = response.json()
    assert (response.status_code, answer["code"], answer["field"]) == (status, code, field)
    assert bench.engine.jobs_started == 0


MANY = [None] * 1000
LISTS: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (TargetsRequest, {"sequences": MANY}),
    *((TargetsRequest, {"sequences": [GOOD], name: MANY}) for name in ("kinds", "temperatures", "rows", "gather_ids")),
    (AttentionRequest, {"sequences": [GOOD], "rows": MANY}),
    (CompletionRequest, {"prompt": MANY}),
    (CompletionRequest, {"prompt": [GOOD, *MANY]}),
    (CompletionRequest, {"prompt": [MANY] * 9}),
    (CompletionRequest, {"prompt": ["a", *MANY]}),
    (GenerateRequest, {"input_ids": MANY, "logprob_start_len": MANY, "token_ids_logprob": [MANY] * 9}),
    (TokenRequest, {"token_ids": MANY, "sampling_params": {"prompt_logprob_token_ids": [MANY] * 9}}),
]


@pytest.mark.parametrize(("kind", "body"), LISTS)
def test_a_list_is_read_up_to_its_first_bad_item(kind: type[BaseModel], body: dict[str, Any]) -> None:
    """A million errors of one body take pydantic ten seconds, during which the event loop does nothing else."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 12


async def test_json_answers_are_limited_in_size_and_msgpack_ones_are_not(bench: Bench) -> None:
    body = {"sequences": [[1] * LONGEST] * 4, "top_k": 256}
    refused = await bench.client.post("/v1/targets", json=body)
    assert refused.status_code == 422 and refused.json()["limit"] == 2**20
    assert bench.engine.jobs_started == 0
    few = await bench.client.post("/v1/targets", json=body | {"rows": [[LONGEST - 9, LONGEST]] * 4})
    assert few.status_code == 200, "only the requested rows count"
    packed = await bench.client.post("/v1/targets", json=body, headers={"Accept": wire.MSGPACK})
    assert packed.status_code == 200 and packed.headers["content-type"] == wire.MSGPACK


async def test_paths_and_methods_that_are_not_there_are_json_too(bench: Bench) -> None:
    nothing = await bench.client.get("/v2/targets")
    assert (nothing.status_code, nothing.json()["code"]) == (404, "not_found")
    slash = await bench.client.get("/v1/teacher/")
    assert slash.status_code == 404
    wrong = await bench.client.get("/v1/targets")
    assert (wrong.status_code, wrong.json()["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST" and wrong.json()["limit"] == ["POST"]


async def test_a_request_id_that_could_forge_a_log_line_is_replaced(bench: Bench) -> None:
    for forged in ("a b", "x" * 65, '"}{"event":"root"', ""):
        response = await bench.client.get("/health/live", headers={"X-Request-Id": forged})
        assert response.headers["x-request-id"] != forged
        assert json.dumps(response.headers["x-request-id"]).strip('"').isalnum()
