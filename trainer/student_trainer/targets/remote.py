"""Targets from a teacher service, one replica or several. Built by `build`, called through the `Targets` protocol.

Each document of a batch is a sequence of its own, so the teacher respects document boundaries as the student does.
Only rows that count are asked for; a document without any is not sent at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from student_trainer.data.batch import Batch
from student_trainer.targets.protocol import Ask, BatchTargets, GatherIds, TeacherCard, counted_rows
from teacher_proto.client import TeacherClient
from teacher_proto.errors import OutOfRangeError
from teacher_proto.requests import Limits, TargetsRequest
from teacher_proto.targets import TokenTargets


class RemoteTargets:
    """`make_client` is called on the event loop, where the client lives. `start_within_s`: how long `open` waits."""

    def __init__(self, make_client: Callable[[], TeacherClient], start_within_s: float = 0.0):
        self._make_client = make_client
        self._start_within_s = start_within_s
        self.client: TeacherClient | None = None
        self._limits: Limits | None = None
        self._fingerprint = ""

    async def open(self) -> TeacherCard:
        if self.client is None:
            self.client = self._make_client()
        info = await self.client.teacher(self._start_within_s)
        self._limits, self._fingerprint = info.limits, info.fingerprint
        semantic = info.identity.semantic
        canary = self.client.canary
        return TeacherCard(
            name=semantic.model,
            fingerprint=info.fingerprint,
            vocab_size=info.limits.vocab_size,
            max_sequence_length=info.limits.max_sequence_length,
            tokenizer_sha256=semantic.tokenizer_sha256,
            max_top_k=info.limits.max_top_k,
            kinds=info.kinds,
            identity=info.identity.model_dump(mode="json"),
            canary=canary.logprobs if canary is not None else None,
        )

    async def fetch(self, batch: Batch, ask: Ask, gather_ids: GatherIds | None = None) -> BatchTargets:
        assert self.client is not None and self._limits is not None, "open() comes before fetch()"
        client = self.client
        wanted = [(place, rows) for place, rows in enumerate(_rows(batch)) if rows is not None]
        answers: list[TokenTargets | None] = [None] * len(batch.documents)
        _check_tokens(batch, self._limits.vocab_size)
        groups = split(batch, wanted, self._limits)
        requests = [_request(batch, group, ask, gather_ids) for group in groups]
        for group, targets in zip(groups, await _all(client, requests), strict=True):
            for (place, _), answer in zip(group, targets, strict=True):
                answers[place] = answer
        return BatchTargets(tuple(answers), ask, self._fingerprint)

    async def head(self) -> bytes:
        assert self.client is not None, "open() comes before head()"
        return await self.client.head()

    def outage(self) -> str:
        """What is known of an outage that the client is still trying to outlast; empty while there is none."""
        lasted_s = self.client.outage_s if self.client is not None else 0.0
        return f"{self.client!r} has found no replica that can be asked for {lasted_s:.0f} s" if lasted_s else ""

    async def close(self) -> None:
        if self.client is not None:
            await self.client.close()


Wanted = tuple[int, tuple[int, int]]  # which document, and its rows [start, stop)


def split(batch: Batch, wanted: list[Wanted], limits: Limits) -> list[list[Wanted]]:
    """The documents in requests that each keep to the teacher's limits, in order."""
    groups: list[list[Wanted]] = []
    tokens = 0
    for place, rows in wanted:
        document = batch.documents[place]
        length = document.stop - document.start
        full = not groups or len(groups[-1]) >= limits.max_sequences or tokens + length > limits.max_request_tokens
        if full:
            groups.append([])
            tokens = 0
        groups[-1].append((place, rows))
        tokens += length
    return groups


async def _all(client: TeacherClient, requests: list[TargetsRequest]) -> list[list[TokenTargets]]:
    """All answers; the first failure ends the others."""
    tasks = [asyncio.ensure_future(client.targets(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _rows(batch: Batch) -> list[tuple[int, int] | None]:
    return [counted_rows(batch, document) for document in batch.documents]


def _request(batch: Batch, group: list[Wanted], ask: Ask, gather_ids: GatherIds | None) -> TargetsRequest:
    documents = [batch.documents[place] for place, _ in group]
    sequences = [batch.tokens_BT[d.row, d.start : d.stop] for d in documents]
    gathered = None if gather_ids is None else [gather_ids[place] for place, _ in group]
    return TargetsRequest.of(ask, sequences, [rows for _, rows in group], gathered)


def _check_tokens(batch: Batch, vocab_size: int) -> None:
    """OutOfRangeError with the document that holds a token the teacher has not: its limits would only say a number."""
    for document in batch.documents:
        tokens_T = batch.tokens_BT[document.row, document.start : document.stop]
        if len(tokens_T) and int(tokens_T.max()) >= vocab_size:
            place = int(np.argmax(tokens_T >= vocab_size))
            raise OutOfRangeError(
                f"document {document.key} holds token {int(tokens_T[place])} at its place {place}, the teacher's "
                f"vocabulary ends at {vocab_size - 1}: data for a teacher is made of tokens that both know",
                field=document.key, got=int(tokens_T[place]), limit=vocab_size - 1,
            )  # fmt: skip
