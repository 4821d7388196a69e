"""The teacher's leave-one-out distribution of a masked token, approximated from a window of the tokens that follow.
Called by `late`, for block-diffusion students.

The teacher's own row l-1 is p(v | x_<l) and knows nothing of the tokens after l, some of which the student sees. By
Bayes' rule p(v | all other tokens) is proportional to p(v | x_<l) p(x_l+1, ..., x_l+w | x_<l, v), exactly if w reaches
the end of the text. So the text is scored once for each of a few candidates, with the candidate in the token's place.
These texts share a prefix, which a teacher with a prefix cache computes once. All other ids get no mass.

Candidates are the teacher's likeliest ids, the clean token, and the student's own likeliest id. The latter depends on
the student's weights, so the request is made between two updates. It depends on batch and weights alone, so a resumed
run repeats it. Tokens without lookahead keep the teacher's causal row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from student_trainer.batch.batch import Batch, Placed, build_batch
from student_trainer.batch.batch_targets import BatchTargets
from student_trainer.batch.micro_batch import MicroBatch
from student_trainer.settings.distillation import LookaheadSettings
from student_trainer.students.student import Student
from student_trainer.targets.background import EventThread
from student_trainer.targets.prefetch import Ready
from student_trainer.targets.protocol import Queries, Targets
from student_trainer.targets.student_support import answered, likeliest
from teacher_proto.requests import Query, TargetSpec

SPEC = TargetSpec(("score",))
NOTHING = -1e6  # logprob of an id without mass: far below any other's at every temperature that is served, too
CHOICE = 2  # random stream for choosing a row's tokens; views use other numbers


@dataclass(frozen=True, eq=False)
class CandidateTexts:
    """The request for one micro batch: for each of M labels its candidates [M, G], padded with -1, and one text for
    each candidate, in the table's order.
    """

    label_M: np.ndarray
    candidates_MG: np.ndarray
    texts: Batch
    queries: Queries


class Lookahead:
    """`seed`: the run's seed, which decides the tokens of a row where lookahead is limited to some of them."""

    def __init__(self, targets: Targets, thread: EventThread, settings: LookaheadSettings, seed: int):
        assert settings.window is not None, "there is nothing to look at"
        self._targets, self._thread, self._settings, self._seed = targets, thread, settings, seed
        self._window = settings.window

    def add(self, student: Student, ready: Ready, while_waiting: Callable[[float], None]) -> Ready:
        """The batch with the top-K rows of the chosen tokens replaced. `while_waiting` as in `Prefetch.next`."""
        asked = [self._ask(student, micro, ready.batch) for micro in ready.micro]
        calls = [self._targets.fetch(each.texts, each.queries) for each in asked if each is not None]
        answers, waited_s = answered(self._thread, calls, while_waiting)
        coming = iter(answers)
        micro = tuple(
            each if what is None else _with_rows(each, what, next(coming))
            for each, what in zip(ready.micro, asked, strict=True)
        )
        return replace(ready, micro=micro, waited_s=ready.waited_s + waited_s)

    def _ask(self, student: Student, micro: MicroBatch, batch: Batch) -> CandidateTexts | None:
        if not len(micro.view.labels_N):
            return None
        assert micro.teacher is not None and micro.teacher.ids_NK is not None
        part = batch.rows(micro.first_row, micro.first_row + micro.rows)
        row_C, column_C = part.counted()
        counted_N = micro.view.counted_N.numpy()
        chosen_C = self._chosen(part, row_C)
        label_M = np.flatnonzero(chosen_C[counted_N])
        if not len(label_M):
            return None
        # Costs an extra forward pass, without dropout and with the current weights.
        best_N1 = likeliest(student, micro, 1).cpu().numpy() if self._settings.student_best else None
        candidates_MG = candidates(
            micro.teacher.ids_NK.cpu().numpy()[label_M], self._settings.candidates,
            micro.view.labels_N.cpu().numpy()[label_M], None if best_N1 is None else best_N1[label_M, 0],
        )  # fmt: skip
        # A counted position at column t predicts token t + 1.
        place_M2 = np.stack([row_C, column_C + 1], 1)[counted_N[label_M]]
        return CandidateTexts(label_M, candidates_MG, *texts_of(part, place_M2, candidates_MG, self._window))

    def _chosen(self, part: Batch, row_C: np.ndarray) -> np.ndarray:
        """[C] bool: at most `positions` tokens of each row, regardless of which view masks them."""
        chosen_C = np.ones(len(row_C), bool)
        if self._settings.positions is None:
            return chosen_C
        for row in np.unique(row_C):
            at = np.flatnonzero(row_C == row)
            draw = np.random.default_rng([self._seed % 2**64, CHOICE, part.number, part.first_row + int(row)])
            chosen_C[at] = False
            chosen_C[draw.permutation(at)[: self._settings.positions]] = True
        return chosen_C


def candidates(ids_MK: np.ndarray, most: int, label_M: np.ndarray, best_M: np.ndarray | None) -> np.ndarray:
    """[M, G] distinct ids per row, padded with -1: the teacher's `most` likeliest, then the clean token and the
    student's best, which replace the teacher's last ones where a row would have more than K.
    """
    rows = []
    for index, ids_K in enumerate(ids_MK):
        # Deduplicated in order: the student's best is often the clean token.
        own = dict.fromkeys([int(label_M[index]), *([] if best_M is None else [int(best_M[index])])])
        # The teacher's other candidates, as many as the row has room for.
        theirs = [int(each) for each in ids_K[:most] if int(each) not in own]
        rows.append([*theirs[: max(0, len(ids_K) - len(own))], *own][: len(ids_K)])
    table = np.full((len(rows), max(map(len, rows))), -1)
    for row, found in zip(table, rows, strict=True):
        row[: len(found)] = found
    return table


def texts_of(part: Batch, place_M2: np.ndarray, candidates_MG: np.ndarray, window: int) -> tuple[Batch, Queries]:
    """For each place and each of its candidates, a row with the document up to `window` tokens past the place, the
    candidate in it; and the query for the scores from that token on.
    """
    rows: list[list[Placed]] = []
    queries: list[Query] = []
    for (row, column), ids_G in zip(place_M2, candidates_MG, strict=True):
        document = next(d for d in part.documents if d.row == row and d.start <= column < d.stop)
        at = int(column) - document.start
        tokens_T = part.tokens_BT[row, document.start : min(document.stop, column + window + 1)]
        source = part.source_names.index(document.source)
        for candidate in ids_G[ids_G >= 0]:
            text_T = tokens_T.astype(np.int32, copy=True)
            text_T[at] = candidate
            rows.append([Placed(source, f"{document.key}, {int(candidate)} as its token {at}", text_T, None)])
            queries.append(Query(text_T.astype(np.int64), (at - 1, len(text_T) - 1), SPEC))
    longest = max(len(row[0].ids_N) for row in rows)
    return build_batch(part.number, rows, longest, 0, part.source_names), tuple(queries)


def _with_rows(micro: MicroBatch, asked: CandidateTexts, answer: BatchTargets) -> MicroBatch:
    """The micro batch with the candidates' distributions in place of its labels' top-K rows."""
    teacher = micro.teacher
    assert teacher is not None and teacher.ids_NK is not None and teacher.logprobs_NK is not None
    scores = []
    for targets in answer.documents:
        assert targets is not None and targets.next_logprob is not None
        # log p(v | x_<l) + log p(x_l+1, ..., x_l+w | x_<l, v): the sum of the scores of candidate and window.
        scores.append(float(targets.next_logprob.astype(np.float64).sum()))
    there_MG = asked.candidates_MG >= 0
    score_MG = torch.full(there_MG.shape, -torch.inf, dtype=torch.float64)
    score_MG[torch.from_numpy(there_MG)] = torch.tensor(scores, dtype=torch.float64)
    # Bayes' rule over the candidates: normalise their scores. Padding has -inf, and so no mass.
    log_p_MG, order_MG = score_MG.log_softmax(-1).sort(dim=-1, descending=True, stable=True)
    ids_MG = torch.from_numpy(asked.candidates_MG).gather(1, order_MG).clamp(min=0)
    # Padded to the teacher's K with id 0 at almost no mass, so that both kinds of row fit one array.
    width = teacher.ids_NK.shape[1]
    ids_MK = torch.nn.functional.pad(ids_MG, (0, width - ids_MG.shape[1]))
    log_p_MK = torch.nn.functional.pad(log_p_MG.clamp(min=NOTHING), (0, width - log_p_MG.shape[1]), value=NOTHING)
    label_M, device = torch.from_numpy(asked.label_M).to(teacher.ids_NK.device), teacher.ids_NK.device
    changes = {
        "ids_NK": teacher.ids_NK.index_copy(0, label_M, ids_MK.to(device, teacher.ids_NK.dtype)),
        "logprobs_NK": teacher.logprobs_NK.float().index_copy(0, label_M, log_p_MK.float().to(device)),
    }
    if teacher.temperatures:
        # All mass is on the candidates, so log_z(T) = logsumexp(log p / T) over them.
        softened_MKT = torch.stack([log_p_MK / t for t in teacher.temperatures], -1)
        log_z_MT = softened_MKT.logsumexp(1)
        if teacher.log_z_NT is not None:
            changes["log_z_NT"] = teacher.log_z_NT.float().index_copy(0, label_M, log_z_MT.float().to(device))
        if (mixed_NKT := teacher.tempered_logprobs_NKT) is not None:  # an ensemble's, which has no log_z
            tempered_MKT = (softened_MKT - log_z_MT[:, None]).float().to(device)
            changes["tempered_logprobs_NKT"] = mixed_NKT.index_copy(0, label_M, tempered_MKT)
    return replace(micro, teacher=replace(teacher, **changes))
