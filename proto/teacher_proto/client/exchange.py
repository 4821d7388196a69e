"""One HTTP exchange with one replica: sends a request, checks the response, turns every failure into a StillhouseError.

`attempts.py` and `replica_client.py` call it and decide what a failure means. Nothing here retries. A `Route` describes
a service; `teacher_client.py` has the teacher's, `attention_client.py` the attention service's.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx

from teacher_proto.errors import (
    InvalidTargetsError,
    NotFoundError,
    StillhouseError,
    TeacherUnavailableError,
    TooLargeError,
    TruncatedError,
    WireError,
    WrongTeacherError,
    from_json,
)
from teacher_proto.info import ServiceInfo, read_info
from teacher_proto.request_checks import RequestT, SequencesRequest
from teacher_proto.wire.records import MSGPACK, REQUEST_ID_HEADER, encode_request
from teacher_proto.wire.responses import (
    PROGRESS_HEADER,
    SEQUENCE_CRC_HEADER,
    AnyHeader,
    End,
    Failure,
    HeaderT,
    Progress,
    RecordT,
    ResponseDecoder,
    ResponseFormat,
    Targets,
    sequence_crc,
)

# The progress interval to request from a service; a third of the read timeout if that is shorter.
PROGRESS_EVERY_S = 2.0
MAX_PLAIN_BYTES = 2**20
MAX_MESSAGE_BYTES = 2**30
InfoT = TypeVar("InfoT", bound=ServiceInfo)


@dataclass(frozen=True)
class Route(Generic[RequestT, HeaderT, RecordT, InfoT]):
    """One service's route.

    `noun` and `command` are for messages. `info` is the record of its `GET /v1/teacher`. `check_request` raises a
    RequestError for what the service would refuse, `check_header` a WireError for the header of another request,
    `check_record` InvalidTargetsError for a record that can't belong to the sequence of that index. `cost` is the
    number by which the service admits a request.
    """

    noun: str
    command: str
    path: str
    answers: ResponseFormat[HeaderT, RecordT]
    info: type[InfoT]
    check_request: Callable[[RequestT, InfoT], None]
    check_header: Callable[[HeaderT, RequestT, InfoT], None]
    check_record: Callable[[RecordT, RequestT, int, InfoT], None]
    cost: Callable[[RequestT, InfoT], int]


AnyRoute = Route[Any, Any, Any, Any]


async def fetch_info(
    http: httpx.AsyncClient, url: str, route: Route[RequestT, HeaderT, RecordT, InfoT], timeouts: httpx.Timeout
) -> InfoT:
    """What the service at `url` says about itself. TeacherUnavailableError if no Stillhouse service responds; otherwise
    the peer's own error, or one of `read_info`."""
    try:
        async with open_response(http, "GET", url, "/v1/teacher", route, timeouts=timeouts) as response:
            body = await plain_body(response)
            if response.status_code != 200:
                raise error_of(response, body, route)
            tree = _json_or_none(body)
            if not isinstance(tree, dict) or "identity" not in tree:
                raise _not_one(url, route, "GET /v1/teacher returned no identity")
            return read_info(route.info, tree)
    except NotFoundError as error:
        raise _not_one(url, route, str(error)) from None


@dataclass(frozen=True)
class ServiceStatus:
    """What a client reads from `GET /v1/status`. `gone`: nothing listens there, or the engine is dead."""

    gone: bool = False
    uptime_s: float = math.inf
    requests_inside: int = 0


async def fetch_status(http: httpx.AsyncClient, url: str, timeouts: httpx.Timeout) -> ServiceStatus:
    """The status of a service. One without that route, or whose response can't be read, is assumed to be alive, idle
    and never restarted."""
    try:
        async with http.stream("GET", url + "/v1/status", timeout=timeouts, follow_redirects=False) as response:
            tree = _json_or_none(await plain_body(response))
    except httpx.ConnectError:
        return ServiceStatus(gone=True)
    except (httpx.TransportError, WireError):
        return ServiceStatus()
    if response.status_code != 200 or not isinstance(tree, dict):
        return ServiceStatus()
    uptime_s, inside = tree.get("uptime_s"), tree.get("requests_inside")
    return ServiceStatus(
        gone=tree.get("state") == "dead",
        uptime_s=float(uptime_s) if isinstance(uptime_s, (int, float)) else math.inf,
        requests_inside=inside if isinstance(inside, int) else 0,
    )


def broke_off(error: StillhouseError) -> bool:
    """Whether the connection ended in the middle of a response, or while waiting for one."""
    cut = (httpx.ReadError, httpx.WriteError, httpx.CloseError)
    return isinstance(error, TruncatedError) or isinstance(error.__cause__, cut)


async def exchange(
    http: httpx.AsyncClient, url: str, route: Route[RequestT, HeaderT, RecordT, InfoT], request: RequestT,
    info: InfoT, timeouts: httpx.Timeout, on_chunk: Callable[[int], None] = lambda n: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> AsyncGenerator[tuple[int, RecordT | StillhouseError], None]:  # fmt: skip
    """Post `request` and yield (index, checked record or that sequence's error) as they arrive. The error is the
    engine's, or InvalidTargetsError for a record that cannot be right.

    Raises what concerns the whole request: an error status, a truncated or corrupted body, another teacher's
    fingerprint (WrongTeacherError), the response to another request.
    `on_chunk` is called with the size of each chunk after its records have been yielded, and may raise to end the
    exchange; `on_progress` with each progress report, from services that send them.
    """
    request_id = uuid.uuid4().hex
    headers = {
        "content-type": MSGPACK, "accept": MSGPACK, REQUEST_ID_HEADER: request_id, PROGRESS_HEADER: _interval(timeouts),
        SEQUENCE_CRC_HEADER: "1",
    }  # fmt: skip
    content = encode_request(request)
    async with open_response(
        http, "POST", url, route.path, route, content=content, headers=headers, timeouts=timeouts
    ) as response:
        if response.status_code != 200:
            raise error_of(response, await plain_body(response), route)
        if (kind := response.headers.get("content-type", "").split(";")[0]) != MSGPACK:
            raise WireError(f"{url} responded to {route.path} with {kind or 'no content type'}, expected {MSGPACK}")
        decoder = ResponseDecoder(route.answers, MAX_MESSAGE_BYTES)
        async for chunk in response.aiter_bytes():
            for message in decoder.feed(chunk):
                if isinstance(message, Failure):
                    if message.index is None:
                        raise message.error
                    yield message.index, message.error
                elif isinstance(message, Targets):
                    _check_sequence(message, request)
                    error = _rejection(message, request, info, route)
                    yield message.index, message.targets if error is None else error
                elif isinstance(message, Progress):
                    on_progress(message)
                elif not isinstance(message, End):
                    _check_header(message, request, request_id, info)
                    route.check_header(message, request, info)
            on_chunk(len(chunk))
        decoder.close()


def _interval(timeouts: httpx.Timeout) -> str:
    return f"{min(PROGRESS_EVERY_S, (timeouts.read or PROGRESS_EVERY_S) / 3):g}"


def _check_sequence(message: Targets[Any], request: SequencesRequest) -> None:
    """The checksum of a record covers its tensors only: with another index they would be another sequence's. Older
    services don't send what is compared here."""
    expected = sequence_crc(message.index, request.sequences[message.index])
    if message.sequence_crc not in (None, expected):
        raise WireError(
            f"the record of sequence {message.index} has the sequence_crc {message.sequence_crc}, {expected} was "
            "expected: its index changed on the way, or it is another sequence's"
        )


def _rejection(
    message: Targets[RecordT], request: RequestT, info: InfoT, route: Route[RequestT, HeaderT, RecordT, InfoT]
) -> InvalidTargetsError | None:
    """The error of an invalid record, None for a valid one. Not raised: other records of the body may be good."""
    try:
        route.check_record(message.targets, request, message.index, info)
    except InvalidTargetsError as error:
        error.field = f"sequences.{message.index}"
        return error
    return None


def _check_header(header: AnyHeader, request: SequencesRequest, request_id: str, info: ServiceInfo) -> None:
    if header.fingerprint != info.fingerprint:
        raise WrongTeacherError(
            f"the response is from teacher {header.fingerprint}, expected {info.fingerprint}",
            field="fingerprint", got=header.fingerprint, limit=info.fingerprint,
        )  # fmt: skip
    if header.request_id != request_id:
        raise WireError(f"the response is to request {header.request_id[:80]!r}, expected {request_id!r}")
    if header.num_sequences != len(request.sequences):
        raise WireError(
            f"the response header gives {header.num_sequences} sequences, expected {len(request.sequences)}"
        )


@asynccontextmanager
async def open_response(
    http: httpx.AsyncClient, method: str, place: str, path: str, route: AnyRoute, timeouts: httpx.Timeout,
    **arguments: Any,
) -> AsyncIterator[httpx.Response]:  # fmt: skip
    """`http.stream`, with transport errors turned into TeacherUnavailableError or TruncatedError. WireError for a
    response with a content-encoding."""
    try:
        async with http.stream(method, place + path, timeout=timeouts, follow_redirects=False, **arguments) as response:
            if (encoding := response.headers.get("content-encoding", "identity")) != "identity":
                raise WireError(f"{place} responded with content-encoding {encoding[:40]!r}, expected none")
            yield response
    except httpx.ConnectTimeout as error:
        raise TeacherUnavailableError(f"no connection to {place} within {timeouts.connect} s") from error
    except httpx.ConnectError as error:
        raise TeacherUnavailableError(
            f"nothing is listening at {place} ({error}): start the {route.noun} there with "
            f"`{route.command} MODEL --port PORT`, or correct the URL"
        ) from error
    except httpx.TimeoutException as error:
        raise TeacherUnavailableError(f"{place} was silent for {timeouts.read} s: it hangs or is overloaded") from error
    except httpx.RemoteProtocolError as error:
        raise TruncatedError(f"the response from {place} broke off: {error}") from error
    except httpx.TransportError as error:
        raise TeacherUnavailableError(f"the connection to {place} failed: {type(error).__name__} {error}") from error


async def plain_body(response: httpx.Response) -> bytes:
    body = bytearray()
    async for chunk in response.aiter_bytes():
        body += chunk
        if len(body) > MAX_PLAIN_BYTES:
            raise WireError(
                f"the plain response with status {response.status_code} has more than {MAX_PLAIN_BYTES} bytes"
            )
    return bytes(body)


def error_of(response: httpx.Response, body: bytes, route: AnyRoute) -> StillhouseError:
    """The error of a response that is not a success: the service's own, or else one that names the status."""
    place = str(response.url.copy_with(path="/", query=None)).rstrip("/")
    tree = _json_or_none(body)
    if isinstance(tree, dict) and isinstance(tree.get("code"), str) and isinstance(tree.get("message"), str):
        return from_json(tree, _retry_after(response))
    if response.status_code == 404:
        return NotFoundError(f"{response.request.method} {response.url.path} returned 404")
    if response.status_code == 413:
        return TooLargeError(f"{place} returned 413: probably a proxy in between, whose body size limit is too low")
    return TeacherUnavailableError(
        f"{place} returned {response.status_code} {response.reason_phrase}, which is not the response of a Stillhouse "
        f"{route.noun}: it came from a proxy in between, or from another service",
        retry_after=_retry_after(response),
    )


def _json_or_none(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds of a Retry-After header. A date is ignored, since clocks differ."""
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _not_one(url: str, route: AnyRoute, why: str) -> TeacherUnavailableError:
    return TeacherUnavailableError(
        f"{url} responds, but is not a Stillhouse {route.noun} ({why}): check the URL; it must be the root, without /v1"
    )
