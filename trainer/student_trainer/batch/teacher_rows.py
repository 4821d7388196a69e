"""The teacher's targets for N rows of the student, as tensors on the student's device.

Made by `align` and `record_rows`, which match them to the student's rows; read by `head.head_loss` and by terms on
states. Nothing here knows about the wire format or about sequences.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from student_trainer.batch.head import Head
from student_trainer.batch.tensors import moved, to_device
from teacher_proto.compute.relations import QKV

# Fields whose first dimension is N; the ragged `sampled_*` fields are split by their offsets.
_ROW_FIELDS = (
    "ids_NK",
    "logprobs_NK",
    "lse_N",
    "log_z_NT",
    "tempered_logprobs_NKT",
    "next_logprob_N",
    "valid_N",
    "gather_ids_NG",
    "gather_logprobs_NG",
    "teacher_hidden_NE",
)


@dataclass(frozen=True)
class TeacherRows:
    """N teacher rows; row n belongs to the student's hidden row n. A field that was not requested is None.

    `ids_NK` and `logprobs_NK`: the K largest logprobs at temperature 1, largest first, any float dtype.
    `log_z_NT`: one scalar for each of `temperatures`, log_z = lse(z / T) - lse(z) / T, so that the exact probability
    at T is exp(logprob / T - log_z). Temperature 1 needs no column.
    `tempered_logprobs_NKT`: logprobs of `ids_NK` at each of `temperatures`, if they do not follow from those at 1:
    several teachers' probabilities mixed at each. Then no probability exceeds the true one, and there is no log_z.
    `valid_N`: False where the teacher has no row (padding, the edge of an alignment); values there are never used.
    `gather_*`: logprobs at ids that the student chose. `sampled_*`: row n drew `sampled_ids[o[n]:o[n+1]]`, with o the
    offsets, each `sampled_counts` times, from the teacher at `sampled_temperature`. `sampled_width`: the most distinct
    ids drawn on any row, if known without asking a device.
    `teacher_hidden_NE`: final hidden states after the last norm, with the `teacher_head` that makes logits of the
    teacher's vocabulary from them; for terms with `support="full"`.
    """

    ids_NK: Tensor | None = None
    logprobs_NK: Tensor | None = None
    lse_N: Tensor | None = None
    log_z_NT: Tensor | None = None
    temperatures: tuple[float, ...] = ()
    tempered_logprobs_NKT: Tensor | None = None
    next_logprob_N: Tensor | None = None
    valid_N: Tensor | None = None
    gather_ids_NG: Tensor | None = None
    gather_logprobs_NG: Tensor | None = None
    sampled_offsets: Tensor | None = None
    sampled_ids: Tensor | None = None
    sampled_counts: Tensor | None = None
    sampled_temperature: float = 1.0
    sampled_width: int | None = None
    teacher_hidden_NE: Tensor | None = None
    teacher_head: Head | None = None

    def select(self, index: Tensor | slice) -> TeacherRows:
        """The rows that `index` (indices, a mask or a slice) selects, in its order."""
        changes: dict[str, Any] = {}
        for name in _ROW_FIELDS:
            value = getattr(self, name)
            if value is not None:
                changes[name] = value[index]
        if self.sampled_offsets is not None:
            changes |= self._select_sampled(index)
        return dataclasses.replace(self, **changes)

    def to(self, device: torch.device | str) -> TeacherRows:
        """The same rows on `device`; the head moves too."""
        head, width = self.teacher_head, self.sampled_width
        if width is None and self.sampled_offsets is not None and self.sampled_offsets.device.type == "cpu":
            width = self._most_drawn()
        head = None if head is None else to_device(head, device)
        return to_device(self, device, teacher_head=head, sampled_width=width)

    def log_z_at(self, temperature: float) -> Tensor | None:
        """log_z [N] at `temperature`; None at 1, where it is zero by definition. ValueError if it was not requested."""
        if temperature == 1.0:
            return None
        if self.log_z_NT is None or temperature not in self.temperatures:
            raise ValueError(
                f"a loss at temperature {temperature} needs the teacher's log_z at that temperature, but the targets "
                f"have temperatures {list(self.temperatures)}; request {temperature} from the teacher as well"
            )
        return self.log_z_NT[:, self.temperatures.index(temperature)]

    def tempered_at(self, temperature: float) -> Tensor | None:
        """Logprobs [N, K] of `ids_NK` at `temperature`; None where they follow from those at 1."""
        if self.tempered_logprobs_NKT is None or temperature == 1.0 or temperature not in self.temperatures:
            return None
        return self.tempered_logprobs_NKT[:, :, self.temperatures.index(temperature)]

    def sampled_padded(self) -> tuple[Tensor, Tensor]:
        """(ids_NU, counts_NU) with U the most distinct ids drawn on any row; count 0 marks padding."""
        assert self.sampled_offsets is not None and self.sampled_ids is not None and self.sampled_counts is not None
        lengths_N = self.sampled_offsets[1:] - self.sampled_offsets[:-1]
        width = max(1, self._most_drawn() if self.sampled_width is None else self.sampled_width)
        slot_U = torch.arange(width, device=lengths_N.device)
        live_NU = slot_U < lengths_N[:, None]
        position_NU = (self.sampled_offsets[:-1, None] + slot_U).clamp_(max=max(0, len(self.sampled_ids) - 1)).long()
        if len(self.sampled_ids) == 0:
            return torch.zeros_like(position_NU), torch.zeros_like(position_NU)
        return self.sampled_ids.long()[position_NU], torch.where(live_NU, self.sampled_counts.long()[position_NU], 0)

    def _most_drawn(self) -> int:
        assert self.sampled_offsets is not None
        return int(self.sampled_offsets.diff().max()) if len(self.sampled_offsets) > 1 else 0

    def _select_sampled(self, index: Tensor | slice) -> dict[str, Any]:
        assert self.sampled_offsets is not None and self.sampled_ids is not None and self.sampled_counts is not None
        starts = self.sampled_offsets[:-1][index].long()
        lengths = self.sampled_offsets[1:][index].long() - starts
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.long, device=lengths.device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        row_of = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        position = starts[row_of] + torch.arange(len(row_of), device=lengths.device) - offsets[:-1][row_of]
        return {
            "sampled_offsets": offsets,
            "sampled_ids": self.sampled_ids[position],
            "sampled_counts": self.sampled_counts[position],
            "sampled_width": None,
        }


@dataclass(frozen=True, eq=False)
class TeacherAttention:
    """The teacher's attention states for a micro batch, by document: by row and then from left to right.

    `document_ids_BT`: the document of each position of the view whose state is compared with the teacher's, -1
    elsewhere. It stays on the CPU, where documents are told apart; so does `blocks_BT`, the block of each of these
    positions, None for a student without blocks.
    """

    documents: tuple[QKV, ...]
    document_ids_BT: np.ndarray
    blocks_BT: np.ndarray | None = None

    def to(self, device: torch.device) -> TeacherAttention:
        documents = tuple(QKV(*(moved(part, device) for part in document)) for document in self.documents)
        return to_device(self, device, documents=documents)
