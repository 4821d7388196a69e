"""The body of `GET /v1/teacher`: a service's identity, limits and kinds. Services render it, clients read it."""

from __future__ import annotations

from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, computed_field, model_validator

from teacher_proto.errors import VersionError, WireError
from teacher_proto.identity import TeacherIdentity
from teacher_proto.request_checks import SequenceLimits
from teacher_proto.requests import Kind, Limits
from teacher_proto.wire.responses import VERSION

# The width of hidden states that clients and services assume if it is unknown: 7B models have 4096.
HIDDEN_WIDTH = 4096


class ServiceInfo(BaseModel):
    """What every service says about itself. `version` is that of the wire format; unknown fields are ignored, so that a
    later version may add some.

    `max_cost` is `limits.max_cost`, which on the wire is beside the limits.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    identity: TeacherIdentity
    fingerprint: str
    version: int = VERSION
    limits: SequenceLimits

    @computed_field  # type: ignore[prop-decorator]
    @property
    def max_cost(self) -> int | None:
        return self.limits.max_cost

    @model_validator(mode="before")
    @classmethod
    def _cost_is_a_limit(cls, body: Any) -> Any:
        if isinstance(body, dict) and "max_cost" in body and isinstance(body.get("limits"), dict):
            return {**body, "limits": {**body["limits"], "max_cost": body["max_cost"]}}
        return body

    @model_validator(mode="after")
    def _fingerprint_is_its_own(self) -> Self:
        if self.fingerprint != self.identity.fingerprint:
            raise ValueError(
                f"fingerprint {self.fingerprint} does not match the identity's, {self.identity.fingerprint}"
            )
        return self


class TeacherInfo(ServiceInfo):
    """The body of a teacher's `GET /v1/teacher`. `hidden_width` is D of kind `hidden`, which determines its cost."""

    limits: Limits
    kinds: tuple[Kind, ...]
    hidden_width: int | None = None
    service: Literal["teacher"] = "teacher"


Info = TypeVar("Info", bound=ServiceInfo)


def read_info(kind: type[Info], body: Any) -> Info:
    """A service's description from decoded JSON. VersionError for another version of the wire format, WireError for
    anything else that is wrong."""
    service = kind.model_fields["service"].default
    if not isinstance(body, dict) or "identity" not in body:
        raise WireError("the response of /v1/teacher has no identity")
    if (there := str(body.get("service", "teacher"))[:40]) != service:
        raise WireError(
            f"got a service of kind {there!r}, expected one of kind {service!r}: correct the URL",
            retryable=False,
        )
    version = body.get("version")
    if version != VERSION:
        raise VersionError(
            f"the teacher uses version {version!r} of the wire format, this client {VERSION}: update the older of "
            "the two"
        )
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "the body"
        raise WireError(f"the response of /v1/teacher is not of kind {service!r}: {field}: {first['msg']}") from None
