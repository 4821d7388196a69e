"""The expected teacher: the one that the settings or the checkpoint name. Used by `open`, `local` and `cached`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from teacher_proto.client.call import ClientStats
from teacher_proto.client.expectation import Canary, Expectation
from teacher_proto.errors import WrongTeacherError
from teacher_proto.identity import TeacherIdentity, compare_fingerprints


def expected(
    fingerprint: str | None, saved: Mapping[str, Any] | None
) -> tuple[TeacherIdentity | str | None, Canary | None]:
    """The expected identity or fingerprint, and canary. `saved` is a `TeacherCard` from a checkpoint.

    WrongTeacherError if the settings name another teacher than the run began with. A fingerprint that differs only in
    its numeric half replaces the saved one, with the same canary.
    """
    if saved is None:
        return fingerprint, None
    hold_against(fingerprint, saved)
    identity = TeacherIdentity.model_validate(saved["identity"]) if saved["identity"] else saved["fingerprint"]
    canary = Canary(tuple(saved["canary"])) if saved["canary"] is not None else None
    return identity if fingerprint in (None, saved["fingerprint"]) else fingerprint, canary


def hold_against(fingerprint: str | None, saved: Mapping[str, Any]) -> None:
    """WrongTeacherError if `teacher.fingerprint` names another teacher than the one in the checkpoint."""
    if fingerprint is not None and compare_fingerprints(saved["fingerprint"], fingerprint) == "semantic":
        raise WrongTeacherError(
            f"the run began with the teacher {saved['name']} ({saved['fingerprint']}), but teacher.fingerprint names "
            f"another, {fingerprint}: leave it out, start a new run with another run.id, or allow another teacher with "
            "run.allow_changes=teacher.fingerprint",
            field="fingerprint", got=fingerprint, limit=saved["fingerprint"],
        )  # fmt: skip


def expectation(fingerprint: str | None, saved: Mapping[str, Any] | None) -> Expectation:
    """The checks for a teacher that is not reached through a client."""
    identity, canary = expected(fingerprint, saved)
    return Expectation(identity, canary, None, False, ClientStats())
