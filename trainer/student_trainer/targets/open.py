"""Opens the teacher that the settings name, and holds it against what the run needs. Called by `build`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from student_trainer.settings import Settings, TeacherSettings
from student_trainer.targets.background import EventThread
from student_trainer.targets.patience import Patient
from student_trainer.targets.protocol import KIND_OF_SUPPORT, Targets, TeacherCard
from student_trainer.targets.remote import RemoteTargets
from teacher_proto.canary import Canary
from teacher_proto.client import TeacherClient
from teacher_proto.errors import TeacherUnavailableError
from teacher_proto.identity import TeacherIdentity
from teacher_proto.retry import RetryPolicy


@dataclass(frozen=True, eq=False)
class Teacher:
    """An opened source of targets. `reason` tells what is known of an outage."""

    card: TeacherCard
    targets: Targets
    reason: Callable[[], str]


def open_teacher(
    settings: TeacherSettings, thread: EventThread, stack: ExitStack, saved: Mapping[str, Any] | None = None
) -> Teacher:
    """Reach the teacher; `saved` is the card in the checkpoint that the run goes on from.

    StillhouseError if nobody answers, or another teacher than the run began with.
    """
    remote = RemoteTargets(lambda: _client(settings, saved), settings.start_within_s)
    stack.callback(lambda: thread.call(remote.close()))
    try:
        card = thread.call(remote.open())
    except TeacherUnavailableError as error:
        raise TeacherUnavailableError(
            f"no teacher at {', '.join(settings.url)}: {error}. Start one with `stillhouse-teacher MODEL --port 8000`, "
            "say where it is with teacher.url=http://HOST:PORT, or wait for it with teacher.start_within_s=600"
        ) from error
    patient = Patient(remote, settings.give_up_after_s)
    return Teacher(card, patient, lambda: patient.reason or remote.outage())


def check_ask(settings: Settings, card: TeacherCard) -> None:
    """ValueError if the teacher can't serve what this run will ask, before anything is asked."""
    if settings.data.seq_len > card.max_sequence_length:
        raise ValueError(
            f"data.seq_len is {settings.data.seq_len}, the teacher takes sequences of {card.max_sequence_length} at "
            "most, and a document may be as long as a row: lower data.seq_len, or start it with a longer context"
        )
    for name, top_k in (("teacher.top_k", settings.teacher.top_k), ("evaluation.top_k", settings.evaluation.top_k)):
        if top_k is not None and top_k > min(card.max_top_k, card.vocab_size):
            raise ValueError(f"{name} is {top_k}, the teacher gives {min(card.max_top_k, card.vocab_size)} at most")
    for term in settings.terms():
        if term.kind != "cross_entropy" and (kind := KIND_OF_SUPPORT[term.support]) not in card.kinds:
            raise ValueError(f"the loss {term.name} needs targets of kind {kind}, the teacher serves {card.kinds}")
    if settings.evaluation.kl == "full" and "hidden" not in card.kinds:
        raise ValueError(f"evaluation.kl=full needs targets of kind hidden, the teacher serves {card.kinds}")


def wants_head(settings: Settings) -> bool:
    """Whether something compares whole vocabularies, for which hidden states need the teacher's head."""
    evaluates = settings.evaluation.every > 0 and settings.evaluation.kl == "full"
    return evaluates or any(term.support == "full" for term in settings.terms())


def _client(settings: TeacherSettings, saved: Mapping[str, Any] | None) -> TeacherClient:
    expect: TeacherIdentity | str | None = settings.fingerprint
    canary = None
    if saved is not None and settings.fingerprint is None:
        expect = TeacherIdentity.model_validate(saved["identity"]) if saved["identity"] else saved["fingerprint"]
        canary = Canary(tuple(saved["canary"])) if saved["canary"] is not None else None
    policy = RetryPolicy(
        deadline_s=min(settings.deadline_s, settings.give_up_after_s), read_timeout_s=settings.read_timeout_s
    )
    return TeacherClient(
        settings.url, key=os.environ.get(settings.key_variable), expect=expect, expect_canary=canary, policy=policy
    )
