"""One HTTP exchange with one replica: what goes out, what comes back checked, and every failure as one of our errors.

`client.py` calls it and decides what a failure means. Nothing here retries.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from teacher_proto.errors import (
    InvalidTargetsError,
    NotFoundError,
    StillhouseError,
    TeacherUnavailableError,
    TruncatedError,
    WireError,
    WrongTeacherError,
    from_json,
)
from teacher_proto.info import TeacherInfo, parse_info
from teacher_proto.requests import TargetsRequest
from teacher_proto.targets import TokenTargets, check_answer
from teacher_proto.wire import (
    MSGPACK,
    REQUEST_ID_HEADER,
    Failure,
    Header,
    ResponseDecoder,
    Targets,
    encode_request,
)

MAX_PLAIN_BYTES = 2**20
MAX_MESSAGE_BYTES = 2**30
Outcome = TokenTargets | StillhouseError


async def fetch_info(http: httpx.AsyncClient, url: str, timeouts: httpx.Timeout) -> TeacherInfo:
    """Who answers at `url`. TeacherUnavailableError if nobody or no teacher does; else the peer's own error."""
    try:
        async with _response(http, "GET", f"{url}/v1/teacher", timeouts=timeouts) as response:
            body = await _plain_body(response)
            if response.status_code != 200:
                raise _error_of(response, body)
            tree = _json_or_none(body)
            if not isinstance(tree, dict) or "identity" not in tree:
                raise _not_a_teacher(url, "GET /v1/teacher gave no identity")
            return parse_info(tree)
    except NotFoundError as error:
        raise _not_a_teacher(url, str(error)) from None


async def exchange(
    http: httpx.AsyncClient, url: str, request: TargetsRequest, info: TeacherInfo, timeouts: httpx.Timeout,
    on_chunk: Callable[[int], None] = lambda n: None,
) -> AsyncGenerator[tuple[int, Outcome], None]:  # fmt: skip
    """Post `request` and yield (index, checked targets or that sequence's error) as they come: the
    engine's, or InvalidTargetsError for a record that cannot be.

    Raises what concerns the whole: an error status, a cut or changed body, another teacher's fingerprint
    (WrongTeacherError), the answer to somebody else's request.
    `on_chunk` hears the size of each piece that arrives, and may raise to end the exchange.
    """
    request_id = uuid.uuid4().hex
    headers = {"content-type": MSGPACK, "accept": MSGPACK, REQUEST_ID_HEADER: request_id}
    async with _response(
        http, "POST", f"{url}/v1/targets", content=encode_request(request), headers=headers, timeouts=timeouts
    ) as response:
        if response.status_code != 200:
            raise _error_of(response, await _plain_body(response))
        if (kind := response.headers.get("content-type", "").split(";")[0]) != MSGPACK:
            raise WireError(f"{url} answered /v1/targets with {kind or 'no content type'}, {MSGPACK} was expected")
        decoder = ResponseDecoder(MAX_MESSAGE_BYTES)
        async for chunk in response.aiter_bytes():
            on_chunk(len(chunk))
            for message in decoder.feed(chunk):
                if isinstance(message, Header):
                    _check_header(message, request, request_id, info)
                elif isinstance(message, Failure):
                    if message.index is None:
                        raise message.error
                    yield message.index, message.error
                elif isinstance(message, Targets):
                    yield message.index, _checked(message, request, info)
        decoder.close()


def _checked(message: Targets, request: TargetsRequest, info: TeacherInfo) -> Outcome:
    """The record, or why it cannot be one: its neighbours in the body may still be good."""
    try:
        check_answer(message.targets, request, message.index, info.limits.vocab_size)
    except InvalidTargetsError as error:
        error.field = f"sequences.{message.index}"
        return error
    return message.targets


def _check_header(header: Header, request: TargetsRequest, request_id: str, info: TeacherInfo) -> None:
    if header.fingerprint != info.fingerprint:
        raise WrongTeacherError(
            f"the answer is from teacher {header.fingerprint}, {info.fingerprint} was asked",
            field="fingerprint", got=header.fingerprint, limit=info.fingerprint,
        )  # fmt: skip
    if header.request_id != request_id:
        raise WireError(f"the answer is to request {header.request_id[:80]!r}, {request_id!r} was sent")
    if header.num_sequences != len(request.sequences) or header.vocab_size != info.limits.vocab_size:
        raise WireError(
            f"the header speaks of {header.num_sequences} sequences and a vocabulary of {header.vocab_size}; "
            f"{len(request.sequences)} and {info.limits.vocab_size} were expected"
        )
    spec = request.spec
    if header.top_k != spec.top_k or header.temperatures != spec.temperatures:
        raise WireError(
            f"the header speaks of top_k {header.top_k} and temperatures {list(header.temperatures)}; "
            f"{spec.top_k} and {list(spec.temperatures)} were asked"
        )


@asynccontextmanager
async def _response(
    http: httpx.AsyncClient, method: str, url: str, timeouts: httpx.Timeout, **arguments: Any
) -> AsyncIterator[httpx.Response]:
    """`http.stream`, with whatever can go wrong on the way as a TeacherUnavailableError or TruncatedError."""
    place = url.rpartition("/v1/")[0]
    try:
        async with http.stream(method, url, timeout=timeouts, follow_redirects=False, **arguments) as response:
            if (encoding := response.headers.get("content-encoding", "identity")) != "identity":
                raise WireError(f"{place} answered with content-encoding {encoding[:40]!r}, none was asked for")
            yield response
    except httpx.ConnectTimeout as error:
        raise TeacherUnavailableError(f"no connection to {place} within {timeouts.connect} s") from error
    except httpx.ConnectError as error:
        raise TeacherUnavailableError(
            f"nobody listens at {place} ({error}): start a teacher there with `stillhouse-teacher MODEL --port PORT`, "
            "or correct the URL"
        ) from error
    except httpx.TimeoutException as error:
        raise TeacherUnavailableError(f"{place} was silent for {timeouts.read} s: it hangs or is overloaded") from error
    except httpx.RemoteProtocolError as error:
        raise TruncatedError(f"{place} broke off its answer: {error}") from error
    except httpx.TransportError as error:
        raise TeacherUnavailableError(f"the connection to {place} failed: {type(error).__name__} {error}") from error


async def _plain_body(response: httpx.Response) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > MAX_PLAIN_BYTES:
            raise WireError(
                f"a plain answer of more than {MAX_PLAIN_BYTES} bytes came with status {response.status_code}"
            )
    return bytes(body)


def _error_of(response: httpx.Response, body: bytes) -> StillhouseError:
    """The error that a response stands for: its own if it is a teacher's, else one that names the status."""
    place = str(response.url.copy_with(path="/", query=None)).rstrip("/")
    tree = _json_or_none(body)
    if isinstance(tree, dict) and isinstance(tree.get("code"), str) and isinstance(tree.get("message"), str):
        return from_json(tree, _retry_after(response))
    if response.status_code == 404:
        return NotFoundError(f"GET {response.url.path} gave 404")
    return TeacherUnavailableError(
        f"{place} answered {response.status_code} {response.reason_phrase}, not as a teacher does: "
        "a proxy in between, or another service",
        retry_after=_retry_after(response),
    )


def _json_or_none(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds of a Retry-After header; a date in it is passed over, since clocks differ."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _not_a_teacher(url: str, why: str) -> TeacherUnavailableError:
    return TeacherUnavailableError(
        f"{url} answers, but is not a Stillhouse teacher ({why}): check the URL; it is the root, without /v1"
    )
