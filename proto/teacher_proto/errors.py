"""Every error that a service returns or the client raises, with its code and HTTP status.

    StillhouseError
    |-- RequestError (ValueError)       the request is at fault; sending it again changes nothing
    |   |-- MalformedError        400   not decodable: bad msgpack or JSON, unknown or missing field
    |   |-- UnauthorizedError     401   no key, or an unknown one
    |   |-- WrongTeacherError     409   not the teacher that the request names; carries the difference
    |   |-- TooLargeError         413   the body exceeds its limit
    |   |-- UnsupportedTypeError  415   a content type or encoding that is not supported
    |   |-- MethodNotAllowedError 405   the route does not support this method
    |   |-- SlowBodyError         408   the body did not arrive in time; retryable
    |   |-- OutOfRangeError       422   decodable, but a value is outside its limits: field, got, limit
    |   `-- NotFoundError         404   no such route, layer or artefact
    |-- BusyError                       try again later; carries retry_after in seconds
    |   |-- QuotaError            429   this key's share is used up
    |   `-- OverloadedError       503   full or draining
    |       `-- LoadingError      503   still loading the model
    |-- EngineError               500   the engine failed on this request; `retryable` says whether a retry may help
    |   |-- EngineMemoryError     503   the device ran out of memory on this request; retryable
    |   `-- EngineDeadError       503   the engine is dead, and the process is about to exit
    |-- WireError (ValueError)          bytes that do not follow WIRE.md
    |   |-- TruncatedError              a body that stopped before its end message
    |   |-- ChecksumError               a record whose bytes were corrupted
    |   `-- VersionError          426   the peer uses another version of the wire format
    |-- InvalidTargetsError (ValueError) a record that decodes, but cannot be a distribution
    |   `-- PoisonBatchError            the same sequences came back invalid twice; carries the request, to be dumped
    |       `-- DeadlyRequestError      the engine dies of the request, each time
    `-- TeacherUnavailableError         the client gave up: what it tried, for how long, the last reason

Raised by `teacher_proto` and by the services; `serving` turns them into responses by the same codes and statuses.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar


class StillhouseError(Exception):
    """The root class. `message` says what was received, what was expected and what to do."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    retryable: bool = False

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        got: Any = None,
        limit: Any = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        retryable: bool | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.field = field
        self.got = got
        self.limit = limit
        self.request_id = request_id
        self.retry_after = retry_after
        if retryable is not None:
            self.retryable = retryable

    def to_json(self) -> dict[str, Any]:
        """The body of an error response: `code`, `message`, `field`, `got`, `limit`, `request_id`, `retryable`."""
        return {
            "code": self.code,
            "message": self.message,
            "field": self.field,
            "got": _plain(self.got),
            "limit": _plain(self.limit),
            "request_id": self.request_id,
            "retryable": self.retryable,
        }


class RequestError(StillhouseError, ValueError):
    code, status = "bad_request", 400


class MalformedError(RequestError):
    code, status = "malformed", 400


class UnauthorizedError(RequestError):
    code, status = "unauthorized", 401


class NotFoundError(RequestError):
    code, status = "not_found", 404


class WrongTeacherError(RequestError):
    code, status = "wrong_teacher", 409


class TooLargeError(RequestError):
    code, status = "too_large", 413


class UnsupportedTypeError(RequestError):
    code, status = "unsupported_type", 415


class MethodNotAllowedError(RequestError):
    code, status = "method_not_allowed", 405


class SlowBodyError(RequestError):
    code, status, retryable = "slow_body", 408, True


class OutOfRangeError(RequestError):
    code, status = "out_of_range", 422


class BusyError(StillhouseError):
    code, status, retryable = "busy", 503, True


class QuotaError(BusyError):
    code, status = "quota", 429


class OverloadedError(BusyError):
    code, status = "overloaded", 503


class LoadingError(OverloadedError):
    code = "loading"


class EngineError(StillhouseError):
    code, status = "engine_failed", 500


class EngineMemoryError(EngineError):
    code, status, retryable = "engine_out_of_memory", 503, True


class EngineDeadError(EngineError):
    code, status, retryable = "engine_dead", 503, True


class WireError(StillhouseError, ValueError):
    code, status, retryable = "wire", 502, True


class TruncatedError(WireError):
    code = "truncated"


class ChecksumError(WireError):
    code = "checksum"


class VersionError(WireError):
    code, status, retryable = "version", 426, False


class InvalidTargetsError(StillhouseError, ValueError):
    code, status = "invalid_targets", 502


class PoisonBatchError(InvalidTargetsError):
    """`request` holds the sequences without valid targets, `reasons` one line per attempt with the replica's URL."""

    code = "poison_batch"

    def __init__(self, message: str, *, request: Any = None, reasons: tuple[str, ...] = (), **details: Any):
        super().__init__(message, **details)
        self.request = request
        self.reasons = reasons


class DeadlyRequestError(PoisonBatchError):
    code = "deadly_request"


class TeacherUnavailableError(StillhouseError):
    code, status, retryable = "teacher_unavailable", 503, True


def _plain(value: Any) -> Any:
    """A value that JSON and msgpack can both hold: NaN, arrays and other types become text."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**64 else str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


BY_CODE: dict[str, type[StillhouseError]] = {
    cls.code: cls
    for cls in (
        StillhouseError,
        RequestError,
        MalformedError,
        UnauthorizedError,
        NotFoundError,
        WrongTeacherError,
        TooLargeError,
        UnsupportedTypeError,
        MethodNotAllowedError,
        SlowBodyError,
        OutOfRangeError,
        BusyError,
        QuotaError,
        OverloadedError,
        LoadingError,
        EngineError,
        EngineMemoryError,
        EngineDeadError,
        WireError,
        TruncatedError,
        ChecksumError,
        VersionError,
        InvalidTargetsError,
        PoisonBatchError,
        DeadlyRequestError,
        TeacherUnavailableError,
    )
}


def from_json(body: dict[str, Any], retry_after: float | None = None) -> StillhouseError:
    """The error in a response body or an `error` message; an unknown code becomes a StillhouseError."""
    cls = BY_CODE.get(str(body.get("code")), StillhouseError)
    return cls(
        str(body.get("message", "the peer sent no message"))[:2000],
        field=body.get("field"),
        got=body.get("got"),
        limit=body.get("limit"),
        request_id=body.get("request_id"),
        retry_after=retry_after,
        retryable=bool(body.get("retryable", cls.retryable)),
    )
