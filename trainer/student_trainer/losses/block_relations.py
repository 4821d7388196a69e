"""Attention relations within the blocks of a clean half: KL(teacher || student), block by block. Called by
`attention_term`.

The teacher is causal within a block. A causal clean half is too, so all of its rows are compared. In a block-causal
clean half a token also sees the tokens after it in its block: only the last token of a block sees what the teacher's
row sees, so only those rows are compared. The states that they are related to have seen more than the teacher's, except
in the first layer.

`maps` compares attention maps instead of relations, restricted to a block's own tokens, each with those up to itself.
What the student's map gives to later tokens of the block has no counterpart in the teacher's and is left out of the
softmax; with m that mass, this drops -log(1 - m) from the divergence.

Blocks are small, so the products of all blocks of a batch are computed at once: [blocks, R, size, size].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from teacher_proto.compute.relations import PARTS, QKV, RelationForm, relation_form, similarity_factor

MAPS = "maps"


@dataclass(frozen=True)
class BlockTable:
    """Blocks of clean positions. `place_BlS`: the positions of each block in the flattened [B * T], then -1.
    `document_Bl`: the document of each block, numbered by row and then by start.
    """

    place_BlS: Tensor
    document_Bl: Tensor

    @classmethod
    def of(cls, document_ids_BT: np.ndarray, blocks_BT: np.ndarray) -> BlockTable:
        """`document_ids_BT` is -1 where a position is not to be compared."""
        flat_M = np.flatnonzero(document_ids_BT.reshape(-1) >= 0)
        row_M = flat_M // document_ids_BT.shape[1]
        # (row, document, block) of each compared position: a new block starts where any of them changes.
        named_M3 = np.stack([row_M, document_ids_BT.reshape(-1)[flat_M], blocks_BT.reshape(-1)[flat_M]], 1)
        new_M = np.r_[True, (np.diff(named_M3, axis=0) != 0).any(1)] if len(flat_M) else np.zeros(0, bool)
        document_M = np.cumsum(np.r_[False, (np.diff(named_M3[:, :2], axis=0) != 0).any(1)]) if len(flat_M) else flat_M
        block_M = np.cumsum(new_M) - 1
        first_Bl = np.flatnonzero(new_M)
        # The place within its block, which is its column in the table.
        within_M = np.arange(len(flat_M)) - first_Bl[block_M] if len(flat_M) else flat_M
        table = np.full((len(first_Bl), int(within_M.max(initial=0)) + 1), -1)
        table[block_M, within_M] = flat_M
        return cls(torch.from_numpy(table), torch.from_numpy(document_M[first_Bl]))


def block_relations(
    student: QKV, teacher: Sequence[QKV], blocks: BlockTable, *, form: str, relation_heads: int, last_rows: bool
) -> Tensor:
    """[documents] float32, differentiable: the KL averaged over a document's compared rows and reduced as in
    `attention_relations`; for maps, averaged over rows and heads.

    `student`: [B, T, H, dh] of one layer; `teacher`: [T_document, H, dh] by document. `last_rows`: compare only the
    last row of each block. ValueError if the two cannot be compared.
    """
    device = student.query.device
    if not len(blocks.place_BlS):
        return torch.zeros(len(teacher), device=device)
    place_BlS = blocks.place_BlS.to(device)
    seen_BlS = place_BlS >= 0
    # The documents' tokens are in the order of the places, so a place's teacher row is the number of places before it.
    order_BlS = (seen_BlS.flatten().cumsum(0) - 1).view_as(place_BlS).clamp(min=0)
    with torch.autocast(device.type, enabled=False):
        # [Bl, S, H, dh]: the states of a block's positions side by side.
        ours = [part.flatten(0, 1)[place_BlS.clamp(min=0)].float() for part in student]
        theirs = [torch.cat([getattr(each, part) for each in teacher]).to(device)[order_BlS].float() for part in PARTS]
        if form == MAPS:
            values_BlS = _map_values(ours, theirs, seen_BlS)
        else:
            values_BlS = _relation_values(ours, theirs, seen_BlS, relation_form(form), relation_heads)
    counts_BlS = seen_BlS
    if last_rows:
        # A place is the last of its block if the table has none after it.
        counts_BlS = seen_BlS & ~torch.nn.functional.pad(seen_BlS[:, 1:], (0, 1))
    # From blocks to documents: the sum over the counted rows, and their number.
    document_Bl = blocks.document_Bl.to(device)
    sums_D, counts_D = (
        torch.zeros(len(teacher), device=device).index_add(0, document_Bl, each)
        for each in ((values_BlS * counts_BlS).sum(1), counts_BlS.sum(1).float())
    )
    return sums_D / counts_D.clamp(min=1)


def _map_values(ours: Sequence[Tensor], theirs: Sequence[Tensor], seen_BlS: Tensor) -> Tensor:
    """[Bl, S]: the KL of attention maps, averaged over heads."""
    _check_heads(ours[0], theirs[0])
    values_BlS = _divergence(_map_scores(theirs), _map_scores(ours), seen_BlS, causal=True, floor=0.0)
    return values_BlS / ours[0].shape[2]


def _relation_values(
    ours: Sequence[Tensor], theirs: Sequence[Tensor], seen_BlS: Tensor, form: RelationForm, relation_heads: int
) -> Tensor:
    """[Bl, S]: the KL of the relations of Q, K and V, summed."""
    values_BlS = torch.zeros(seen_BlS.shape, device=seen_BlS.device)
    for our_BlSHd, their_BlSHd in zip(ours, theirs, strict=True):
        scores = [
            factor @ factor.transpose(-2, -1)
            for factor in (
                similarity_factor(part, form=form, relation_heads=relation_heads) for part in (their_BlSHd, our_BlSHd)
            )
        ]
        values_BlS = values_BlS + _divergence(scores[0], scores[1], seen_BlS, causal=form.causal, floor=form.floor)
    # The mean over relation heads; the official form divides by R once more, as the released code does.
    return values_BlS / relation_heads ** (2 if form.per_head else 1)


def _divergence(their_BlRSS: Tensor, our_BlRSS: Tensor, seen_BlS: Tensor, *, causal: bool, floor: float) -> Tensor:
    """KL of the rows' softmax over the block's tokens, summed over heads: [Bl, S]."""
    size = seen_BlS.shape[1]
    # A row's softmax is over the tokens of its own block, only up to itself if the form is causal.
    shown_BlSS = seen_BlS[:, None, :].expand(-1, size, -1)
    if causal:
        shown_BlSS = shown_BlSS & torch.ones(size, size, dtype=torch.bool, device=seen_BlS.device).tril()
    # A row past the block's last token sees itself, so that its softmax is defined; it is not counted.
    shown_BlSS = shown_BlSS | torch.eye(size, dtype=torch.bool, device=seen_BlS.device)
    log_p, log_q = (
        scores.masked_fill(~shown_BlSS[:, None], -math.inf).log_softmax(-1) for scores in (their_BlRSS, our_BlRSS)
    )
    if floor:
        # Probabilities below the floor count as the floor on both sides, as in the released code.
        log_p, log_q = (each.clamp(min=math.log(floor)) for each in (log_p, log_q))
    apart = (log_p - log_q).masked_fill(~shown_BlSS[:, None], 0.0)
    # sum over keys of p (log p - log q), then over heads.
    return (log_p.exp() * apart).sum(-1).sum(1)


def _map_scores(parts: Sequence[Tensor]) -> Tensor:
    """Scaled query-key products [Bl, H, S, S]; several query heads may share a key head."""
    query_BlSHd, key_BlSHd = parts[0], parts[1]
    shared = query_BlSHd.shape[2] // key_BlSHd.shape[2]
    # Query head h reads key head h // shared, as transformers repeats them.
    key_BlSHd = key_BlSHd.repeat_interleave(shared, dim=2)
    return query_BlSHd.transpose(1, 2) @ key_BlSHd.permute(0, 2, 3, 1) * query_BlSHd.shape[-1] ** -0.5


def _check_heads(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape[2] != theirs.shape[2]:
        raise ValueError(
            f"distillation.attention.form is maps, but the student has {ours.shape[2]} heads and the teacher "
            f"{theirs.shape[2]}: maps are compared head by head; use a form of relations"
        )
