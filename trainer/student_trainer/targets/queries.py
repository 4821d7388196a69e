"""A batch as queries to a teacher, one for each document that has rows which count. Used by who asks and who answers.

A document is a sequence of its own, so the teacher respects its boundaries as the student does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from student_trainer.batch.batch import Batch, counted_rows
from student_trainer.targets.protocol import Queries
from teacher_proto.errors import OutOfRangeError, PoisonBatchError
from teacher_proto.requests import Query, TargetSpec
from teacher_proto.targets import TokenTargets


def queries_of(batch: Batch, spec: TargetSpec, gather_ids: Sequence[np.ndarray] | None = None) -> Queries:
    """What is asked by document; None of one without a row that counts, and of all where `spec` has no kinds.

    `gather_ids`: by document, the ids [R, G] of kind `gather`, a row for each row asked about.
    """
    if not spec.kinds:
        return (None,) * len(batch.documents)
    queries: list[Query | None] = []
    for place, document in enumerate(batch.documents):
        rows = counted_rows(batch, document)
        tokens_T = batch.tokens_BT[document.row, document.start : document.stop].astype(np.int64)
        ids_RG = None if gather_ids is None else gather_ids[place]
        queries.append(None if rows is None else Query(tokens_T, rows, spec, ids_RG))
    return tuple(queries)


def asked_of(batch: Batch, queries: Queries, vocab_size: int) -> list[Query]:
    """The queries that there are, in order.

    OutOfRangeError with the document that holds a token which the teacher, of `vocab_size` ids, does not have.
    """
    asked = []
    for document, query in zip(batch.documents, queries, strict=True):
        if query is None:
            continue
        if int(query.tokens_T.max()) >= vocab_size:
            at = int(np.argmax(query.tokens_T >= vocab_size))
            raise OutOfRangeError(
                f"document {document.key} holds token {int(query.tokens_T[at])} at its place {at}, the teacher's "
                f"vocabulary ends at {vocab_size - 1}: data for a teacher is made of tokens that both know",
                field=document.key, got=int(query.tokens_T[at]), limit=vocab_size - 1,
            )  # fmt: skip
        asked.append(query)
    return asked


def by_document(queries: Queries, answers: Sequence[TokenTargets | None]) -> tuple[TokenTargets | None, ...]:
    """The answers to the queries that there are, each at the place of its document."""
    answered = iter(answers)
    return tuple(None if query is None else next(answered) for query in queries)


def spec_of(queries: Queries) -> TargetSpec:
    """What is asked of all of them alike; of no kind where nothing is asked."""
    return next((query.spec for query in queries if query is not None), TargetSpec(()))


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
