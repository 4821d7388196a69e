"""`POST /inference/v1/generate` in vLLM's JSON, for trainers that send token ids, such as prime-rl. Used by `app.py`.

A teacher scores: `max_tokens` is 0, or 1 for the most likely next token. How every field is treated is in
`token_fields.py`. `prompt_logprobs` are those of `/v1/completions`; the logprobs of given ids are targets of kind
`gather`, returned as the bytes of an `.npy` file in base64.
"""

from __future__ import annotations

import base64
import io
import json
import time
from typing import Any

import numpy as np

from serving.http.replies import JSON_WEIGHT, Work
from serving.http.streams import Outlet
from teacher_proto.requests import Kind, Query, TargetsRequest
from teacher_proto.targets import TokenTargets
from teacher_service.compat.completion_json import LOWEST, at_temperature, prompt_logprobs
from teacher_service.compat.requests import Face, check_cost, check_model, checked_work
from teacher_service.compat.token_fields import SamplingParams, TokenRequest, read_tokens
from teacher_service.compat.writing import encoded
from teacher_service.service import TeacherService
from teacher_service.text import JsonPieces, Text

_OUR_NAMES = {"sequences.0": "token_ids", "sequences": "token_ids", "temperatures.0": "sampling_params.temperature",
              "gather_ids.0": "sampling_params.prompt_logprob_token_ids"}  # fmt: skip
# A gathered value takes some six bytes as base64 of a float32, two on our wire, and is never a Python number.
_BASE64_WEIGHT = JSON_WEIGHT // 2


def parse(body: dict[str, Any], service: TeacherService) -> TokenRequest:
    """A request that this teacher can serve. OutOfRangeError or NotFoundError names a field that it can't."""
    request = read_tokens(body, service.engine.limits)
    check_model(request.model, service)
    return request


async def work_of(request: TokenRequest, service: TeacherService, client: str, request_id: str) -> Work[Query]:
    """The request as one for targets. OutOfRangeError if the prompt or its response would be too long."""
    params, length = request.sampling_params, len(request.token_ids)
    gathers, temperature = params.prompt_logprob_token_ids is not None, params.scoring_temperature
    tempered = temperature is not None and not gathers
    top_k = max(params.prompt_logprobs or 0, params.logprobs or 0, 1 if params.max_tokens or tempered else 0)
    kinds: tuple[Kind, ...] = ("top_k",) if top_k else ("score",)
    weight = _BASE64_WEIGHT if gathers and not params.prompt_logprobs else JSON_WEIGHT
    # All rows, like the other compatible routes, so that results are shared; for given ids alone, only their rows.
    alone = gathers and params.prompt_logprobs is None
    rows = (params.prompt_logprob_start or 0 if alone else 0, length - 1 if alone and not params.max_tokens else length)
    gathered: tuple[np.ndarray, ...] | None = None
    if gathers:
        kinds = (*kinds, "gather")
        width = max(map(len, params.prompt_logprob_token_ids or []))
        # Before the ids are copied into an array of all rows.
        check_cost("token_ids", length, top_k + width, service, weight)
        gathered = (_gather_ids(params, rows, width),)
    targets = TargetsRequest(
        sequences=(request.token_ids,), kinds=kinds, top_k=top_k or 1, rows=(rows,), gather_ids=gathered,
        temperatures=() if temperature is None else (temperature,),
    )  # fmt: skip
    return checked_work(targets, _OUR_NAMES, service, client, request_id, weight)


def _gather_ids(params: SamplingParams, rows: tuple[int, int], width: int) -> np.ndarray:
    """The ids to score at every requested row [R, G]; 0 as padding, whose score is not read."""
    assert params.prompt_logprob_token_ids is not None
    ids_RG = np.zeros((rows[1] - rows[0], width), dtype=np.int64)
    for row, ids in enumerate(params.prompt_logprob_token_ids, (params.prompt_logprob_start or 0) - rows[0]):
        ids_RG[row, : len(ids)] = np.maximum(ids, 0)
    return ids_RG


async def answer(
    request: TokenRequest, work: Work[Query], service: TeacherService, text: Text, pieces: JsonPieces, outlet: Outlet
) -> None:
    """Write the response for the one prompt. It contains no text, so `text` is not used."""

    def body_of(index: int, query: Query, targets: TokenTargets) -> list[bytes]:
        return _body(request, work, targets, service, pieces)

    body = (await encoded(work, service, body_of))[0]
    await outlet.start("application/json")
    for piece in body[:-1]:
        await outlet.write(piece)
    await outlet.write(body[-1], last=True)


def _body(
    request: TokenRequest, work: Work[Query], targets: TokenTargets, service: TeacherService, pieces: JsonPieces
) -> list[bytes]:
    """The whole response as JSON, in pieces. CPU work, run in a thread."""
    params, tokens_T = request.sampling_params, work.jobs[0].query.tokens_T
    count, written = (
        len(tokens_T),
        targets.ids[-1, :1].tolist() if params.max_tokens and targets.ids is not None else [],
    )
    choice = {
        "index": 0, "finish_reason": "length", "stop_reason": None, "token_ids": written,
        "logprobs": _written_logprobs(targets, params.logprobs) if written and params.logprobs is not None else None,
    }  # fmt: skip
    head = {
        "request_id": work.request_id, "model": service.engine.identity.semantic.model, "created": int(time.time()),
        "usage": {"prompt_tokens": count, "completion_tokens": len(written), "total_tokens": count + len(written)},
        "output_mode": "tokens", "prompt_token_ids": tokens_T.tolist() if request.return_token_ids else None,
        "choices": [choice],
    }  # fmt: skip
    targets = at_temperature(targets, params.scoring_temperature)
    listed, scores = [b"null"], [b"null"]
    if params.prompt_logprobs is not None:
        listed = prompt_logprobs(tokens_T, targets, params.prompt_logprobs, pieces)
    if params.prompt_logprob_token_ids is not None:
        buffer = io.BytesIO()
        np.save(buffer, _given_logprobs(params, tokens_T, targets))
        scores = [b'"', base64.b64encode(buffer.getbuffer()), b'"']
    start = json.dumps(head).encode()[:-1] + b', "prompt_logprobs": '
    return [start, *listed, b', "prompt_token_id_logprobs": ', *scores, b"}"]


def _written_logprobs(targets: TokenTargets, top_k: int) -> dict[str, Any]:
    """vLLM's logprobs of the generated token, at temperature 1: its own, and the `top_k` most likely, at least one."""
    assert targets.ids is not None and targets.logprobs is not None
    values = np.maximum(np.round(targets.logprobs[-1].astype(np.float64), 5), LOWEST).tolist()
    top = [
        {"token_id": token, "logprob": value, "rank": rank}
        for rank, (token, value) in enumerate(zip(targets.ids[-1].tolist(), values, strict=True), 1)
    ][: max(top_k, 1)]
    return {"content": [top[0] | {"top_logprobs": top}]}


def _given_logprobs(params: SamplingParams, tokens_T: np.ndarray, targets: TokenTargets) -> np.ndarray:
    """Logprobs of the given ids [rows, ids] in fp32, minus infinity where a row was padded. That of the actual token
    has fp32 precision; the others were fp16."""
    start = params.prompt_logprob_start or 0
    assert params.prompt_logprob_token_ids is not None and targets.gather_logprobs is not None
    assert targets.next_logprob is not None
    rows = slice(start - targets.start, len(tokens_T) - 1 - targets.start)
    scores_RG = targets.gather_logprobs[rows].astype(np.float32)
    ids_RG = np.full(scores_RG.shape, -1)
    for row, ids in enumerate(params.prompt_logprob_token_ids):
        ids_RG[row, : len(ids)] = ids
    came_R1, next_R1 = tokens_T[start + 1 :, None], targets.next_logprob[rows, None]
    return np.where(ids_RG == came_R1, next_R1, np.where(ids_RG < 0, -np.inf, scores_RG)).astype(np.float32)


FACE = Face(parse, work_of, answer)
