"""The compatible face: `POST /v1/completions` and `GET /v1/models` in vLLM's JSON, for trainers that speak to vLLM.

A teacher scores and does not write: `max_tokens` is 0, or 1 for clients that must ask for one, which is answered with
the most likely token. Fields that cannot change a score are passed over, as vLLM's clients send many; those that would
are refused by name.
"""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, ValidationError

from serving.replies import JSON_WEIGHT, Work, outcomes
from serving.streams import Outlet
from teacher_proto.errors import NotFoundError, OutOfRangeError, StillhouseError
from teacher_proto.request_checks import within
from teacher_proto.requests import Query, TargetsRequest, check_request
from teacher_proto.targets import TokenTargets
from teacher_service.completion_json import next_token_logprobs, openai_logprobs, prompt_logprobs
from teacher_service.requests import work_of as work_of_targets
from teacher_service.service import TeacherService
from teacher_service.text import JsonPieces, Text

Ids = list[Annotated[StrictInt, Field(ge=0)]]
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "stream": (False,), "suffix": ("",), "use_beam_search": (False,), "logit_bias": ({},),
    "prompt_embeds": ([],), "truncate_prompt_tokens": (), "logprob_token_ids": ([],), "allowed_token_ids": (),
    "structured_outputs": (), "response_format": ({"type": "text"},), "guided_json": (), "guided_regex": (),
    "bad_words": ([],), "min_tokens": (0, 1),
}  # fmt: skip


class CompletionRequest(BaseModel):
    """What is read of vLLM's completion request. `prompt` is text or token ids, one or several of either."""

    model_config = ConfigDict(frozen=True, extra="allow")

    model: str | None = None
    prompt: Ids | list[Ids] | str | list[str]
    max_tokens: StrictInt | None = Field(
        16, description="0, or 1 for the most likely next token; sampling is not served"
    )
    prompt_logprobs: StrictInt | None = None
    logprobs: StrictInt | None = None
    echo: StrictBool | None = False
    add_special_tokens: StrictBool = True
    return_token_ids: StrictBool | None = None
    return_tokens_as_token_ids: StrictBool | None = None

    @property
    def top_k(self) -> int:
        """The K that the engine is asked for: 1 at least where a token is to be written."""
        asked = [self.prompt_logprobs or 0, self.logprobs or 0, 1 if self.max_tokens else 0]
        return max(asked)


def parse_completion(body: dict[str, Any], service: TeacherService) -> CompletionRequest:
    """A request that this teacher can answer. OutOfRangeError or NotFoundError names the field that it can't."""
    try:
        request = CompletionRequest.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0]) if first["loc"] else "body"
        got = repr(first["input"])[:80]
        raise OutOfRangeError(f"{field}: {first['msg']} (got {got})", field=field, got=got) from None
    names = {service.engine.identity.semantic.model, service.settings.model}
    if request.model is not None and request.model not in names:
        raise NotFoundError(
            f"the model {request.model!r} is not served here, {service.engine.identity.semantic.model!r} is",
            field="model", got=request.model, limit=sorted(names),
        )  # fmt: skip
    for field, neutral in _NEUTRAL.items():
        value = (request.model_extra or {}).get(field)
        if value is not None and value not in neutral:
            raise OutOfRangeError(
                f"{field}: this teacher scores prompts and does not sample, so it can't heed {field}", field=field,
                got=repr(value)[:80], limit=list(neutral),
            )  # fmt: skip
    if request.max_tokens is None or not 0 <= request.max_tokens <= 1:
        raise OutOfRangeError(
            f"max_tokens: got {request.max_tokens}, expected 0 or 1: this teacher scores prompts, and writes at most "
            "the most likely next token", field="max_tokens", got=request.max_tokens, limit=1,
        )  # fmt: skip
    largest = min(service.engine.limits.max_top_k, service.engine.limits.vocab_size)
    for field in ("prompt_logprobs", "logprobs"):
        value = getattr(request, field)
        if value is not None and not 0 <= value <= largest:
            raise OutOfRangeError(
                f"{field}: got {value}, expected 0 to {largest}", field=field, got=value, limit=largest
            )
    return request


async def work_of(
    request: CompletionRequest, service: TeacherService, text: Text, student: str, request_id: str
) -> Work[Query]:
    """The request as one for targets. OutOfRangeError where a prompt, or its answer, would be too long."""
    prompt = request.prompt
    prompts: Any = [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt
    if prompts and isinstance(prompts[0], str):
        within("prompt", len(prompts), 1, service.engine.limits.max_sequences, "prompts in a request")
        sequences = await service.tokenising.run(student, partial(text.encode, prompts, request.add_special_tokens))
    else:
        sequences = prompts
    top_k = request.top_k
    kinds = ("top_k",) if top_k else ("score",)
    targets = TargetsRequest(sequences=tuple(sequences), kinds=kinds, top_k=top_k or 1)
    try:
        check_request(targets, service.engine.limits, service.engine.kinds)
    except OutOfRangeError as error:
        raise OutOfRangeError(
            error.message.replace("sequences", "prompt"), field=(error.field or "").replace("sequences", "prompt"),
            got=error.got, limit=error.limit,
        ) from None  # fmt: skip
    work = work_of_targets(targets, request_id, student, service, weight=JSON_WEIGHT)
    if (cost := work.permit.cost) > (most := service.admission.max_cost):
        raise OutOfRangeError(
            f"prompt: {targets.num_tokens} tokens of {top_k} logprobs cost {cost} as JSON, of at most {most}; "
            "ask for fewer at a time, or POST /v1/targets in msgpack", field="prompt", got=cost, limit=most,
        )  # fmt: skip
    return work


async def answer(
    request: CompletionRequest,
    work: Work[Query],
    service: TeacherService,
    text: Text,
    pieces: JsonPieces,
    outlet: Outlet,
) -> None:
    """Write the completion. The first sequence that fails fails the request, as vLLM has it."""
    choices: dict[int, list[bytes]] = {}
    results = outcomes(work, service)
    async with aclosing(results):
        async for index, outcome in results:
            if isinstance(outcome, StillhouseError):
                raise outcome
            started = time.perf_counter()
            tokens_T = work.jobs[index].query.tokens_T
            choices[index] = await asyncio.to_thread(_choice, index, tokens_T, outcome, request, text, pieces)
            service.metrics.encode_seconds.labels(work.student).inc(time.perf_counter() - started)
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
    for index in range(len(choices)):
        pieces_of_it = choices.pop(index)
        pieces_of_it[0] = (b"," if index else b"") + pieces_of_it[0]
        for piece in pieces_of_it:
            await outlet.write(piece)
        del pieces_of_it
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
    if request.prompt_logprobs is not None or (request.echo and request.logprobs is not None):
        listed = prompt_logprobs(tokens_T, targets, top_k or 0, pieces)
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
