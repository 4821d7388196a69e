"""Turns a batch into queries to a teacher, one for each document with counted rows. Used by sources of targets and
their callers.

Each document is a separate sequence, so the teacher respects document boundaries as the student does.
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
    """One query for each document; None for those without a counted row, and for all if `spec` has no kinds.

    `gather_ids`: for each document, the ids [R, G] of kind `gather`, one row for each requested row.
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


def valid_queries(batch: Batch, queries: Queries, vocab_size: int) -> list[Query]:
    """The queries that are not None, in order.

    OutOfRangeError names the first document with a token outside the teacher's vocabulary of `vocab_size` ids.
    """
    asked = []
    for document, query in zip(batch.documents, queries, strict=True):
        if query is None:
            continue
        if int(query.tokens_T.max()) >= vocab_size:
            at = int(np.argmax(query.tokens_T >= vocab_size))
            raise OutOfRangeError(
                f"document {document.key} has token {int(query.tokens_T[at])} at position {at}, but the teacher's "
                f"vocabulary ends at {vocab_size - 1}: the data may only contain tokens that both models know",
                field=document.key, got=int(query.tokens_T[at]), limit=vocab_size - 1,
            )  # fmt: skip
        asked.append(query)
    return asked


def by_document(queries: Queries, answers: Sequence[TokenTargets | None]) -> tuple[TokenTargets | None, ...]:
    """The results of `valid_queries`'s queries, each put at its document's index, None elsewhere."""
    answered = iter(answers)
    return tuple(None if query is None else next(answered) for query in queries)


def spec_of(queries: Queries) -> TargetSpec:
    """The spec that all queries share; one without kinds if there are no queries."""
    return next((query.spec for query in queries if query is not None), TargetSpec(()))


def with_documents(error: PoisonBatchError, batch: Batch) -> PoisonBatchError:
    """The same error with the names of the refused documents."""
    keys = [
        document.key
        for document in batch.documents
        for tokens_T in [batch.tokens_BT[document.row, document.start : document.stop]]
        if any(np.array_equal(tokens_T, refused_T) for refused_T in error.request.sequences)
    ]
    message = f"document {', '.join(keys)}: {error.message}"
    return type(error)(message, field=error.field, request=error.request, reasons=error.reasons)
