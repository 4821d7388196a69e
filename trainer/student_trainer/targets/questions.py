"""A batch as questions to a teacher, one for each document that has rows which count. Used by all sources of targets.

A document is a sequence of its own, so the teacher respects its boundaries as the student does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from student_trainer.batch.batch import Batch, counted_rows
from student_trainer.targets.protocol import Ask, GatherIds
from teacher_proto.errors import OutOfRangeError, PoisonBatchError
from teacher_proto.requests import Query
from teacher_proto.targets import TokenTargets

T = TypeVar("T")
Questions = list[tuple[int, Query]]  # each with the place of its document in the batch


def questions(batch: Batch, ask: Ask, vocab_size: int, gather_ids: GatherIds | None = None) -> Questions:
    """What is asked, in the order of the documents; those without a row that counts are left out.

    OutOfRangeError with the document that holds a token which the teacher, of `vocab_size` ids, does not have.
    """
    asked = []
    for place, document in enumerate(batch.documents):
        tokens_T = batch.tokens_BT[document.row, document.start : document.stop]
        if len(tokens_T) and int(tokens_T.max()) >= vocab_size:
            at = int(np.argmax(tokens_T >= vocab_size))
            raise OutOfRangeError(
                f"document {document.key} holds token {int(tokens_T[at])} at its place {at}, the teacher's "
                f"vocabulary ends at {vocab_size - 1}: data for a teacher is made of tokens that both know",
                field=document.key, got=int(tokens_T[at]), limit=vocab_size - 1,
            )  # fmt: skip
        rows = counted_rows(batch, document)
        if rows is not None:
            gathered = None if gather_ids is None else gather_ids[place]
            asked.append((place, Query(tokens_T.astype(np.int64), rows, ask, gathered)))
    return asked


def answers(batch: Batch, asked: Questions, given: Sequence[TokenTargets | None]) -> tuple[TokenTargets | None, ...]:
    """The answers in the order of the batch's documents; None for one that was not asked about."""
    placed: list[TokenTargets | None] = [None] * len(batch.documents)
    for (place, _), targets in zip(asked, given, strict=True):
        placed[place] = targets
    return tuple(placed)


def with_documents(error: PoisonBatchError, batch: Batch) -> PoisonBatchError:
    """The same error with the names of the documents that its sequences are."""
    keys = [
        document.key
        for document in batch.documents
        for tokens_T in [batch.tokens_BT[document.row, document.start : document.stop]]
        if any(np.array_equal(tokens_T, refused_T) for refused_T in error.request.sequences)
    ]
    message = f"document {', '.join(keys)}: {error.message}"
    return type(error)(message, field=error.field, request=error.request, reasons=error.reasons)


def gathered_ids(asked: Sequence[Query]) -> list[np.ndarray] | None:
    """The ids of kind `gather` of all these queries; None where it is not asked."""
    ids = [query.gather_ids_RG for query in asked if query.gather_ids_RG is not None]
    assert len(ids) in (0, len(asked))
    return ids or None


async def together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first failure ends the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
