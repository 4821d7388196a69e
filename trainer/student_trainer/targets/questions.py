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
from teacher_proto.store_entry import Ask as Question
from teacher_proto.targets import TokenTargets, check_targets

T = TypeVar("T")
Questions = list[tuple[int, Question]]  # each with the place of its document in the batch


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
            asked.append((place, Question(tokens_T.astype(np.int64), rows, ask, gathered)))
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


def gathered_ids(asked: Sequence[Question]) -> list[np.ndarray] | None:
    """The ids of kind `gather` of all these questions; None where it is not asked."""
    ids = [question.gather_ids_RG for question in asked if question.gather_ids_RG is not None]
    assert len(ids) in (0, len(asked))
    return ids or None


def check(question: Question, targets: TokenTargets, vocab_size: int) -> None:
    """InvalidTargetsError if that cannot be the answer."""
    spec, gathered = question.spec, question.gather_ids_RG
    check_targets(
        targets, kinds=spec.kinds, rows=question.rows, top_k=spec.top_k, num_temperatures=len(spec.temperatures),
        vocab_size=vocab_size, sequence_length=len(question.tokens_T), temperatures=spec.temperatures,
        num_gather=gathered.shape[1] if gathered is not None and "gather" in spec.kinds else None,
        num_samples=spec.num_samples or None, hidden_dtype=spec.hidden_dtype, tokens_T=question.tokens_T,
    )  # fmt: skip


async def together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first failure ends the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
