"""Cross-entropy of a block-diffusion student by how much of a token's block is masked. Called by `evaluator`.

`cross_entropy_masked_25` and so on: over tokens in blocks that are masked by at most that percentage, and by more than
that of the preceding metric. The lower ones show the value of right context, the last how the student begins a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.batch.view import OrderedDocuments, View
from student_trainer.evaluation.records import Metrics
from student_trainer.ranks import Ranks
from student_trainer.students.diffusion_reader import DiffusionReader
from student_trainer.students.diffusion_record import DiffusionRecord
from student_trainer.students.student import Student

PER_CENT = (25, 50, 75, 100)


class MaskRates:
    """Accumulates the micro batches of one source."""

    def __init__(self, record: DiffusionRecord, device: torch.device):
        self._record = record
        self._sums_2R = torch.zeros(2, len(PER_CENT), dtype=torch.float64, device=device)

    @classmethod
    def of(cls, student: Student) -> MaskRates | None:
        """None unless the student is a diffusion student."""
        reader = student.reader
        return cls(reader.record, student.device) if isinstance(reader, DiffusionReader) else None

    def add(self, micro: MicroBatch, cross_entropy_N: Tensor) -> None:
        if not len(micro.view.labels_N):
            return
        # Bin r holds percentages above PER_CENT[r - 1] and up to PER_CENT[r].
        share_N = masked_share(micro.view, self._record)
        edges_R = torch.tensor(PER_CENT, device=share_N.device)
        at_N = torch.searchsorted(edges_R, (100.0 * share_N).contiguous()).clamp_max(len(PER_CENT) - 1)
        for row, values_N in enumerate((cross_entropy_N.double(), torch.ones_like(share_N, dtype=torch.float64))):
            self._sums_2R[row].index_add_(0, at_N, values_N)

    def metrics(self, ranks: Ranks) -> Metrics:
        """The metrics over all ranks, which must all call it; bins without tokens are left out."""
        sums_R, counts_R = ranks.add_up(self._sums_2R.cpu())
        every = zip(PER_CENT, sums_R.tolist(), counts_R.tolist(), strict=True)
        return {f"cross_entropy_masked_{per_cent}": total / count for per_cent, total, count in every if count}


def masked_share(view: View, record: DiffusionRecord) -> Tensor:
    """[N]: the masked fraction of each label's block."""
    attention = view.attention
    assert isinstance(attention, OrderedDocuments), "a diffusion student's view has blocks"
    groups_BT = attention.groups_BT.long()
    row_B1 = torch.arange(len(groups_BT), device=groups_BT.device)[:, None]
    # A number for each block of each document of each row; tokens in no block get numbers that no block has.
    blocks = int(groups_BT.max()) + 2
    documents = int(attention.document_ids_BT.max()) + 2
    block_BT = (row_B1 * documents + attention.document_ids_BT.long() + 1) * blocks + groups_BT + 1
    masked_BT = (view.input_ids_BT == record.mask_token_id) & (groups_BT >= 0)
    place_N = view.rows_N + (1 if record.family == "token_shift" else 0)
    of_N, size = block_BT.flatten()[place_N], int(block_BT.max()) + 1
    # Masked tokens of a block divided by all its tokens, looked up for each label's block.
    count_M = torch.bincount(block_BT[masked_BT], minlength=size)
    return count_M[of_N].float() / torch.bincount(block_BT[groups_BT >= 0], minlength=size)[of_N]
