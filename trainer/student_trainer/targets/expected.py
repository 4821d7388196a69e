"""Who must answer: the teacher that the settings name, or that of the checkpoint. Used by every single teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teacher_proto.call import ClientStats
from teacher_proto.canary import Canary
from teacher_proto.expectation import Expectation
from teacher_proto.identity import TeacherIdentity


def expected(
    fingerprint: str | None, saved: Mapping[str, Any] | None
) -> tuple[TeacherIdentity | str | None, Canary | None]:
    """Identity or fingerprint, and canary. `saved` is a `TeacherCard` as a checkpoint keeps it; a fingerprint that the
    settings name goes before it.
    """
    if fingerprint is not None or saved is None:
        return fingerprint, None
    identity = TeacherIdentity.model_validate(saved["identity"]) if saved["identity"] else saved["fingerprint"]
    return identity, Canary(tuple(saved["canary"])) if saved["canary"] is not None else None


def expectation(fingerprint: str | None, saved: Mapping[str, Any] | None) -> Expectation:
    """What a teacher that comes without a client is held against."""
    identity, canary = expected(fingerprint, saved)
    return Expectation(identity, canary, None, False, ClientStats())
