"""Pure functions for rollouts: which batches the student writes, how it is prompted, and the batch that results. Called
by `rollouts`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from student_trainer.batch.batch import Batch, Document, Placed, RolloutSums, build_batch
from student_trainer.rollouts.sampler import Sample
from student_trainer.settings import OnPolicySettings

GOLDEN = (math.sqrt(5) - 1) / 2


def count_rollouts(share: float, seed: int, number: int) -> int:
    """How many of the batches 0..number-1 the student writes: `share` of them to within one, spread evenly."""
    return math.floor(share * number + _phase(seed))


def is_rollout(share: float, seed: int, number: int) -> bool:
    """Whether the student writes batch `number`: a function of these three alone."""
    return count_rollouts(share, seed, number + 1) > count_rollouts(share, seed, number)


def _phase(seed: int) -> float:
    # Runs with other seeds write other batches, spread just as evenly.
    return seed * GOLDEN % 1.0


@dataclass(frozen=True, eq=False)
class Prompt:
    """The beginning of a sequence that the student continues. `seed` decides what is drawn after it."""

    row: int
    source: int
    key: str
    ids_N: np.ndarray  # int32
    seed: int


def prompts_of(batch: Batch, settings: OnPolicySettings, seed: int, first_row: int = 0) -> tuple[Prompt, ...]:
    """The prompts from the batch's documents, row by row, as many as a row of `seq_len` tokens has room for with
    `new_tokens` after each; none if no document has one that fits.

    A text gives a prompt every `prompt_tokens + new_tokens` tokens, so that a batch has about as many tokens when the
    student writes it. A chat gives everything before its first answer. `first_row`: this rank's, over all ranks.
    """
    seq_len = batch.tokens_BT.shape[1]
    used = [0] * len(batch.tokens_BT)
    places = [0] * len(batch.tokens_BT)
    prompts = []
    for document in batch.documents:
        for start, stop in beginnings(batch, document, settings.prompt_tokens, settings.new_tokens):
            row, length = document.row, stop - start
            if used[row] + length + settings.new_tokens > seq_len:
                continue
            used[row] += length + settings.new_tokens
            # By position over all ranks, not by order of drawing: the same text on any number of ranks.
            drawn = np.random.SeedSequence([seed, batch.number, first_row + row, places[row]]).generate_state(1, "u8")
            places[row] += 1
            source = int(batch.source_ids_BT[row, document.start])
            key = f"{document.key}+{start - document.start}:student"
            prompts.append(Prompt(row, source, key, batch.tokens_BT[row, start:stop], int(drawn[0])))
    return tuple(prompts)


def beginnings(batch: Batch, document: Document, prompt_tokens: int, new_tokens: int) -> Iterator[tuple[int, int]]:
    """Where the document's prompts are in its row, as [start, stop): in a text `prompt_tokens` each, in a chat
    everything up to its first answer.
    """
    counts_T = batch.loss_mask_BT[document.row, document.start : document.stop - 1]
    answers = np.flatnonzero(counts_T[1:] & ~counts_T[:-1]) + 1
    if len(answers) or (len(counts_T) and not counts_T.any()):
        # A chat. The position before the first token that counts is the prompt's last.
        yield from ((document.start, document.start + int(place) + 1) for place in answers[:1])
        return
    for start in range(document.start, document.stop, prompt_tokens + new_tokens):
        # The last token is left to the student: it may be the end of the text.
        length = min(prompt_tokens, document.stop - 1 - start)
        if length == prompt_tokens or (start == document.start and length > 0):
            yield start, start + length


def rollout_batch(batch: Batch, prompts: Sequence[Prompt], samples: Sequence[Sample], pad_id: int) -> Batch:
    """The batch that replaces `batch`: each prompt with what the student wrote after it."""
    rows: list[list[Placed]] = [[] for _ in batch.tokens_BT]
    written_at_BT = np.zeros(batch.tokens_BT.shape, np.int32)
    for prompt, sample in zip(prompts, samples, strict=True):
        counts_N = np.arange(len(prompt.ids_N) + len(sample.ids_N)) >= len(prompt.ids_N)
        ids_N = np.concatenate([prompt.ids_N, sample.ids_N])
        start = sum(len(placed.ids_N) for placed in rows[prompt.row])
        if sample.written_at_N is not None:
            written_at_BT[prompt.row, start + len(prompt.ids_N) : start + len(ids_N)] = sample.written_at_N
        rows[prompt.row].append(Placed(prompt.source, prompt.key, ids_N, counts_N))
    sums = RolloutSums(
        len(samples), sum(len(sample.ids_N) for sample in samples), sum(sample.ended for sample in samples),
        sum(sample.logprob for sample in samples), sum(sample.passes.writing for sample in samples if sample.passes),
    )  # fmt: skip
    made = build_batch(batch.number, rows, batch.tokens_BT.shape[1], pad_id, batch.source_names, batch.first_row)
    return replace(made, rollout=sums, written_at_BT=written_at_BT)
