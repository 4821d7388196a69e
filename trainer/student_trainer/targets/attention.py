"""The teacher's attention states, fetched from the attention service together with the token targets.

Opened by `build_components`; `prefetch` then calls `BesideTokens`, and `align` cuts the result into micro batches.
States are sent, and the loss computes the relations from them. No batch is trained on without its states: an attention
service that is unreachable is waited for like the teacher, and any other error stops the run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Coroutine, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.losses.kinds import terms_of
from student_trainer.losses.terms import Needs, StatesTerm
from student_trainer.settings import Settings, TeacherSettings
from student_trainer.targets.background import EventThread, gather
from student_trainer.targets.open import Teacher
from student_trainer.targets.patience import retry_until
from student_trainer.targets.protocol import Queries, Targets, TeacherCard
from student_trainer.targets.queries import with_documents
from student_trainer.targets.remote import reach
from teacher_proto.attention import AttentionInfo, AttentionRequest, attention_cost, check_attention_request
from teacher_proto.attention_targets import AttentionTargets
from teacher_proto.client.attention_client import AttentionClient
from teacher_proto.client.replicas import RetryPolicy
from teacher_proto.client.splitting import FIXED_BYTES, check_alone
from teacher_proto.client.waiting import Waiting
from teacher_proto.compute.relations import layer_index
from teacher_proto.errors import OutOfRangeError, PoisonBatchError, TeacherUnavailableError
from teacher_proto.identity import TeacherIdentity
from teacher_proto.requests import TargetSpec

# The spec for a run that learns only from the teacher's attention.
NO_TOKENS = TargetSpec(kinds=())


class AttentionSource:
    """`make_client` is called on the event loop. `terms`: the losses that need the states, all of one layer and in one
    dtype. `reason`: the last error of an ongoing outage. `seq_len`: length of the longest document in tokens.
    """

    def __init__(
        self, make_client: Callable[[], AttentionClient], terms: Sequence[StatesTerm], waiting: TeacherSettings,
        seq_len: int,
    ):  # fmt: skip
        self._make_client, self._terms, self._waiting = make_client, terms, waiting
        layers = Needs.of(terms).layers
        if len(layers) != 1:
            raise ValueError(
                f"{', '.join(term.name for term in terms)} need the teacher's states in {len(layers)} forms, but "
                "only one layer in one dtype can be requested: give them the same layer and transport"
            )
        ((self._layer, self._dtype),) = layers
        self._seq_len = seq_len
        self._client: AttentionClient | None = None
        self._info: AttentionInfo | None = None
        self.reason = ""

    async def open(self) -> AttentionInfo:
        """Connect to the service. ValueError if it can't serve what the settings require."""
        self._client = self._make_client()
        self._info = await reach(
            self._client, "attention service", self._waiting.start_within_s, self._waiting.log_every_s
        )
        shape = self._info.shape
        try:
            layer = layer_index(self._layer, num_layers=shape.num_layers)
        except ValueError as error:
            raise ValueError(f"distillation.attention, the teacher: {error}") from None
        if layer > shape.max_layer:
            raise ValueError(
                f"distillation.attention.layer {self._layer} is the teacher's layer {layer}, but the attention "
                f"service has layers 0 to {shape.max_layer}: start it with --layer {layer}, or choose one of these"
            )
        for term in self._terms:
            term.check_teacher(shape.widths)
        self._check_longest(self._info)
        return self._info

    def _check_longest(self, info: AttentionInfo) -> None:
        """ValueError if the service would refuse a document as long as a row; it says what would fit."""
        # Checked now, so that such a document doesn't end the run after hours of training.
        longest = self._request([np.zeros(self._seq_len, np.int64)])
        field = f"a document of data.seq_len {self._seq_len}"
        try:
            check_attention_request(longest, info.limits, info.shape)
            num_bytes, cost = longest.sequence_bytes(0) + FIXED_BYTES, attention_cost(longest, info.shape)
            check_alone(field, self._seq_len, num_bytes, cost, info)
        except OutOfRangeError as error:
            raise ValueError(f"distillation.attention: the attention service rejects {field}: {error}") from None

    async def fetch(self, batch: Batch) -> tuple[AttentionTargets, ...]:
        """The states of every document. TeacherUnavailableError after `teacher.outage_timeout_s` without a service."""
        assert self._client is not None, "open() comes before fetch()"
        client, given = self._client, dict[int, AttentionTargets]()
        request = self._request([batch.tokens_BT[d.row, d.start : d.stop] for d in batch.documents])
        try:
            # `given` is kept between attempts, so that nothing received is requested again.
            answers = await retry_until(
                lambda: client.attention(request, given=given), self._waiting.outage_timeout_s, self._note,
                "attention service at teacher.attention_url", lambda: len(given),
            )  # fmt: skip
        except PoisonBatchError as error:
            raise with_documents(error, batch) from error
        return tuple(answers)

    def waiting(self) -> Waiting | None:
        return self._client.waiting() if self._client is not None else None

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    def _note(self, reason: str) -> None:
        self.reason = f"no attention states: {reason}" if reason else ""

    def _request(self, sequences: Sequence[np.ndarray]) -> AttentionRequest:
        return AttentionRequest(sequences=tuple(sequences), layer=self._layer, dtype=self._dtype)


class BesideTokens:
    """`Targets` that fetch token targets and attention states together; for rollouts, token targets only."""

    def __init__(self, tokens: Targets, attention: AttentionSource):
        self._tokens, self._attention = tokens, attention

    async def open(self) -> TeacherCard:
        return await self._tokens.open()

    async def head(self) -> bytes:
        return await self._tokens.head()

    async def fetch(self, batch: Batch, queries: Queries) -> BatchTargets:
        if batch.kind != "data":
            return await self._tokens.fetch(batch, queries)
        if all(query is None for query in queries):
            return BatchTargets((None,) * len(queries), NO_TOKENS, "", await self._attention.fetch(batch))
        calls: tuple[Coroutine[Any, Any, Any], ...] = (
            self._tokens.fetch(batch, queries),
            self._attention.fetch(batch),
        )
        tokens, attention = await gather(calls)
        with_attention: BatchTargets = replace(tokens, attention=attention)
        return with_attention

    def outage(self) -> str:
        return self._tokens.outage() or self._attention.reason

    def waiting(self) -> Waiting | None:
        return Waiting.sum_of((self._tokens.waiting(), self._attention.waiting()))

    async def close(self) -> None:
        await self._tokens.close()


def open_attention(settings: Settings, teacher: Teacher, thread: EventThread, stack: ExitStack) -> AttentionSource:
    """Connect to the attention service. StillhouseError if none answers, or if its model is not `teacher`'s."""
    asked = settings.teacher
    identity = teacher.card.identity
    beside = TeacherIdentity.model_validate(identity) if identity else teacher.card.fingerprint
    policy = RetryPolicy(deadline_s=min(asked.deadline_s, asked.outage_timeout_s), read_timeout_s=asked.read_timeout_s)

    def make_client() -> AttentionClient:
        key = os.environ.get(asked.key_variable)
        return AttentionClient(asked.attention_url, beside=beside, key=key, policy=policy)

    wanting = [term for term in terms_of(settings.distillation) if isinstance(term, StatesTerm) and term.needs.layers]
    source = AttentionSource(make_client, wanting, asked, settings.data.seq_len)
    stack.callback(lambda: thread.call(source.close()))
    try:
        thread.call(source.open())
    except TeacherUnavailableError as error:
        raise TeacherUnavailableError(
            f"no attention service at {', '.join(asked.attention_url)}: {error}. Set its address with "
            "teacher.attention_url=http://HOST:PORT, wait for one that is starting with teacher.start_within_s=600, or "
            "leave the relations out with distillation.attention.coefficient=null"
        ) from error
    return source
