"""The student's own most likely ids, for divergences on its support: the client sends them to the teacher as `gather`.

Called by whoever builds requests for terms with `support="gather"` (reverse KL and JSD on the student's side, as in
on-policy distillation). Reverse KL lives where the student has mass, and the teacher's top K may miss that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from student_trainer.losses.chunks import default_chunk_rows
from student_trainer.losses.projection import HeadProjection


@torch.no_grad()
def student_top_ids(
    hidden_ND: Tensor,
    head_weight_VD: Tensor,
    k: int,
    *,
    head_bias_V: Tensor | None = None,
    shared_vocab: int | None = None,
    chunk_rows: int | None = None,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """Ids [N, k] (int64) of the student's k largest logits, largest first, among the first `shared_vocab` ids.

    `compute`: the dtype that the student computes in, see `projection`. Soft cap and scale keep the order of logits and
    are not asked for. Raises ValueError if k is more than there is.
    """
    width = len(head_weight_VD) if shared_vocab is None else shared_vocab
    if not 0 < k <= width:
        raise ValueError(f"got k {k}, expected 1 to {width}")
    bias_W = None if head_bias_V is None else head_bias_V[:width]
    # Without cap and scale: both keep the order of logits.
    head = HeadProjection(head_weight_VD[:width], bias_W, None, 1.0, hidden_ND.dtype, compute)
    height = min(chunk_rows or default_chunk_rows(width, hidden_ND.device), max(1, len(hidden_ND)))
    # One chunk of logits, written over by the next.
    z_CW = torch.empty(height, width, dtype=head.accumulator, device=hidden_ND.device)
    ids_NK = torch.empty(len(hidden_ND), k, dtype=torch.long, device=hidden_ND.device)
    for start in range(0, len(hidden_ND), height):
        hidden_CD = hidden_ND[start : start + height].to(head.dtype)
        head.project(hidden_CD, z_CW[: len(hidden_CD)])
        head.cap_(z_CW[: len(hidden_CD)])
        ids_NK[start : start + height] = z_CW[: len(hidden_CD)].topk(k, -1).indices
    return ids_NK
