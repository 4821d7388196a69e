"""`POST /v1/completions` and `GET /v1/models` in vLLM's JSON, for trainers written for vLLM. Used by `app.py`.

A teacher scores and does not generate: `max_tokens` is 0, or 1 for clients that must request one, which get the most
likely token. How every other field is treated is in `completion_fields.py`.
"""

from __future__ import annotations

import json
import time
from functools import partial
from typing import Any

import numpy as np

from serving.http.replies import Work
from serving.http.streams import Outlet
from teacher_proto.request_checks import within
from teacher_proto.requests import Query, TargetsRequest
from teacher_proto.targets import TokenTargets
from teacher_service.compat.completion_fields import CompletionRequest, read_completion
from teacher_service.compat.completion_json import (
    at_temperature,
    next_token_logprobs,
    openai_logprobs,
    prompt_logprobs,
)
from teacher_service.compat.requests import Face, check_model, checked_work
from teacher_service.compat.writing import encoded, write_items
from teacher_service.service import TeacherService
from teacher_service.text import JsonPieces, Text

_OUR_NAMES = {"sequences": "prompt", "temperatures.0": "temperature"}


def parse(body: dict[str, Any], service: TeacherService) -> CompletionRequest:
    """A request that this teacher can serve. OutOfRangeError or NotFoundError names a field that it can't."""
    limits = service.engine.limits
    request = read_completion(body, min(limits.max_top_k, limits.vocab_size))
    check_model(request.model, service)
    return request


async def work_of(request: CompletionRequest, service: TeacherService, client: str, request_id: str) -> Work[Query]:
    """The request as one for targets. OutOfRangeError if a prompt or its response would be too long."""
    prompt = request.prompt
    prompts: Any = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
    if prompts and isinstance(prompts[0], str):
        within("prompt", len(prompts), 1, service.engine.limits.max_sequences, "prompts per request")
        text, _ = await service.text()
        sequences = await service.tokenising.run(client, partial(text.encode, prompts, request.add_special_tokens))
    else:
        sequences = prompts
    top_k, temperature = request.top_k, request.scoring_temperature
    targets = TargetsRequest(
        sequences=tuple(sequences), kinds=("top_k",) if top_k else ("score",), top_k=top_k or 1,
        temperatures=() if temperature is None or not request.lists_prompt else (temperature,),
    )  # fmt: skip
    return checked_work(targets, _OUR_NAMES, service, client, request_id)


async def answer(
    request: CompletionRequest,
    work: Work[Query],
    service: TeacherService,
    text: Text,
    pieces: JsonPieces,
    outlet: Outlet,
) -> None:
    """Write the completion."""

    def choice(index: int, query: Query, targets: TokenTargets) -> list[bytes]:
        return _choice(index, query.tokens_T, targets, request, text, pieces)

    choices = await encoded(work, service, choice)
    prompt_tokens = sum(job.query.num_tokens for job in work.jobs)
    written = len(choices) * (request.max_tokens or 0)
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written}
    head = {
        "id": f"cmpl-{work.request_id}", "object": "text_completion", "created": int(time.time()),
        "model": service.engine.identity.semantic.model, "system_fingerprint": service.engine.identity.fingerprint,
        "usage": usage,
    }  # fmt: skip
    await outlet.start("application/json")
    await outlet.write(json.dumps(head).encode()[:-1] + b', "choices": [')
    await write_items(choices, outlet)
    await outlet.write(b"]}", last=True)


def _choice(
    index: int, tokens_T: np.ndarray, targets: TokenTargets, request: CompletionRequest, text: Text, pieces: JsonPieces
) -> list[bytes]:
    """One element of `choices` as JSON, in pieces."""
    generated = int(targets.ids[-1, 0]) if request.max_tokens and targets.ids is not None else None
    as_ids = bool(request.return_tokens_as_token_ids) or not text.available
    written = "" if generated is None else text.decode([generated])
    fields: dict[str, Any] = {
        "index": index, "text": (text.decode(tokens_T.tolist()) if request.echo else "") + written,
        "finish_reason": "length", "stop_reason": None,
    }  # fmt: skip
    if request.return_token_ids:
        fields |= {
            "prompt_token_ids": tokens_T.tolist(), "token_ids": [] if generated is None else [generated]
        }  # fmt: skip
    logprobs = listed = [b"null"]
    if request.logprobs is not None and request.echo:
        logprobs = openai_logprobs(tokens_T, targets, request.logprobs, text, as_ids, generated)
    elif request.logprobs is not None and generated is not None:
        logprobs = next_token_logprobs(targets, generated, request.logprobs, text, as_ids)
    top_k = request.prompt_logprobs if request.prompt_logprobs is not None else request.logprobs
    if request.lists_prompt:
        listed = prompt_logprobs(tokens_T, at_temperature(targets, request.scoring_temperature), top_k or 0, pieces)
    start = json.dumps(fields).encode()[:-1] + b', "logprobs": '
    return [start, *logprobs, b', "prompt_logprobs": ', *listed, b"}"]


def models(service: TeacherService) -> dict[str, Any]:
    """The body of `GET /v1/models`."""
    card = {
        "id": service.engine.identity.semantic.model, "object": "model", "created": 0, "owned_by": "stillhouse",
        "root": service.settings.model, "parent": None,
        "max_model_len": service.engine.limits.max_sequence_length,
    }  # fmt: skip
    return {"object": "list", "data": [card]}


FACE = Face(parse, work_of, answer)
