"""From another server's request to ours: the steps, checks, costs and errors that all compatible routes share.

Used by all modules of this package that read a request or make its work, by `app.py` and by `openapi.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Request
from pydantic import BaseModel, Field, StrictInt, ValidationError

from serving.http.bodies import read_json
from serving.http.replies import JSON_WEIGHT, Work
from serving.http.streams import Outlet, RacedResponse
from teacher_proto.errors import NotFoundError, OutOfRangeError, OverloadedError, StillhouseError
from teacher_proto.requests import Query, TargetsRequest, check_request
from teacher_service.service import TeacherService
from teacher_service.text import JsonPieces, Text

Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")
# Ids that don't fit a tensor are refused before one is made. Every list fails fast: to collect the errors of a hundred
# thousand items would take seconds, during which the event loop serves nobody.
Ids = Annotated[list[Annotated[StrictInt, Field(ge=0, lt=2**31)]], Field(fail_fast=True)]
ManyIds = Annotated[list[Ids], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
# An integer of any length may be sent; above this it would be no float.
MAX_TEMPERATURE = 1e300
Fields = Mapping[str, tuple[Any, ...]]

_RETRIED_STATUSES = (500, 502, 503)


@contextmanager
def retried_by_clients() -> Iterator[None]:
    """Turn retryable errors into 503: TRL's client retries only after 500, 502 and 503, slime's only after 5xx, and
    neither after 429, the status for a client that has its share in flight."""
    try:
        yield
    except StillhouseError as error:
        if not error.retryable or error.status in _RETRIED_STATUSES:
            raise
        raise OverloadedError(
            error.message, field=error.field, got=error.got, limit=error.limit, retry_after=error.retry_after
        ) from error


@dataclass(frozen=True)
class Face(Generic[T]):
    """Another server's route: `parse` reads its JSON, `work_of` turns that into work for the service, `answer` writes
    the response."""

    parse: Callable[[dict[str, Any], TeacherService], T]
    work_of: Callable[[T, TeacherService, str, str], Awaitable[Work[Query]]]
    answer: Callable[[T, Work[Query], TeacherService, Text, JsonPieces, Outlet], Awaitable[None]]


async def answered(http: Request, client: str, service: TeacherService, face: Face[T]) -> RacedResponse:
    """What the route of a `Face` returns."""
    with retried_by_clients():
        service.require_started()
        fields = await read_json(http, service.engine.limits)
    asked = face.parse(fields, service)

    async def work(outlet: Outlet) -> None:
        with retried_by_clients():
            scoring = await face.work_of(asked, service, client, http.state.request_id)
            text, pieces = await service.text()
            async with service.admission.admit(scoring.permit):
                await face.answer(asked, scoring, service, text, pieces, outlet)

    return RacedResponse(work)


def read_model(kind: type[Model], body: Any) -> Model:
    """Parse the fields of a body that are read. OutOfRangeError names the first invalid one."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = str(first["loc"][0]) if first["loc"] else "body"
        if len(first["loc"]) > 1 and field == "sampling_params":
            field = f"{field}.{first['loc'][1]}"
        got = repr(first["input"])[:80]
        raise OutOfRangeError(f"{field}: {first['msg']} (got {got})", field=field, got=got) from None


def check_extras(
    extras: Mapping[str, Any] | None, without_effect: Fields, neutral: Fields, whose: str, inside: str = ""
) -> None:
    """Check the fields that are not read. OutOfRangeError unless each has no effect here, or its value changes nothing.
    `without_effect`: reasons, each with the fields that it applies to. `neutral`: fields, each with the values that
    change nothing; None never changes anything. `whose`: what the fields belong to, in words. `inside`: the prefix of
    their names, `sampling_params.` or nothing."""
    ignored = {field for fields in without_effect.values() for field in fields}
    for name, value in (extras or {}).items():
        field = f"{inside}{name[:80]}"
        if name in ignored or value is None:
            continue
        if name not in neutral:
            raise OutOfRangeError(
                f"{field}: not a field of {whose}, so it would have no effect: leave it out", field=field,
                got=repr(value)[:80],
            )  # fmt: skip
        # True == 1 in Python, but is not a number of samples.
        if not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in neutral[name]):
            raise OutOfRangeError(
                f"{field}: this teacher scores prompts and does not sample, so it can't honour {name}", field=field,
                got=repr(value)[:80], limit=list(neutral[name]),
            )  # fmt: skip


def check_written(field: str, got: Any, count: int | None, otherwise: int) -> None:
    """OutOfRangeError unless `count`, the number of tokens to generate, is 0 or 1. `got` is what the body has there;
    the other server uses `otherwise` if it is left out."""
    if count is None or not 0 <= count <= 1:
        raise OutOfRangeError(
            f"{field}: got {f'nothing, which means {otherwise}' if got is None else got}, expected 0 or 1: this "
            "teacher scores prompts, and generates at most the most likely next token", field=field, got=count, limit=1,
        )  # fmt: skip


def check_model(model: str | None, service: TeacherService) -> None:
    """NotFoundError if the request names a model that is not the one served."""
    names = {service.engine.identity.semantic.model, service.settings.model}
    if model is not None and model not in names:
        raise NotFoundError(
            f"got model {model!r}, but this teacher serves {service.engine.identity.semantic.model!r}", field="model",
            got=model, limit=sorted(names),
        )  # fmt: skip


def check_cost(field: str, num_tokens: int, values: int, service: TeacherService, weight: int = JSON_WEIGHT) -> None:
    """OutOfRangeError if a response with this many values per token could never be admitted."""
    cost, most = num_tokens * weight * (values + 1), service.admission.max_cost
    if cost > most:
        raise OutOfRangeError(
            f"{field}: {num_tokens} tokens with {values} logprobs each cost {cost} as JSON, expected at most {most}: "
            "request fewer at a time, or POST /v1/targets in msgpack", field=field, got=cost, limit=most,
        )  # fmt: skip


def checked_work(
    targets: TargetsRequest, names: Mapping[str, str], service: TeacherService, client: str, request_id: str,
    weight: int = JSON_WEIGHT,
) -> Work[Query]:  # fmt: skip
    """The work of a request for targets. OutOfRangeError if the teacher can't serve it, with the other server's name
    of the field; `names` maps our names to theirs."""
    try:
        check_request(targets, service.engine.limits, service.engine.kinds)
    except OutOfRangeError as error:
        message, field = error.message, error.field or ""
        for ours, theirs in names.items():
            message, field = message.replace(ours, theirs), field.replace(ours, theirs)
        raise OutOfRangeError(message, field=field, got=error.got, limit=error.limit) from None
    values = targets.values_per_token(service.hidden_width)
    check_cost(names["sequences"], targets.num_tokens, values, service, weight)
    return service.work_of(targets, request_id, client, weight=weight)
