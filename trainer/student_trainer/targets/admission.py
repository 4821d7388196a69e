"""Checks that the longest sequence a run may request fits the teacher's limits. Called by `open` before any request;
requests of several sequences are split by the client.
"""

from __future__ import annotations

import numpy as np

from student_trainer.losses.kinds import all_terms
from student_trainer.losses.terms import Needs
from student_trainer.settings import Settings
from student_trainer.targets.protocol import Admits, TeacherCard
from teacher_proto.client.splitting import FIXED_BYTES
from teacher_proto.requests import TargetsRequest


def check_admission(settings: Settings, card: TeacherCard) -> None:
    """ValueError if the teacher would refuse a document as long as a row; it says what would fit."""
    for member in (card, *(card.members or {}).values()):
        if member.admits is not None:
            for what, request in _longest(settings):
                _check(what, request, member.admits)


def _longest(settings: Settings) -> list[tuple[str, TargetsRequest]]:
    """The costliest single-sequence requests of this run, one for each way it asks, each with its setting's name."""
    length, evaluation = settings.data.seq_len, settings.evaluation
    tokens_T = np.zeros(length, np.int64)
    top_k = max(settings.teacher.top_k, evaluation.top_k or 0)
    kinds = Needs.of(all_terms(settings)).kinds
    hidden = "hidden" in kinds or (evaluation.every > 0 and evaluation.kl == "full")
    asked = [
        (f"top_k of {top_k}", TargetsRequest(
            sequences=(tokens_T,), kinds=("top_k", *(("hidden",) if hidden else ()),
                                          *(("sampled",) if "sampled" in kinds else ())),
            top_k=top_k, num_samples=settings.distillation.samples,
        ))
    ]  # fmt: skip
    if "gather" in kinds and settings.distillation.gather_at == "student":
        k = settings.distillation.gather_k
        ids_RG = np.zeros((length, k), np.int64)
        request = TargetsRequest(sequences=(tokens_T,), kinds=("gather",), gather_ids=(ids_RG,))
        asked.append((f"distillation.gather_k of {k}", request))
    return asked


def _check(what: str, request: TargetsRequest, admits: Admits) -> None:
    length, gathered = request.num_tokens, request.gather_ids
    what = f"a document of data.seq_len {length} with {what}"
    if gathered is not None and gathered[0].shape[1] > admits.max_gather:
        raise ValueError(f"{what}: the teacher gathers at most {admits.max_gather} ids per token")
    if length > admits.max_request_tokens:
        raise ValueError(
            f"{what}: the teacher accepts {admits.max_request_tokens} tokens per request, lower data.seq_len"
        )
    num_bytes, cost = request.sequence_bytes(0) + FIXED_BYTES, request.cost(admits.hidden_width)
    if num_bytes > admits.max_body_bytes:
        raise ValueError(
            f"{what} needs a request of {num_bytes} bytes, but the teacher reads {admits.max_body_bytes}: lower "
            f"data.seq_len to {length * admits.max_body_bytes // num_bytes}, or request less per token"
        )
    if admits.max_cost is not None and cost > admits.max_cost:
        raise ValueError(
            f"{what} costs {cost} (tokens x (numbers returned per token + 1)), but the teacher admits "
            f"{admits.max_cost}: lower data.seq_len to {length * admits.max_cost // cost}, request less per token, "
            f"or start the teacher with --capacity {cost}"
        )
