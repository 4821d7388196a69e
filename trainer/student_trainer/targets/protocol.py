"""Where targets come from: one protocol, and the records that pass it. Made by remote, local, cached and mixed.

`prefetch` calls `fetch` for batches ahead of the step, `evaluate` for the held-out ones; `align` turns what comes into
rows beside the student's hidden rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from student_trainer.data.batch import Batch, Document
from teacher_proto.requests import KINDS, Kind
from teacher_proto.targets import TokenTargets

if TYPE_CHECKING:
    from student_trainer.losses.terms import Term

# What each support of a loss asks a teacher for; `full` needs the teacher's head beside the hidden states.
KIND_OF_SUPPORT: dict[str, Kind] = {"top_k": "top_k", "gather": "gather", "sampled": "sampled", "full": "hidden"}


@dataclass(frozen=True)
class Ask:
    """What is asked of every row alike."""

    kinds: tuple[Kind, ...]
    top_k: int
    temperatures: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class BatchTargets:
    """A teacher's answer to a batch: by document, None where no row of it counts. `ask` is what was asked."""

    documents: tuple[TokenTargets | None, ...]
    ask: Ask
    fingerprint: str

    @property
    def nbytes(self) -> int:
        return sum(targets.nbytes for targets in self.documents if targets is not None)


@dataclass(frozen=True)
class TeacherCard:
    """Who answers: what a run keeps of its teacher in checkpoints and compares on resume.

    `identity` is the plain form of `TeacherIdentity`, None where several teachers answer together; `canary` are the
    logprobs of the client's fixed sequences, which catch a teacher that is not who it says.
    """

    name: str
    fingerprint: str
    vocab_size: int
    max_sequence_length: int
    tokenizer_sha256: str
    max_top_k: int
    kinds: tuple[Kind, ...]
    identity: dict[str, Any] | None = None
    canary: tuple[float, ...] | None = None


class Targets(Protocol):
    """A source of targets. All methods run on the prefetch thread's event loop."""

    async def open(self) -> TeacherCard:
        """Reach the teacher. A `StillhouseError` that says what to do if it can't be reached or is the wrong one."""
        ...

    async def fetch(self, batch: Batch, ask: Ask) -> BatchTargets:
        """The targets of every document of the batch. The answer depends on the batch and the teacher alone."""
        ...

    async def close(self) -> None: ...


def ask_for(terms: Iterable[Term], top_k: int) -> Ask:
    """What these losses need of a teacher; top K at least, which the sanity check and the figures want."""
    terms = [term for term in terms if term.kind != "cross_entropy"]
    kinds = {KIND_OF_SUPPORT[term.support] for term in terms} | {"top_k"}
    temperatures = {term.temperature for term in terms if term.temperature != 1.0}
    return Ask(tuple(kind for kind in KINDS if kind in kinds), top_k, tuple(sorted(temperatures)))


def counted_rows(batch: Batch, document: Document) -> tuple[int, int] | None:
    """The teacher's rows [start, stop) of a document from its first to its last row that counts; None if none does.

    Row t of the document is counted from its own first token. A document of one token has no row.
    """
    counted = np.flatnonzero(batch.loss_mask_BT[document.row, document.start : document.stop])
    return (int(counted[0]), int(counted[-1]) + 1) if len(counted) else None
