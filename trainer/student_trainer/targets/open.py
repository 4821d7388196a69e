"""Opens the teacher that the settings name, checks that it can serve the run, and reads its output head from the file
of `GET /v1/head`. Called by `build_components`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from student_trainer.batch.head import Head
from student_trainer.losses.kinds import all_terms
from student_trainer.losses.terms import Needs
from student_trainer.settings import Settings, TeacherSettings
from student_trainer.settings.teacher import OneTeacher
from student_trainer.targets.admission import check_admission
from student_trainer.targets.background import EventThread
from student_trainer.targets.cached import CachedTargets
from student_trainer.targets.expected import expected, hold_against
from student_trainer.targets.local import LocalTargets
from student_trainer.targets.mixed import BySource, Ensemble, Member
from student_trainer.targets.protocol import Targets, TeacherCard
from student_trainer.targets.remote import RemoteTargets
from teacher_proto.client.replicas import RetryPolicy
from teacher_proto.client.teacher_client import TeacherClient
from teacher_proto.dataset.dataset import TargetDataset
from teacher_proto.dataset.folder import is_url
from teacher_proto.dataset.manifest import PREFIX as MANIFEST
from teacher_proto.errors import InvalidTargetsError, WrongTeacherError
from teacher_proto.identity import compare_fingerprints
from teacher_proto.store.target_store import TargetStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Teacher:
    """An opened source of targets."""

    card: TeacherCard
    targets: Targets


def open_teacher(
    settings: TeacherSettings, thread: EventThread, stack: ExitStack, saved: Mapping[str, Any] | None = None
) -> Teacher:
    """Open the teacher; `saved` is the card in the checkpoint that the run resumes from.

    StillhouseError if no teacher answers, or another one than the run began with. ValueError if the settings do not
    describe one.
    """
    opening = _Opening(settings, stack)
    targets = opening.several(saved) if settings.kind == "mixed" else opening.one(settings.kind, settings, saved)
    stack.callback(lambda: thread.call(targets.close()))
    card = thread.call(targets.open())
    if settings.kind == "mixed":
        _compare_several(saved, settings.fingerprint, card)
    return Teacher(card, targets)


class _Opening:
    """Creates sources of targets without opening them. Members that read the same store share one instance."""

    def __init__(self, settings: TeacherSettings, stack: ExitStack):
        self._settings, self._stack = settings, stack
        self._stores: dict[str, TargetStore | TargetDataset] = {}

    def several(self, saved: Mapping[str, Any] | None) -> Targets:
        cards = (saved or {}).get("members") or {}
        members = [
            Member(name, self.one(member.kind, member, cards.get(name)), member.weight, member.sources)
            for name, member in self._settings.members.items()
        ]
        return {"ensemble": Ensemble, "by_source": BySource}[self._settings.mix](members)

    def one(self, kind: str, teacher: OneTeacher, saved: Mapping[str, Any] | None) -> Targets:
        if kind == "local":
            return LocalTargets(teacher, saved)
        if kind == "remote":
            return self._remote(teacher, saved)
        assert kind == "cached", kind
        # Its answers are stored under one fingerprint, so a replica that computes with other rounding is refused.
        behind = self._remote(teacher, saved, refuse_numeric_change=True) if teacher.on_miss == "remote" else None
        return CachedTargets(self._store(teacher), teacher.fingerprint, behind, saved)

    def _remote(
        self, teacher: OneTeacher, saved: Mapping[str, Any] | None, refuse_numeric_change: bool = False
    ) -> Targets:
        make = partial(self._client, teacher, saved, refuse_numeric_change)
        return RemoteTargets(make, teacher.url, self._settings)

    def _store(self, teacher: OneTeacher) -> TargetStore | TargetDataset:
        if not teacher.store:
            raise ValueError(
                "teacher.store must be given: the folder of a target store, or the URL of a target dataset"
            )
        place = _place(teacher.store)
        if place not in self._stores:
            all_of_it = (teacher, *self._settings.members.values())
            sharing = [one for one in all_of_it if one.store and _place(one.store) == place]
            readonly = all(one.on_miss == "stop" for one in sharing)
            store: TargetStore | TargetDataset
            if is_dataset(place):
                store = TargetDataset(
                    place, readonly=readonly, cache=Path(teacher.store_cache) if teacher.store_cache else None,
                    cache_bytes=teacher.store_cache_bytes, ahead=teacher.store_ahead,
                    outage_s=self._settings.outage_timeout_s,
                )  # fmt: skip
            else:
                store = TargetStore(place, max(one.store_bytes for one in sharing), readonly=readonly)
            self._stack.callback(store.close)
            self._stores[place] = store
        return self._stores[place]

    def _client(
        self, teacher: OneTeacher, saved: Mapping[str, Any] | None, refuse_numeric_change: bool
    ) -> TeacherClient:
        expect, canary = expected(teacher.fingerprint, saved)
        policy = RetryPolicy(
            deadline_s=min(self._settings.deadline_s, self._settings.outage_timeout_s),
            read_timeout_s=self._settings.read_timeout_s,
        )
        key = os.environ.get(teacher.key_variable)
        return TeacherClient(
            teacher.url, key=key, expect=expect, expect_canary=canary, policy=policy,
            refuse_numeric_change=refuse_numeric_change,
        )  # fmt: skip


def _place(store: str) -> str:
    """A canonical path or URL, equal for settings that name the same store."""
    return store.rstrip("/") if is_url(store) else str(Path(store).resolve())


def is_dataset(place: str) -> bool:
    """Whether `place` is a target dataset rather than a target store: a URL, or a folder with a manifest."""
    return is_url(place) or any(Path(place).glob(f"{MANIFEST}*"))


def _compare_several(saved: Mapping[str, Any] | None, named: str | None, card: TeacherCard) -> None:
    """WrongTeacherError if the combined card is not the one that the run began with or that the settings name. Each
    member compares its own card.
    """
    if saved is not None:
        hold_against(named, saved)
    elif named is not None and compare_fingerprints(named, card.fingerprint) == "semantic":
        raise WrongTeacherError(
            f"teacher.fingerprint names {named}, but the combined teachers are {card.name} ({card.fingerprint})",
            field="fingerprint", got=card.fingerprint, limit=named,
        )  # fmt: skip
    if saved is None:
        return
    severity = compare_fingerprints(saved["fingerprint"], card.fingerprint)
    if severity == "semantic":
        raise WrongTeacherError(
            f"the run began with the teacher {saved['name']} ({saved['fingerprint']}), but now it is {card.name} "
            f"({card.fingerprint}): members, weights and sources must be the same as then",
            field="fingerprint", got=card.fingerprint, limit=saved["fingerprint"],
        )  # fmt: skip
    if severity == "numeric":
        logger.warning("the teachers round differently than when the run began: %s", card.name)


def check_ask(settings: Settings, card: TeacherCard) -> None:
    """ValueError if the teacher can't serve this run's requests; called before the first one."""
    if settings.data.seq_len > card.max_sequence_length:
        raise ValueError(
            f"data.seq_len is {settings.data.seq_len}, but the teacher accepts at most {card.max_sequence_length} "
            "tokens per sequence, and a document may be as long as a row: lower data.seq_len, or start the teacher "
            "with a longer context"
        )
    for name, top_k in (("teacher.top_k", settings.teacher.top_k), ("evaluation.top_k", settings.evaluation.top_k)):
        if top_k is not None and top_k > min(card.max_top_k, card.vocab_size):
            raise ValueError(f"{name} is {top_k}, but the teacher gives at most {min(card.max_top_k, card.vocab_size)}")
    for term in all_terms(settings):
        for kind in sorted(term.needs.kinds - set(card.kinds)):
            raise ValueError(f"the loss {term.name} needs targets of kind {kind}, but the teacher serves {card.kinds}")
    if settings.evaluation.kl == "full" and "hidden" not in card.kinds:
        raise ValueError(f"evaluation.kl=full needs targets of kind hidden, but the teacher serves {card.kinds}")
    check_admission(settings, card)
    if settings.teacher.kind == "mixed":
        _check_mix(settings)


def _check_mix(settings: Settings) -> None:
    if settings.teacher.mix == "by_source":
        answered = {source for member in settings.teacher.members.values() for source in member.sources}
        if differ := answered ^ settings.data.sources.keys():
            raise ValueError(
                f"teacher.members score the sources {', '.join(sorted(answered))}, but data.sources are "
                f"{', '.join(sorted(settings.data.sources))}: {', '.join(sorted(differ))} is in only one of the two"
            )
        return
    for term in all_terms(settings):
        for temperature in term.needs.temperatures if term.needs.late else ():
            raise ValueError(
                f"the loss {term.name} has support gather and temperature {temperature:g}: an ensemble scores "
                "the student's own ids only at temperature 1"
            )


def wants_head(settings: Settings) -> bool:
    """Whether losses or evaluation compare full vocabularies, for which hidden states need the teacher's head."""
    evaluates = settings.evaluation.every > 0 and settings.evaluation.kl == "full"
    return evaluates or "hidden" in Needs.of(all_terms(settings)).kinds


NAMES = {"weight", "bias", "scale", "soft_cap"}


def read_head(file: bytes, device: torch.device) -> Head:
    """The head on `device`, in the dtype of its matrix products there. InvalidTargetsError if the file is malformed.

    The file's logits are scale * c * tanh(z / c); ours are C * tanh(scale * z / C), the same with C = scale * c.
    """
    try:
        tensors = load(file)
    except SafetensorError as error:
        raise InvalidTargetsError(f"the teacher's head is not a safetensors file: {error}") from None
    weight_VE, bias_V = tensors.get("weight"), tensors.get("bias")
    if tensors.keys() - NAMES or weight_VE is None or weight_VE.ndim != 2 or "scale" not in tensors:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise InvalidTargetsError(f"the teacher's head holds {shapes}, expected weight [V, D], scale, bias, soft_cap")
    if bias_V is not None and bias_V.shape != weight_VE.shape[:1]:
        raise InvalidTargetsError(
            f"the teacher's head has biases of shape {list(bias_V.shape)} for {len(weight_VE)} ids"
        )
    scale = float(tensors["scale"])
    dtype = torch.float32 if device.type == "cpu" else weight_VE.dtype
    return Head(
        weight_VD=weight_VE.to(device, dtype),
        bias_V=None if bias_V is None else bias_V.to(device, dtype),
        softcap=scale * float(tensors["soft_cap"]) if "soft_cap" in tensors else None,
        scale=scale,
    )
