"""The record that leaves the data package: one batch of packed rows. Made by `packing`, read by the loop, the losses
and the target sources.

Row t predicts token t+1: `loss_mask_BT[b, t]` is True where token t+1 lies in the same document and counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Document:
    """`tokens_BT[row, start:stop]` is one document, or a piece of one; `key` names it in dumps.

    The key is "source:index" for a whole document and "source:index:offset" for a piece that begins at that token.
    """

    row: int
    start: int
    stop: int
    source: str
    key: str


# Whose text a batch holds: the data's, or the student's. The loss on it and the requested targets depend on that.
Kind = Literal["data", "rollout"]


@dataclass(frozen=True)
class RolloutSums:
    """Totals over the sequences that the student wrote. `logprob` in nats, at temperature 1."""

    sequences: int
    tokens: int
    ended: int  # sequences that the student ended
    logprob: float
    passes: int = 0  # forward passes without prefills, of a student that writes several tokens per pass

    def over(self, total: Callable[[Sequence[float]], Sequence[float]]) -> "RolloutSums":
        """The totals over all ranks; `total` sums numbers over the ranks."""
        sequences, tokens, ended, logprob, passes = total(astuple(self))
        return RolloutSums(int(sequences), int(tokens), int(ended), logprob, int(passes))

    def means(self) -> dict[str, float]:
        """For metrics: sequences; tokens per sequence; the share that ended; mean logprob of a token, which estimates
        minus the entropy; tokens per pass, if passes were counted.
        """
        per_sequence, per_token = 1 / max(self.sequences, 1), 1 / max(self.tokens, 1)
        return {
            "sequences": self.sequences,
            "mean_length": self.tokens * per_sequence,
            "ended": self.ended * per_sequence,
            "logprob": self.logprob * per_token,
            **({"tokens_per_pass": self.tokens / self.passes} if self.passes else {}),
        }


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens. Padding: pad id, position 0, document -1, source -1, no loss.

    `first_row`: the index of the first row in the whole batch, of which this may be a rank's share.
    """

    number: int
    tokens_BT: np.ndarray  # int32
    position_ids_BT: np.ndarray  # int32, from 0 in each document
    document_ids_BT: np.ndarray  # int32, 0.. within a row
    loss_mask_BT: np.ndarray  # bool
    documents: tuple[Document, ...]  # by row, then by start
    source_names: tuple[str, ...]
    source_ids_BT: np.ndarray  # int16, into source_names
    first_row: int = 0
    rollout: RolloutSums | None = None  # of a batch that the student wrote: its prompts do not count
    # int32, of such a batch: at which write of its sequence a token was written, from 1; 0: given, or written in order.
    written_at_BT: np.ndarray | None = None

    @property
    def kind(self) -> Kind:
        return "data" if self.rollout is None else "rollout"

    @property
    def fill_rate(self) -> float:
        """Share of the B x T places that hold a token."""
        return float((self.document_ids_BT >= 0).mean())

    def counted(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of each of the C positions that count, by row and then by column, as labels are numbered.

        The position at column t predicts token t+1.
        """
        row_C, column_C = np.nonzero(self.loss_mask_BT)
        return row_C, column_C

    def rows(self, start: int, stop: int) -> "Batch":
        """The rows start..stop of the batch, the rows of its documents counted from the new first one."""
        return replace(
            self,
            tokens_BT=self.tokens_BT[start:stop],
            position_ids_BT=self.position_ids_BT[start:stop],
            document_ids_BT=self.document_ids_BT[start:stop],
            loss_mask_BT=self.loss_mask_BT[start:stop],
            source_ids_BT=self.source_ids_BT[start:stop],
            written_at_BT=None if self.written_at_BT is None else self.written_at_BT[start:stop],
            documents=tuple(replace(d, row=d.row - start) for d in self.documents if start <= d.row < stop),
            first_row=self.first_row + start,
        )


def counted_rows(batch: Batch, document: Document) -> tuple[int, int] | None:
    """The teacher's rows [start, stop) of a document, from its first to its last row that counts; None if none does.

    Rows are counted from the document's first token. A document of one token has no row.
    """
    counted = np.flatnonzero(batch.loss_mask_BT[document.row, document.start : document.stop])
    return (int(counted[0]), int(counted[-1]) + 1) if len(counted) else None


@dataclass(frozen=True)
class Placed:
    """A sequence for `build_batch` to write into a row."""

    source: int
    key: str
    ids_N: np.ndarray  # int32
    counts_N: np.ndarray | None  # bool: which tokens are learnt; None: all


def build_batch(
    number: int, rows: Sequence[Sequence[Placed]], seq_len: int, pad_id: int, source_names: tuple[str, ...],
    first_row: int = 0,
) -> Batch:  # fmt: skip
    """Write the sequences of each row one after another and pad to `seq_len`."""
    shape = (len(rows), seq_len)
    tokens_BT = np.full(shape, pad_id, np.int32)
    position_ids_BT = np.zeros(shape, np.int32)
    document_ids_BT = np.full(shape, -1, np.int32)
    loss_mask_BT = np.zeros(shape, bool)
    source_ids_BT = np.full(shape, -1, np.int16)
    documents = []
    for row, sequences in enumerate(rows):
        start = 0
        for ordinal, sequence in enumerate(sequences):
            stop = start + len(sequence.ids_N)
            assert start < stop <= seq_len
            tokens_BT[row, start:stop] = sequence.ids_N
            position_ids_BT[row, start:stop] = np.arange(stop - start)
            document_ids_BT[row, start:stop] = ordinal
            source_ids_BT[row, start:stop] = sequence.source
            loss_mask_BT[row, start : stop - 1] = True if sequence.counts_N is None else sequence.counts_N[1:]
            documents.append(Document(row, start, stop, source_names[sequence.source], sequence.key))
            start = stop
    return Batch(
        number=number,
        tokens_BT=tokens_BT,
        position_ids_BT=position_ids_BT,
        document_ids_BT=document_ids_BT,
        loss_mask_BT=loss_mask_BT,
        documents=tuple(documents),
        source_names=source_names,
        source_ids_BT=source_ids_BT,
        first_row=first_row,
    )
