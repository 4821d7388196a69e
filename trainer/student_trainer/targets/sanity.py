"""Checks that the first targets belong to the tokens of their batch. Called by `guard` before the first step.

A teacher that is off by one row, that uses other ids, or that mixes up its tensors would train the student towards
nonsense without any error. The checks:

1. Where the next token is among the top K, does its logprob there equal the served `next_logprob`?
2. Do the rows give more probability to the next token than to the one before or after it?
3. Is the next token likelier than one drawn uniformly from the vocabulary?
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from student_trainer.batch.batch import Batch
from student_trainer.batch.batch_targets import BatchTargets
from teacher_proto.errors import InvalidTargetsError

# fp16 keeps 11 bits, so a logprob is off by at most 2**-11 of itself.
ROUNDING = 2.0**-10
# A neighbour must lead by this many standard errors, which happens by chance in one of 10**9 batches.
SIGMAS = 6.0
# The mean next-token loss may exceed log(vocabulary size) by this many nats.
ABSURD_NATS = 1.0
FEWEST_ROWS = 16


def check_alignment(batch: Batch, targets: BatchTargets, vocab_size: int, likely: bool = True) -> None:
    """InvalidTargetsError if the targets cannot belong to the batch's tokens. A very small batch passes.

    `likely`: whether the teacher should find the text likely; otherwise only the first check is made.
    """
    pairs = list(_pairs(batch, targets))
    if sum(len(next_R) for next_R, *_ in pairs) < FEWEST_ROWS:
        return
    _check_agreement(pairs)
    if not likely:
        return
    _check_shift(pairs)
    mean = float(np.concatenate([next_R for next_R, *_ in pairs]).mean())
    if -mean > math.log(vocab_size) + ABSURD_NATS:
        raise InvalidTargetsError(
            f"the teacher gives the next tokens of the first batch {mean:.2f} nats on average, blind guessing among "
            f"{vocab_size} tokens gives {-math.log(vocab_size):.2f}: these targets don't belong to this text. Was it "
            "tokenised with the teacher's tokenizer? If the data really is noise, set teacher.sanity=off"
        )


# next_logprob [R], ids [R, K], logprobs [R, K], and the tokens before, at and after the predicted position [R, 3].
Pair = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _pairs(batch: Batch, targets: BatchTargets) -> Iterator[Pair]:
    """For each document, the rows whose next token has a neighbour on both sides."""
    for document, answer in zip(batch.documents, targets.documents, strict=True):
        if answer is None or answer.ids is None or answer.logprobs is None or answer.next_logprob is None:
            continue
        tokens_T = batch.tokens_BT[document.row, document.start : document.stop].astype(np.int64)
        stop = min(answer.start + answer.num_rows, len(tokens_T) - 2)
        rows = np.arange(answer.start, stop)
        if len(rows):
            cut = slice(0, len(rows))
            around_R3 = np.stack([tokens_T[rows], tokens_T[rows + 1], tokens_T[rows + 2]], 1)
            yield answer.next_logprob[cut], answer.ids[cut], answer.logprobs[cut].astype(np.float32), around_R3


def _check_agreement(pairs: list[Pair]) -> None:
    for next_R, ids_RK, logprobs_RK, around_R3 in pairs:
        # The next token's logprob is sent separately, and again if it is among the top K.
        hit_RK = ids_RK == around_R3[:, 1:2]
        hit_R = hit_RK.any(1)
        listed_R = (logprobs_RK * hit_RK).sum(1)
        gap_R = np.abs(listed_R - next_R) - ROUNDING * (1.0 + np.abs(next_R))
        # Both must agree, and a token outside the top K may not be likelier than the least of these.
        bad_R = (hit_R & (gap_R > 0)) | (~hit_R & (next_R > logprobs_RK[:, -1] + ROUNDING * (1.0 + np.abs(next_R))))
        if bad_R.any():
            row = int(bad_R.argmax())
            listed = f"lists it at {listed_R[row]:.4f}" if hit_R[row] else "does not list it among the top K"
            raise InvalidTargetsError(
                f"the teacher's rows contradict each other: next_logprob of token {around_R3[row, 1]} is "
                f"{next_R[row]:.4f}, the top K of the same row {listed}: one of the two belongs to another row"
            )


def _check_shift(pairs: list[Pair]) -> None:
    """Compare the probabilities that rows give to the tokens before, at and after the predicted position: on average,
    neither neighbour may be ahead.
    """
    given_N3 = np.concatenate(
        [
            (np.exp(logprobs_RK)[:, :, None] * (ids_RK[:, :, None] == around_R3[:, None, :])).sum(1)
            for _, ids_RK, logprobs_RK, around_R3 in pairs
        ]
    )
    for place, what in ((0, "the token before"), (2, "the token after")):
        # How much a neighbour's probability exceeds that of the token itself, row by row.
        lead_N = given_N3[:, place] - given_N3[:, 1]
        # The standard error of the mean lead.
        error = lead_N.std() / math.sqrt(len(lead_N))
        if lead_N.mean() > SIGMAS * error and lead_N.mean() > 0:
            raise InvalidTargetsError(
                f"the teacher's rows are off by one: on average they give probability "
                f"{given_N3[:, place].mean():.3f} to {what} the one that they should predict, and only "
                f"{given_N3[:, 1].mean():.3f} to that one. Row t must be the distribution of token t+1"
            )
